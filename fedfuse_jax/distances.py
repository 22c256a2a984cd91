"""Byzantine-robust rules that go by the distances between clients: who is chosen, and how clients are combined.

A rule is one pass over the updates for the distances, plain ``jax.numpy`` on the ``(n_clients, n_clients)`` matrix, and
one more pass for the combination. Given ``distances=``, it is the second pass alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._jax_internals import ad
from fedfuse_jax._primitive import Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax.reduce import CLIENT_DOTS, _with_tangents, finite_clients, num_blocks, weighted_mean
from fedfuse_jax.robust import mean_around_median

PyTree = Any


# --- Distances ------------------------------------------------------------------------------------------------


def pairwise_squared_distances(updates: PyTree, *, where: Any = None, axis_name: Any = None) -> Array:
    """Measures how far the clients' updates are from each other, over the whole tree.

    .. math:: D_{ij} = \\|x_i - x_j\\|^2

    Differences are squared and summed, never norms subtracted: nothing cancels when updates are large and close
    together. One result serves every rule below, as its ``distances``.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      where: ``(n_clients,)`` bool, the clients that take part. All distances of an absent client are infinite, from
        itself too; that is how the rules recognise it.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded, and the distances are summed over them.

    Returns:
      ``(n_clients, n_clients)``, float32, or float64 if any leaf is: symmetric, never negative, exact zeros on the
      diagonal. A client that is not finite is infinitely far from everyone else.

    Raises:
      TypeError: A leaf is not floating point, or ``where`` is not bool.
      ValueError: Leaves and ``where`` disagree on the number of clients, there is none, or
        ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.pairwise_squared_distances(jnp.array([[0.0, 0.0], [3.0, 4.0], [jnp.nan, 0.0]])).tolist()
      [[0.0, 25.0, inf], [25.0, 0.0, inf], [inf, inf, 0.0]]

    Source:
      The distances of Krum: Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.

    Notes:
      *Differentiability*: in ``updates``, to any order; an infinite distance has derivative 0.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients²`` numbers; sharded clients are first resharded
      to parameters.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves them by a few ulp.
    """
    name = "pairwise_squared_distances"
    leaves, n_clients = checks.client_stacked(name, updates)
    where = checks.participation(name, where, n_clients)
    return _measure(leaves, where, checks.mesh_axes(name, axis_name)).distances


class Measured(NamedTuple):
    """Distances, and which clients are finite (absent ones may be called either)."""

    distances: Array
    finite: Array


def _measure(leaves: checks.Leaves, where: Array | None, axis_name: Any) -> Measured:
    dtype = checks.tree_accumulator(leaves.arrays)
    operands = {"updates": leaves.arrays, "others": None, "where": where}
    (distances,) = PAIRWISE_SQUARED_DISTANCES.bind(operands, (dtype.name,))
    if axis_name is not None:
        distances = lax.psum(distances, axis_name)
    # The operation gives NaN for the distance from itself of a client that is not finite: that is no news to users,
    # who are promised 0, but to rules.
    not_finite = jnp.isnan(jnp.diagonal(distances))
    return Measured(jnp.where(jnp.isnan(distances), 0, distances), ~not_finite)


# --- Rules that choose clients --------------------------------------------------------------------------------


def krum_scores(distances: Any, num_byzantine: int, *, num_neighbors: int | None = None, where: Any = None) -> Array:
    """Sums, for every client, the squared distances to its nearest others: the lower, the more trusted.

    .. math:: s_i = \\sum_{j \\in N_i} D_{ij}

    with :math:`N_i` the m − f − 2 nearest others of client i, of the m clients that take part.

    Args:
      distances: ``(n_clients, n_clients)`` from ``pairwise_squared_distances``. A client that is infinitely far from
        itself is absent.
      num_byzantine: f, a Python integer.
      num_neighbors: How many neighbours instead of m − f − 2, a Python integer; other systems differ here.
      where: ``(n_clients,)`` bool, the clients that take part, of those present in ``distances``.

    Returns:
      ``(n_clients,)``: infinite for an absent client and for one with too few others at a finite distance; NaN when
      m − f − 2 < 1 leaves nobody a neighbour.

    Raises:
      TypeError: ``distances`` is not floating point, ``where`` not bool, or a count not a Python integer.
      ValueError: ``distances`` is not square, a count is negative, or n_clients − f − 2 < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> distances = ff.pairwise_squared_distances(jnp.array([[0.0], [1.0], [3.0], [100.0]]))
      >>> ff.krum_scores(distances, 1).tolist()
      [1.0, 1.0, 4.0, 9409.0]

    Source:
      Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; its guarantee needs m > 2f + 2.

    Notes:
      *Differentiability*: in ``distances``, almost everywhere. *Sharding*: plain ``jax.numpy`` on a small matrix.
      *Determinism*: as ``distances``.
    """
    name = "krum_scores"
    distances = checks.distance_matrix(name, distances)
    n_clients = distances.shape[0]
    where = checks.participation(name, where, n_clients)
    f = checks.python_int(name, "num_byzantine", num_byzantine, 0)
    if num_neighbors is None:
        _check_neighbors(name, f, n_clients)
    else:
        num_neighbors = checks.python_int(name, "num_neighbors", num_neighbors, 1)
        if isinstance(n_clients, int) and num_neighbors >= n_clients:
            raise ValueError(
                f"{name}: num_neighbors is {num_neighbors}; it needs to be less than n_clients, and there are "
                f"{n_clients} clients."
            )
    present = _present_in(distances, where)
    return _scores(distances, present, _num_neighbors(present, f) if num_neighbors is None else num_neighbors)


def krum(
    updates: PyTree,
    num_byzantine: int,
    *,
    where: Any = None,
    distances: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Chooses the one client whose nearest others are nearest.

    .. math:: y = x_{i^*}, \\quad i^* = \\operatorname{argmin}_i s_i

    with the scores s of ``krum_scores``. Every leaf ``(n_clients, *shape)`` becomes ``(*shape)``.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      num_byzantine: f, a Python integer with n_clients − f − 2 ≥ 1.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      distances: The result of ``pairwise_squared_distances``, if it is known. Default: it is computed.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A pytree like ``updates`` without the client axis: the chosen client's update. NaN when all scores are infinite,
      or when m − f − 2 < 1 for the m clients that take part.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: n_clients − f − 2 < 1, or arguments disagree on the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.krum(jnp.array([[1.0, 2.0], [1.5, 2.0], [1.0, 2.5], [1e9, jnp.nan]]), 1).tolist()
      [1.0, 2.0]

    Source:
      Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; its guarantee needs m > 2f + 2.

    Notes:
      *Differentiability*: the cotangent goes to the chosen client, at ties to the one of lower index.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients²`` numbers.
      *Determinism*: the same bits for any number of threads.
    """
    chosen = _select("krum", updates, num_byzantine, 1, where, distances, out_dtype, axis_name)
    return weighted_mean(updates, where=chosen, out_dtype=out_dtype)


def multi_krum(
    updates: PyTree,
    num_byzantine: int,
    num_selected: int | None = None,
    *,
    weights: Any = None,
    where: Any = None,
    distances: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Averages the clients whose nearest others are nearest.

    .. math:: y = \\sum_{i \\in S} w_i x_i \\Big/ \\sum_{i \\in S} w_i

    with S the ``num_selected`` clients of the lowest scores of ``krum_scores``. Every leaf ``(n_clients, *shape)``
    becomes ``(*shape)``.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      num_byzantine: f, a Python integer with n_clients − f − 2 ≥ 1.
      num_selected: How many clients to average, a Python integer. Default: m − f, for the m that take part.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. Default: a plain mean.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      distances: The result of ``pairwise_squared_distances``, if it is known. Default: it is computed.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A pytree like ``updates`` without the client axis. A client of infinite score is never selected; NaN when nobody
      is, when fewer than ``num_selected`` take part, or when m − f − 2 < 1.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: n_clients − f − 2 < 1, ``num_selected`` is not in 1 … n_clients, or arguments disagree on the number
        of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.multi_krum(jnp.array([[1.0, 2.0], [1.5, 2.0], [1.0, 2.5], [1e9, jnp.nan]]), 1, 2).tolist()
      [1.25, 2.0]

    Source:
      Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; its guarantee needs m > 2f + 2.

    Notes:
      *Differentiability*: in ``updates`` and ``weights``, of the mean over the selected clients.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients²`` numbers.
      *Determinism*: the same bits for any number of threads.
    """
    name = "multi_krum"
    chosen = _select(name, updates, num_byzantine, num_selected, where, distances, out_dtype, axis_name)
    if weights is not None:
        leaves, n_clients = checks.client_stacked(name, updates)
        weights = checks.per_client(name, "weights", weights, n_clients, checks.tree_accumulator(leaves.arrays))
    return weighted_mean(updates, weights, where=chosen, out_dtype=out_dtype)


def bulyan(
    updates: PyTree,
    num_byzantine: int,
    *,
    where: Any = None,
    distances: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Picks clients by repeated Krum, then averages, in every coordinate, the picks' values nearest their median.

    .. math:: y = \\operatorname{MeaMed}_{2f}\\{x_i : i \\in P\\}, \\quad |P| = m - 2f

    A pick of Krum is set aside, and Krum picks among the rest, until m − 2f are picked, of the m clients that take
    part. With r clients left, a score sums over r − f − 2 neighbours, over one at least. Of the picks' values in a
    coordinate the 2f farthest from the median are dropped (``mean_around_median``).

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      num_byzantine: f, a Python integer with n_clients ≥ 4f + 3.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      distances: The result of ``pairwise_squared_distances``, if it is known. Default: it is computed.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A pytree like ``updates`` without the client axis; NaN when m < 4f + 3, or no more than 2f clients can be picked.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: n_clients < 4f + 3, or arguments disagree on the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [1e9]])
      >>> ff.bulyan(updates, 1).tolist()
      [3.0]

    Source:
      El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927.

    Notes:
      *Differentiability*: as ``mean_around_median`` of the picks.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients²`` numbers; sharded clients are first resharded
      to parameters.
      *Determinism*: the same bits for any number of threads.
    """
    name = "bulyan"
    leaves, n_clients = checks.client_stacked(name, updates)
    f = checks.python_int(name, "num_byzantine", num_byzantine, 0)
    if isinstance(n_clients, int) and n_clients < 4 * f + 3:
        raise ValueError(
            f"{name}: num_byzantine is {f}; it needs n_clients ≥ 4 · num_byzantine + 3, and there are {n_clients} "
            "clients."
        )
    checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    measured, present = _measured(name, leaves, n_clients, where, distances, axis_name)
    picks = _picks(measured.distances, present, f)
    return mean_around_median(updates, 2 * f, where=picks, out_dtype=out_dtype)


# --- Rules before rules: clients are combined into others ---------------------------------------------------------


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
    measured, present = _measured(name, leaves, n_clients, where, distances, axis_name)
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


# --- From distances to clients --------------------------------------------------------------------------------


class _Known(NamedTuple):
    """Distances, and which clients are finite where that is known."""

    distances: Array
    finite: Array | None


def _measured(
    name: str, leaves: checks.Leaves, n_clients: Any, where: Any, distances: Any, axis_name: Any
) -> tuple[_Known, Array]:
    """The distances, given or measured, and who is present in them. Choices are constant almost everywhere."""
    where = checks.participation(name, where, n_clients)
    finite = None
    if distances is None:
        arrays = [lax.stop_gradient(array) for array in leaves.arrays]
        distances, finite = _measure(leaves._replace(arrays=arrays), where, axis_name)
    else:
        distances = lax.stop_gradient(checks.distance_matrix(name, distances, n_clients))
    distances = internals.replicated(distances)
    return _Known(distances, finite), _present_in(distances, where)


def _present_in(distances: Array, where: Array | None) -> Array:
    present = ~jnp.isinf(jnp.diagonal(distances))
    return present if where is None else present & internals.replicated(where)


def _check_neighbors(name: str, num_byzantine: int, n_clients: Any) -> None:
    if isinstance(n_clients, int) and n_clients - num_byzantine - 2 < 1:
        raise ValueError(
            f"{name}: num_byzantine is {num_byzantine}; it needs n_clients − num_byzantine − 2 ≥ 1, and there are "
            f"{n_clients} clients."
        )


def _num_neighbors(present: Array, num_byzantine: int) -> Array:
    return jnp.sum(present, dtype=jnp.int32) - num_byzantine - 2


def _to_others(distances: Array, present: Array) -> Array:
    """Infinite where there is no pair of two clients that both take part."""
    n_clients = distances.shape[0]
    pairs = present[:, None] & present[None] & ~jnp.eye(n_clients, dtype=bool)
    return jnp.where(pairs & ~jnp.isnan(distances), distances, jnp.inf)


def _scores(distances: Array, present: Array, num_neighbors: Any) -> Array:
    nearest = jnp.sort(_to_others(distances, present), axis=1)
    counted = jnp.arange(distances.shape[0], dtype=jnp.int32) < num_neighbors
    scores = jnp.where(present, jnp.sum(jnp.where(counted, nearest, 0), axis=1), jnp.inf)
    return reference.or_nan(jnp.asarray(num_neighbors) >= 1, scores)


def _select(
    name: str,
    updates: PyTree,
    num_byzantine: Any,
    num_selected: Any,
    where: Any,
    distances: Any,
    out_dtype: Any,
    axis_name: Any,
) -> Array:
    """Who has the lowest scores, at ties the lower index; nobody if that cannot be said."""
    leaves, n_clients = checks.client_stacked(name, updates)
    checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    f = checks.python_int(name, "num_byzantine", num_byzantine, 0)
    _check_neighbors(name, f, n_clients)
    if num_selected is not None:
        num_selected = checks.python_int(name, "num_selected", num_selected, 1)
        if isinstance(n_clients, int) and num_selected > n_clients:
            raise ValueError(
                f"{name}: num_selected is {num_selected}; it needs to be at most n_clients, and there are {n_clients} "
                "clients."
            )
    measured, present = _measured(name, leaves, n_clients, where, distances, axis_name)
    return _lowest(measured.distances, present, f, num_selected)


# Compiled once for all calls alike, as the choices below are: outside of any `jit` every step would be compiled alone
# for each number of clients, and kept, and a loop over a new closure at every call.
@functools.partial(jax.jit, static_argnames=("num_byzantine", "num_selected"))
def _lowest(distances: Array, present: Array, num_byzantine: int, num_selected: int | None) -> Array:
    num_present = jnp.sum(present, dtype=jnp.int32)
    # A choice of nobody needs no NaN.
    num_neighbors = _num_neighbors(present, num_byzantine)
    scores = _scores(distances, present, jnp.maximum(num_neighbors, 1))
    wanted = num_present - num_byzantine if num_selected is None else num_selected
    ranks = jnp.argsort(jnp.argsort(scores, stable=True)).astype(jnp.int32)
    return jnp.isfinite(scores) & (ranks < wanted) & (wanted <= num_present) & (num_neighbors >= 1)


@functools.partial(jax.jit, static_argnames="num_byzantine")
def _picks(distances: Array, present: Array, num_byzantine: int) -> Array:
    """Bulyan's picks: rows are sorted once, and a pick then costs one pass over the matrix."""
    f, n_clients = num_byzantine, distances.shape[0]
    to_others = _to_others(distances, present)
    order = jnp.argsort(to_others, axis=1)
    nearest = jnp.take_along_axis(to_others, order, axis=1)
    reachable = jnp.isfinite(nearest[:, 0])
    num_present = jnp.sum(present, dtype=jnp.int32)

    def pick(step: Any, left: Array) -> Array:
        num_left = jnp.sum(left, dtype=jnp.int32)  # who cannot be picked stays, and counts
        num_neighbors = jnp.minimum(jnp.maximum(num_left - f - 2, 1), num_left - 1)
        there = left[order]
        counted = there & (jnp.cumsum(there, axis=1, dtype=jnp.int32) <= num_neighbors)
        scores = jnp.sum(jnp.where(counted, nearest, 0), axis=1)
        candidates = left & reachable & jnp.isfinite(scores)
        best = jnp.argmin(jnp.where(candidates, scores, jnp.inf))
        picked = (jnp.arange(n_clients) == best) & candidates & (step < num_present - 2 * f)
        return left & ~picked

    left = lax.fori_loop(0, n_clients - 2 * f, pick, present)
    return present & ~left & (num_present >= 4 * f + 3)


@functools.partial(jax.jit, static_argnames="num_byzantine")
def _neighbor_means(distances: Array, present: Array, active: Array, num_byzantine: int) -> Array:
    """The matrix that makes each active client the mean of its nearest; the rows of the others are 0."""
    n_clients = distances.shape[0]
    itself = jnp.eye(n_clients, dtype=bool)
    num_kept = jnp.sum(present, dtype=jnp.int32) - num_byzantine
    # Itself comes first, also where a duplicate has a lower index.
    to_all = jnp.where(itself, -1, _to_others(distances, active))
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


# --- The operations ---------------------------------------------------------------------------------------------

_WHERE = Operand("where", ("clients",), optional=True)


def _pairs_definition(*, updates: Any, others: Any, where: Any, out_dtypes: Any) -> list[Array]:
    if others is not None:
        return [reference.difference_dots(updates, others, where=where).astype(out_dtypes[0])]
    distances = reference.pairwise_squared_distances(updates, where=where)
    not_finite = jnp.diag(~reference.finite_clients(updates)) & jnp.isfinite(distances)
    return [jnp.where(not_finite, jnp.nan, distances).astype(out_dtypes[0])]


def _pairs_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    where, dtypes = primals["where"], call.layout.out_dtypes
    given = primals["others"] is not None
    total: Array | None = None
    # A distance is the product of a difference with itself, and twice its derivative in one factor.
    for varied, fixed in (("updates", "others"), ("others", "updates")) if given else (("updates", "updates"),):
        leaves = _with_tangents(tangents[varied])
        if leaves:
            operands = {
                "updates": [primals[fixed][i] for i in leaves],
                "others": [tangents[varied][i] for i in leaves],
                "where": where,
            }
            (dots,) = call.bind(PAIRWISE_SQUARED_DISTANCES, operands, dtypes)
            total = dots if total is None else total + dots
    if not given and total is not None:
        assert call.results is not None
        total = jnp.where(jnp.isfinite(call.results[0]), 2 * total, 0)
    return [total]


def _pairs_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    """A combination of clients: the coefficients of every row sum to 0."""
    (cotangent,) = cotangents
    wanted, known = "others", operands["updates"]
    if any(map(ad.is_undefined_primal, operands["updates"])):
        wanted, known = "updates", operands["others"]
    n_clients = cotangent.shape[-1]
    pairs = ~jnp.eye(n_clients, dtype=bool)
    if (where := operands["where"]) is not None:
        where = internals.replicated(where)
        pairs = pairs & where[..., :, None] & where[..., None, :]
    cotangent = jnp.where(pairs, cotangent + jnp.swapaxes(cotangent, -1, -2), 0)
    diagonal = jnp.sum(cotangent, axis=-1, keepdims=True) * jnp.eye(n_clients, dtype=cotangent.dtype)
    dtypes = [x.aval.dtype.name for x in operands[wanted]]
    mixed = call.bind(MIX_CLIENTS, {"updates": known, "mixing": diagonal - cotangent}, dtypes)
    return {wanted: mixed}


def _pairs_workspace(sizes: Any, layout: Any) -> Any:
    """One float64 per pair of clients and segment of the coordinates; see ffi/contract/distances.h."""
    most_sums, bytes_per_partial = 2**20, 8
    pairs = sizes["clients"] * sizes["clients"]
    blocks = num_blocks(sizes, layout)
    if isinstance(pairs, int) and isinstance(blocks, int):
        sums = pairs * max(1, min(blocks, most_sums // pairs))
    else:
        sums = pairs + most_sums
    for i in range(layout.batch_dims):
        sums = sums * sizes[f"batch{i}"]
    return sums * bytes_per_partial


# Of a client that is not finite the distance from itself is NaN. With `others`, the dot products of the differences of
# the updates with those of the others instead: linear in both, and 0 on the diagonal and for absent clients.
PAIRWISE_SQUARED_DISTANCES = Operation(
    "pairwise_squared_distances",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("others", ("clients",), per_leaf=True, optional=True),
        _WHERE,
    ),
    results=(Operand("distances", ("rows", "columns")),),
    # Not the clients' own axis: the result is whole on every device.
    new_axes=lambda: {"rows": "clients", "columns": "clients"},
    definition=_pairs_definition,
    whole_axes=("clients",),
    reduce="sum",
    jvp=_pairs_jvp,
    transpose=_pairs_transpose,
    workspace=_pairs_workspace,
)


def _mix_definition(*, updates: Any, mixing: Any, out_dtypes: Any) -> list[Array]:
    return [
        reference.mix_clients(leaf, mixing, out_dtype=dtype) for leaf, dtype in zip(updates, out_dtypes, strict=True)
    ]


def _mix_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout = call.layout
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = _with_tangents(tangents["updates"])
    if leaves:
        operands = {"updates": [tangents["updates"][leaf] for leaf in leaves], "mixing": primals["mixing"]}
        values = call.bind(MIX_CLIENTS, operands, [layout.out_dtypes[leaf] for leaf in leaves])
        for leaf, value in zip(leaves, values, strict=True):
            out[leaf] = value
    if tangents["mixing"] is not None:
        operands = {"updates": primals["updates"], "mixing": tangents["mixing"]}
        values = call.bind(MIX_CLIENTS, operands, layout.out_dtypes)
        out = [value if known is None else known + value for known, value in zip(out, values, strict=True)]
    return out


def _mix_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    updates, mixing = operands["updates"], operands["mixing"]
    if not ad.is_undefined_primal(mixing):
        dtypes = [leaf.aval.dtype.name for leaf in updates]
        transposed = {"updates": cotangents, "mixing": jnp.swapaxes(mixing, -1, -2)}
        return {"updates": call.bind(MIX_CLIENTS, transposed, dtypes)}
    # The rows' products with all clients: as a batch of dot products that shares the updates.
    batch = call.batch_dims
    dots_of = {"updates": [jnp.expand_dims(leaf, batch) for leaf in updates], "others": cotangents, "where": None}
    return {"mixing": CLIENT_DOTS.bind_batched(dots_of, (mixing.aval.dtype.name,), batch + 1, (("shared", True),))[0]}


def _mix_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Sharded clients are summed where they are, in the accumulator's dtype, and all-reduced."""
    names = mesh_axes.get("clients", ())
    if not names:
        return call.run_local(operands)
    dtypes = tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in operands["updates"])
    totals = lax.psum(call.run_local(operands, out_dtypes=dtypes), names)
    return [total.astype(dtype) for total, dtype in zip(totals, call.layout.out_dtypes, strict=True)]


# Combinations of the clients, one a row of the matrix. Whoever's coefficient is 0 is not touched, NaN or not.
MIX_CLIENTS = Operation(
    "mix_clients",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("mixing", ("rows", "clients")),
    ),
    results=(Operand("mixed", ("rows",), per_leaf=True),),
    definition=_mix_definition,
    whole_axes=("rows",),
    partitioned=_mix_partitioned,
    jvp=_mix_jvp,
    transpose=_mix_transpose,
)
