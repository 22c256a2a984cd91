"""What may be done to the clients' updates before a rule reduces them: mixing and bucketing."""

from typing import Any

import jax
import jax.numpy as jnp

from fedfuse_jax import _checks as checks
from fedfuse_jax import bucketing, finite_clients, nearest_neighbor_mixing
from fedfuse_jax.fedjax._clients import no_state
from fedfuse_jax.fedjax._stacking import PreAggregator, bound


def nearest_neighbor_mixing_pre_aggregator(num_byzantine: int) -> PreAggregator:
    r"""Builds nearest-neighbour mixing: every update becomes the mean of the n - f nearest it.

    .. math:: y_i = \frac{1}{n - f} \sum_{j \in N_i} x_j

    Here N_i are the n - f clients nearest client i, itself included. It makes honest updates alike
    before a rule chooses among them, which is what most rules need where the clients' data differ.

    Args:
        num_byzantine: f, how many of the clients may be bad; fewer than half of them.

    Returns:
        A stateless `PreAggregator`, for the argument `pre_aggregators` of the aggregators here. A
        client with NaN or infinities does not take part in what follows.

    Raises:
        ValueError: `num_byzantine` is negative. From the aggregator's `apply`: it is not less than
            the number of clients.
        TypeError: `num_byzantine` is not a Python integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import krum_aggregator, nearest_neighbor_mixing_pre_aggregator
        >>> mixing = nearest_neighbor_mixing_pre_aggregator(1)
        >>> aggregator = krum_aggregator(1, pre_aggregators=[mixing])
        >>> values = (1.0, 1.5, 2.5, 2.0, jnp.nan)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> update, state = aggregator.apply(clients, aggregator.init())
        >>> print(update["w"])
        1.75

    Source:
        Allouah et al. 2023, https://arxiv.org/abs/2302.01772.

    Notes:
        *Determinism*: the same bits for the same clients in the same order.
    """
    f = checks.python_int("nearest_neighbor_mixing_pre_aggregator", "num_byzantine", num_byzantine, 0)
    return PreAggregator(no_state, bound(_mix, num_byzantine=f))


def bucketing_pre_aggregator(bucket_size: int, key: Any) -> PreAggregator:
    r"""Builds bucketing: the means of random groups of clients.

    .. math:: y_b = \frac{1}{s} \sum_{i \in B_b} x_i

    The means vary less than the clients do, and no attack knows who will share its bucket. There
    are n / s of them, of which f bad clients spoil up to f: a rule that follows is given the same f
    and fewer clients, and s has to be small enough for it to bear that.

    Args:
        bucket_size: s, how many clients make a bucket; the last may be smaller.
        key: A JAX key, typed or raw; it is the state before the first round, and split in each.

    Returns:
        A `PreAggregator`, for the argument `pre_aggregators` of the aggregators here; its state is
        the key. A client with NaN or infinities is in no bucket.

    Raises:
        ValueError: `bucket_size` is less than 1, or `key` is not a single key.
        TypeError: `bucket_size` is not a Python integer, or `key` is no JAX key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import bucketing_pre_aggregator, median_aggregator
        >>> bucketing = bucketing_pre_aggregator(2, jax.random.key(0))
        >>> aggregator = median_aggregator(pre_aggregators=[bucketing])
        >>> values = (2.0, 2.0, 2.0, 2.0, 1e9)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> update, state = aggregator.apply(clients, aggregator.init())
        >>> print(update["w"])
        2.0

    Source:
        Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365.

    Notes:
        *Determinism*: the same bits for the same key and the same clients in the same order.
    """
    name = "bucketing_pre_aggregator"
    first = checks.random_key(name, key)
    size = checks.python_int(name, "bucket_size", bucket_size, 1)
    return PreAggregator(lambda: first, bound(_bucket, bucket_size=size))


def _mix(updates: Any, where: Any, state: Any, *, num_byzantine: int) -> tuple[Any, Any, Any]:
    mixed = nearest_neighbor_mixing(updates, num_byzantine, where=where)
    return mixed, _finite(updates, where), state


def _bucket(updates: Any, where: Any, key: Any, *, bucket_size: int) -> tuple[Any, Any, Any]:
    now, later = jax.random.split(key)
    buckets = bucketing(now, updates, bucket_size, where=where)
    num_buckets = jax.tree.leaves(buckets)[0].shape[0]
    num_clients = jnp.sum(_finite(updates, where), dtype=jnp.int32)
    return buckets, jnp.arange(num_buckets) * bucket_size < num_clients, later


def _finite(updates: Any, where: Any) -> jax.Array:
    finite = finite_clients(updates)
    return finite if where is None else finite & where
