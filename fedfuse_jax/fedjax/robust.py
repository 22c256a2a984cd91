"""Rules that look at whole updates: Krum and its kin, the geometric median, centered clipping."""

from collections.abc import Iterable
from typing import Any

import fedjax
import jax
import jax.numpy as jnp

from fedfuse_jax import _checks as checks
from fedfuse_jax import bulyan, centered_clipping, geometric_median, krum, multi_krum
from fedfuse_jax.fedjax._stacking import PreAggregator, bound, stacking_aggregator, stateful_stacking_aggregator


def krum_aggregator(
    num_byzantine: int, *, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds Krum: the one update that is nearest its neighbours.

    .. math:: y = x_k, \quad k = \operatorname{argmin}_i \sum_{j \in N_i} \|x_i - x_j\|^2

    Here N_i are the n - f - 2 other clients nearest client i.

    Withstands f bad clients, NaN and infinities included, as long as n > 2f + 2. One client's
    update is a noisy step: where the clients' data differ, `multi_krum_aggregator` or
    `nearest_neighbor_mixing_pre_aggregator` before it serve better. The weights are ignored, since
    a bad client would choose its own.

    Args:
        num_byzantine: f, how many of the clients may be bad.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(update, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once.

    Raises:
        ValueError: `num_byzantine` is negative. From `apply`: n - f - 2 < 1, there is no client at
            all, or the clients' trees or shapes differ.
        TypeError: `num_byzantine` is not a Python integer, or `pre_aggregators` holds something
            else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import krum_aggregator
        >>> aggregator = krum_aggregator(1)
        >>> values = (1.0, 1.5, 2.5, 2.0, jnp.nan)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> update, state = aggregator.apply(clients, aggregator.init())
        >>> print(update["w"])
        1.5

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.krum`.
        *Determinism*: the same bits for the same clients in the same order; of two that are equally
        near, the one that came first. A new number of clients compiles anew.
    """
    name = "krum_aggregator"
    rule = bound(krum, num_byzantine=checks.python_int(name, "num_byzantine", num_byzantine, 0))
    return stacking_aggregator(name, rule, pre_aggregators)


def multi_krum_aggregator(
    num_byzantine: int, num_selected: int | None = None, *, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds Multi-Krum: the mean of the updates that are nearest their neighbours.

    .. math:: y = \frac{1}{m} \sum_{i \in S} x_i

    Here S are the m clients with the least sums of squared distances to their n - f - 2 nearest
    others.

    Withstands f bad clients, NaN and infinities included, as long as n > 2f + 2. The weights are
    ignored, since a bad client would choose its own.

    Args:
        num_byzantine: f, how many of the clients may be bad.
        num_selected: m, how many are averaged. `None`: all but f.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(mean, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once.

    Raises:
        ValueError: `num_byzantine` is negative or `num_selected` less than 1. From `apply`:
            n - f - 2 < 1, m > n, there is no client at all, or the clients' trees or shapes differ.
        TypeError: `num_byzantine` or `num_selected` is not a Python integer, or `pre_aggregators`
            holds something else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import multi_krum_aggregator
        >>> aggregator = multi_krum_aggregator(1)
        >>> values = (1.0, 1.5, 2.5, 2.0, jnp.nan)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(mean["w"])
        1.75

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.multi_krum`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "multi_krum_aggregator"
    rule = bound(
        multi_krum,
        num_byzantine=checks.python_int(name, "num_byzantine", num_byzantine, 0),
        num_selected=None if num_selected is None else checks.python_int(name, "num_selected", num_selected, 1),
    )
    return stacking_aggregator(name, rule, pre_aggregators)


def bulyan_aggregator(
    num_byzantine: int, *, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds Bulyan: clients picked by Krum, then the mean of what lies nearest their median.

    .. math:: y_j = \frac{1}{n - 4f} \sum_{i \in N_j} x_{ij}

    Krum picks n - 2f clients, one after the other; N_j are those n - 4f of them whose j-th
    coordinate is nearest the median of that coordinate.

    Withstands f bad clients, NaN and infinities included, in every coordinate; it takes
    n >= 4f + 3 for that. The weights are ignored, since a bad client would choose its own.

    Args:
        num_byzantine: f, how many of the clients may be bad.
        pre_aggregators: What is done to the updates before, in this order. Of those that remain,
            too, there must be 4f + 3.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(mean, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once.

    Raises:
        ValueError: `num_byzantine` is negative. From `apply`: n < 4f + 3, there is no client at
            all, or the clients' trees or shapes differ.
        TypeError: `num_byzantine` is not a Python integer, or `pre_aggregators` holds something
            else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import bulyan_aggregator
        >>> aggregator = bulyan_aggregator(1)
        >>> values = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, jnp.nan)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(mean["w"])
        3.0

    Source:
        El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.bulyan`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "bulyan_aggregator"
    rule = bound(bulyan, num_byzantine=checks.python_int(name, "num_byzantine", num_byzantine, 0))
    return stacking_aggregator(name, rule, pre_aggregators)


def geometric_median_aggregator(
    *, num_iterations: int = 8, smoothing: float = 1e-6, pre_aggregators: Iterable[PreAggregator] = ()
) -> fedjax.aggregators.Aggregator:
    r"""Builds the geometric median: the point with the least sum of distances to the updates.

    .. math:: y = \operatorname{argmin}_z \sum_i \|x_i - z\|

    Found by smoothed Weiszfeld iterations from the coordinate-wise median; this is RFA's rule.

    Withstands any fewer than half of the clients, NaN and infinities included, without being told
    how many are bad. The weights are ignored, since a bad client would choose its own.

    Args:
        num_iterations: How often the updates are read and the point is moved.
        smoothing: Distances below it count as it.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`, stateless as long as it has no pre-aggregators;
        `apply(clients_params_and_weights, state)` takes an iterable of `(client_id, params,
        weight)`, each `params` a pytree of floating leaves, and returns `(median, state)` with the
        dtypes of the clients' leaves. All updates are held and stacked once.

    Raises:
        ValueError: `num_iterations` is less than 1, or `smoothing` negative. From `apply`: there is
            no client at all, or the clients' trees or shapes differ.
        TypeError: `num_iterations` is not a Python integer, `smoothing` is not a Python number, or
            `pre_aggregators` holds something else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import geometric_median_aggregator
        >>> aggregator = geometric_median_aggregator()
        >>> updates = ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e6, 1e6])
        >>> clients = (("id", {"w": jnp.array(update)}, 1) for update in updates)
        >>> median, state = aggregator.apply(clients, aggregator.init())
        >>> bool(jnp.all(median["w"] < 1.1))
        True

    Source:
        Pillutla et al. 2022, https://arxiv.org/abs/1912.13445.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.geometric_median`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "geometric_median_aggregator"
    rule = bound(
        geometric_median,
        num_iterations=checks.python_int(name, "num_iterations", num_iterations, 1),
        smoothing=_not_negative(name, "smoothing", smoothing),
    )
    return stacking_aggregator(name, rule, pre_aggregators)


def centered_clipping_aggregator(
    radius: float,
    *,
    num_iterations: int = 1,
    center: Any = None,
    pre_aggregators: Iterable[PreAggregator] = (),
) -> fedjax.aggregators.Aggregator:
    r"""Builds centered clipping: the last round's result, moved by the clipped differences to it.

    .. math:: v \leftarrow v + \frac{1}{n} \sum_i \min\Bigl(1, \frac{\tau}{\|x_i - v\|}\Bigr)(x_i - v)

    No client moves the result by more than the radius over n. The centre v is the aggregator's
    state and goes from round to round, which is what defeats attacks that are small but persistent.

    A client with NaN or infinities has no influence. The weights are ignored, since a bad client
    would choose its own.

    Args:
        radius: tau, about as large as honest updates differ from round to round.
        num_iterations: How many steps are made in a round.
        center: The first centre, a pytree like one update. `None`: zeros.
        pre_aggregators: What is done to the updates before, in this order.

    Returns:
        A `fedjax.aggregators.Aggregator`; `apply(clients_params_and_weights, state)` takes an
        iterable of `(client_id, params, weight)`, each `params` a pytree of floating leaves, and
        returns `(center, state)`: the new centre with the dtypes of the clients' leaves and, in the
        state, in float32 (float64 for float64 leaves). Without a `center`, the state before the
        first round has no arrays. All updates are held and stacked once.

    Raises:
        ValueError: `num_iterations` is less than 1, or `radius` negative. From `apply`: there is no
            client at all, or the clients' trees or shapes differ, or are not those of the centre.
        TypeError: `num_iterations` is not a Python integer, `radius` is not a Python number, or
            `pre_aggregators` holds something else. From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import centered_clipping_aggregator
        >>> aggregator = centered_clipping_aggregator(1.0)
        >>> clients = [("id", {"w": jnp.array([value])}, 1) for value in (0.5, 1.5, 2.5, -1e9)]
        >>> state = aggregator.init()
        >>> for _ in range(3):
        ...     center, state = aggregator.apply(clients, state)
        ...     print(center["w"])
        [0.375]
        [0.65625]
        [0.828125]

    Source:
        Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.centered_clipping`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    name = "centered_clipping_aggregator"
    rule = bound(
        _clip_around_center,
        radius=_not_negative(name, "radius", radius),
        num_iterations=checks.python_int(name, "num_iterations", num_iterations, 1),
    )
    return stateful_stacking_aggregator(name, rule, pre_aggregators, lambda: center)


def _clip_around_center(updates: Any, where: Any, center: Any, *, radius: float, num_iterations: int) -> Any:
    if center is None:
        center = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), updates)
    center = centered_clipping(updates, center, radius, num_iterations=num_iterations, where=where)
    return center, center


def _not_negative(operation: str, argument: str, value: Any) -> float:
    checks.python_number(operation, argument, value)
    if not value >= 0:
        raise ValueError(f"{operation}: {argument} is {value}; it needs to be at least 0.")
    return float(value)
