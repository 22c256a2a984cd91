"""Rules that look at one coordinate at a time: median, trimmed mean, mean around the median."""

from collections.abc import Iterable
from typing import Any

import fedjax
import jax.numpy as jnp

from fedfuse_jax import _checks as checks
from fedfuse_jax import coordinate_median, mean_around_median, trimmed_mean
from fedfuse_jax.fedjax._stacking import PreAggregator, bound, stacking_aggregator


def median_aggregator(*, pre_aggregators: Iterable[PreAggregator] = ()) -> fedjax.aggregators.Aggregator:
    r"""Builds the coordinate-wise median of the clients' updates.

    .. math:: y_j = \operatorname{median}_i \, x_{ij}

    For an even number of clients that is the mean of the two middle values.

    Withstands any fewer than half of the clients, NaN and infinities included. The weights are
    ignored, since a bad client would choose its own: every client that comes counts once, one
    without examples too.

    Args:
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(median, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once: memory is two copies
        of them.

    Raises:
        ValueError: From `apply`: there is no client at all, or the clients' trees or shapes differ.
        TypeError: `pre_aggregators` holds something else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import median_aggregator
        >>> aggregator = median_aggregator()
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in (1.0, jnp.nan, 2.0))
        >>> median, state = aggregator.apply(clients, aggregator.init())
        >>> print(median["w"])
        2.0

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.coordinate_median`.
        *Determinism*: the same bits in whatever order the clients come. A new number of clients
        compiles anew.
    """
    return stacking_aggregator("median_aggregator", bound(coordinate_median), pre_aggregators)


def trimmed_mean_aggregator(
    trim_fraction: float = 0.2, *, trim_count: int | None = None, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds the coordinate-wise trimmed mean of the clients' updates.

    .. math:: y_j = \frac{1}{n - 2k} \sum_{i=k+1}^{n-k} x_{(i)j}, \quad k = \lfloor \beta n \rfloor

    The k smallest and the k largest values of each coordinate are dropped, the others averaged.

    Withstands k bad clients, NaN and infinities included. The weights are ignored, since a bad
    client would choose its own: every client that comes counts once, one without examples too.

    Args:
        trim_fraction: The share of the clients dropped at each end, in [0, 0.5).
        trim_count: k itself; wins over the fraction. A client that a pre-aggregator has taken out
            counts as one of the k.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(trimmed_mean, state)`
        with the dtypes of the clients' leaves. All updates are held and stacked once: memory is two
        copies of them.

    Raises:
        ValueError: `trim_fraction` or `trim_count` is out of range. From `apply`: there is no
            client at all, the trim leaves nobody, or the clients' trees or shapes differ.
        TypeError: `trim_fraction` is not a Python number or `trim_count` not a Python integer, or
            `pre_aggregators` holds something else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import trimmed_mean_aggregator
        >>> aggregator = trimmed_mean_aggregator(0.25)
        >>> values = (1.0, -jnp.inf, 3.0, 1e30)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> trimmed, state = aggregator.apply(clients, aggregator.init())
        >>> print(trimmed["w"])
        2.0

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.trimmed_mean`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "trimmed_mean_aggregator"
    checks.python_number(name, "trim_fraction", trim_fraction)
    if not 0 <= trim_fraction < 0.5:
        raise ValueError(
            f"{name}: trim_fraction is {trim_fraction!r}; it needs a number in "
            "[0, 0.5): that share of the clients is dropped at each end"
        )
    if trim_count is not None:
        trim_count = checks.python_int(name, "trim_count", trim_count, 0)
    rule = bound(_trimmed_mean, trim_fraction=trim_fraction, trim_count=trim_count)
    return stacking_aggregator(name, rule, pre_aggregators)


def _trimmed_mean(updates: Any, *, where: Any, trim_fraction: float, trim_count: Any) -> Any:
    if trim_count is not None and where is not None:
        # Whoever has been found out is not to be trimmed once more: k at each end might leave nobody then.
        trim_count = jnp.maximum(trim_count - jnp.sum(~where, dtype=jnp.int32), 0)
    return trimmed_mean(updates, trim_count, trim_fraction=trim_fraction, where=where)


def mean_around_median_aggregator(
    num_byzantine: int, *, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds the mean of the values nearest the median of each coordinate (MeaMed).

    .. math:: y_j = \frac{1}{n - f} \sum_{i \in N_j} x_{ij}

    Here N_j are the n - f clients whose j-th coordinate is nearest the median of that coordinate.

    Withstands f bad clients, NaN and infinities included, and drops half as many values as the
    trimmed mean that bears as many. The weights are ignored, since a bad client would choose its
    own.

    Args:
        num_byzantine: f, how many of the clients may be bad; fewer than half of them.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(mean, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once.

    Raises:
        ValueError: `num_byzantine` is negative. From `apply`: there is no client at all, too few of
            them, or the clients' trees or shapes differ.
        TypeError: `num_byzantine` is not a Python integer, or `pre_aggregators` holds something
            else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import mean_around_median_aggregator
        >>> aggregator = mean_around_median_aggregator(1)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in (1.0, 2.0, 3.0, jnp.nan))
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(mean["w"])
        2.0

    Source:
        Xie et al. 2018, https://arxiv.org/abs/1802.10116.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.mean_around_median`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "mean_around_median_aggregator"
    rule = bound(mean_around_median, num_byzantine=checks.python_int(name, "num_byzantine", num_byzantine, 0))
    return stacking_aggregator(name, rule, pre_aggregators)
