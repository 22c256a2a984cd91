"""Rules before rules: clients are replaced by means of clients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._primitives.mixing import MIX_CLIENTS
from fedfuse_jax.distances import distances_to_others, measured_clients
from fedfuse_jax.norms import finite_clients

PyTree = Any


def nearest_neighbor_mixing(
    updates: PyTree,
    num_byzantine: int,
    *,
    where: Any = None,
    distances: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Replaces each client by the mean of its nearest clients, itself included, before another rule.

    .. math:: y_i = \\frac{1}{m - f} \\sum_{j \\in N_i} x_j

    with :math:`N_i` the m − f clients nearest client i, itself the first, of the m that take part.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      num_byzantine: f, a Python integer, less than the number of clients. The paper's guarantee needs 2f < m.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      distances: The result of ``pairwise_squared_distances``, if it is known. Default: it is computed.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A client-stacked pytree like ``updates``. A client that is absent or not finite is nobody's neighbour, and its row
      is zeros: give ``where & finite_clients(updates)`` to the rule that follows. A client with fewer than m − f
      finite neighbours becomes the mean of those; NaN when no more than f clients take part.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: ``num_byzantine`` is not in 0 … n_clients − 1, or arguments disagree on the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0], [2.0], [4.0], [jnp.nan]])
      >>> ff.nearest_neighbor_mixing(updates, 2).tolist()
      [[1.5], [1.5], [3.0], [0.0]]

    Source:
      Allouah et al. 2023, https://arxiv.org/abs/2302.01772.

    Notes:
      *Differentiability*: every neighbour gets its share of the cotangent; who is near is held fixed.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients²`` numbers.
      *Determinism*: the same bits for any number of threads.
    """
    name = "nearest_neighbor_mixing"
    leaves, n_clients = checks.client_stacked(name, updates)
    f = checks.python_int(name, "num_byzantine", num_byzantine, 0)
    if isinstance(n_clients, int) and f >= n_clients:
        raise ValueError(
            f"{name}: num_byzantine is {f}; it needs to be less than n_clients, and there are {n_clients} clients."
        )
    dtypes = checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    measured, present = measured_clients(name, leaves, n_clients, where, distances, axis_name)
    finite = measured.finite
    if finite is None:
        finite = finite_clients(updates, axis_name=axis_name)
    mixing = _neighbor_means(measured.distances, present, present & internals.replicated(finite), f)
    operands = {"updates": leaves.arrays, "mixing": mixing.astype(checks.tree_accumulator(leaves.arrays))}
    return leaves.unflatten(MIX_CLIENTS.bind(operands, dtypes))


def bucketing(
    key: Any,
    updates: PyTree,
    bucket_size: int,
    *,
    where: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Averages the clients in random groups, before another rule.

    .. math:: y_b = \\frac{1}{|B_b|} \\sum_{i \\in B_b} x_i

    The clients that take part and are finite are put in random order, and every ``bucket_size`` in a row make a bucket;
    the last may be smaller.

    Args:
      key: A JAX key, typed or raw ``uint32[2]``.
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      bucket_size: s, a Python integer of at least 1.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A client-stacked pytree of ⌈n_clients / s⌉ rows. With m clients that take part and are finite, the first ⌈m / s⌉
      are means, and the others zeros: ``jnp.arange(rows) * s < m`` is the ``where`` of the rule that follows. Up to f
      bad clients spoil up to f of its rows.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: ``bucket_size`` is less than 1, or ``where`` and leaves disagree on the number of clients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0], [1.0], [1.0], [jnp.nan]])
      >>> ff.bucketing(jax.random.key(0), updates, 2).tolist()
      [[1.0], [1.0]]

    Source:
      Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365.

    Notes:
      *Differentiability*: in ``updates``; an absent client's gradient is exactly 0.
      *Sharding*: parameters may be sharded in any way; whether clients are finite costs one all-reduce of
      ``n_clients`` numbers.
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    name = "bucketing"
    key = checks.random_key(name, key)
    leaves, n_clients = checks.client_stacked(name, updates)
    size = checks.python_int(name, "bucket_size", bucket_size, 1)
    where = checks.participation(name, where, n_clients)
    dtypes = checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    active = internals.replicated(finite_clients(updates, axis_name=axis_name))
    if where is not None:
        active = active & internals.replicated(where)
    mixing = _bucket_means(key, active, size, checks.tree_accumulator(leaves.arrays))
    operands = {"updates": leaves.arrays, "mixing": mixing}
    return leaves.unflatten(MIX_CLIENTS.bind(operands, dtypes))


@functools.partial(jax.jit, static_argnames="num_byzantine")
def _neighbor_means(distances: Array, present: Array, active: Array, num_byzantine: int) -> Array:
    """The matrix that makes each active client the mean of its nearest; the rows of the others are 0."""
    n_clients = distances.shape[0]
    itself = jnp.eye(n_clients, dtype=bool)
    num_kept = jnp.sum(present, dtype=jnp.int32) - num_byzantine
    # Itself comes first, also where a duplicate has a lower index.
    to_all = jnp.where(itself, -1, distances_to_others(distances, active))
    ranks = jnp.argsort(jnp.argsort(to_all, axis=1, stable=True), axis=1).astype(jnp.int32)
    chosen = (ranks < jnp.maximum(num_kept, 1)) & jnp.isfinite(to_all) & active[:, None]
    shares = 1 / jnp.sum(chosen, axis=1, keepdims=True).astype(distances.dtype)
    return jnp.where(chosen, reference.or_nan(num_kept >= 1, shares), 0)


def _permutation(key: Array, n_clients: Any) -> Array:
    """``jax.random.permutation``; of a symbolic number of clients, which that refuses, by its own algorithm."""
    if isinstance(n_clients, int):
        return jax.random.permutation(key, n_clients)
    order = jnp.arange(n_clients)
    for rounds in range(3):  # sorts by random keys: more clients, more rounds
        key, subkey = jax.random.split(key)
        _, shuffled = lax.sort_key_val(jax.random.bits(subkey, (n_clients,)), order)
        order = jnp.where(jnp.asarray(n_clients) > int((2**32 - 1) ** (rounds / 3)), shuffled, order)
    return order


def _bucket_means(key: Array, active: Array, bucket_size: int, dtype: Any) -> Array:
    """The matrix that averages the active clients, in random order, in buckets."""
    n_clients = active.shape[0]
    shuffled = _permutation(key, n_clients)
    shuffled = shuffled[jnp.argsort(~active[shuffled], stable=True)]
    bucket_of = jnp.zeros(n_clients, jnp.int32).at[shuffled].set(jnp.arange(n_clients, dtype=jnp.int32) // bucket_size)
    rows = jnp.arange(-(-n_clients // bucket_size), dtype=jnp.int32)
    members = (bucket_of[None] == rows[:, None]) & active[None]
    sizes = jnp.maximum(jnp.sum(members, axis=1, keepdims=True, dtype=jnp.int32), 1)
    return members.astype(dtype) / sizes.astype(dtype)
