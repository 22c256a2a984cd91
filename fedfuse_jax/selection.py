"""Krum and its kin: rules that choose clients by their distances.

A rule is one pass over the updates for the distances, plain ``jax.numpy`` on the ``(n_clients, n_clients)`` matrix, and
one more pass for the combination. Given ``distances=``, it is the second pass alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax.distances import distances_to_others, measured_clients, present_in
from fedfuse_jax.linear import weighted_mean
from fedfuse_jax.order_statistics import mean_around_median

PyTree = Any


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
    present = present_in(distances, where)
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
    measured, present = measured_clients(name, leaves, n_clients, where, distances, axis_name)
    picks = _picks(measured.distances, present, f)
    return mean_around_median(updates, 2 * f, where=picks, out_dtype=out_dtype)


def _check_neighbors(name: str, num_byzantine: int, n_clients: Any) -> None:
    """Refuses a number of bad clients that leaves Krum no neighbour."""
    if isinstance(n_clients, int) and n_clients - num_byzantine - 2 < 1:
        raise ValueError(
            f"{name}: num_byzantine is {num_byzantine}; it needs n_clients − num_byzantine − 2 ≥ 1, and there are "
            f"{n_clients} clients."
        )


def _num_neighbors(present: Array, num_byzantine: int) -> Array:
    """How many neighbours Krum sums over, of those who are present."""
    return jnp.sum(present, dtype=jnp.int32) - num_byzantine - 2


def _scores(distances: Array, present: Array, num_neighbors: Any) -> Array:
    """Krum's scores: the sum of the squared distances to the nearest neighbours."""
    nearest = jnp.sort(distances_to_others(distances, present), axis=1)
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
    measured, present = measured_clients(name, leaves, n_clients, where, distances, axis_name)
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
    to_others = distances_to_others(distances, present)
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
