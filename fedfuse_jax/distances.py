"""Squared distances between every two clients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax._primitives.distances import PAIRWISE_SQUARED_DISTANCES

PyTree = Any


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
    return _distances_and_finite(leaves.arrays, where, checks.tree_accumulator(leaves.arrays).name, axis_name)


# The operation gives NaN for the distance from itself of a client that is not finite. That is no news to users, who are
# promised 0, but to rules. Compiled as one, so that `jax_debug_nans` sees what comes of it alone.
@functools.partial(jax.jit, static_argnames=("dtype", "axis_name"), inline=True)
def _distances_and_finite(updates: list[Array], where: Array | None, dtype: str, axis_name: Any) -> Measured:
    (distances,) = PAIRWISE_SQUARED_DISTANCES.bind({"updates": updates, "others": None, "where": where}, (dtype,))
    if axis_name is not None:
        distances = lax.psum(distances, axis_name)
    not_finite = jnp.isnan(jnp.diagonal(distances))
    return Measured(jnp.where(jnp.isnan(distances), 0, distances), ~not_finite)


class _Known(NamedTuple):
    """Distances, and which clients are finite where that is known."""

    distances: Array
    finite: Array | None


def measured_clients(
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
    return _Known(distances, finite), present_in(distances, where)


def present_in(distances: Array, where: Array | None) -> Array:
    """Who takes part: by ``where``, and by the diagonal of distances that were given."""
    present = ~jnp.isinf(jnp.diagonal(distances))
    return present if where is None else present & internals.replicated(where)


def distances_to_others(distances: Array, present: Array) -> Array:
    """Infinite where there is no pair of two clients that both take part."""
    n_clients = distances.shape[0]
    pairs = present[:, None] & present[None] & ~jnp.eye(n_clients, dtype=bool)
    return jnp.where(pairs & ~jnp.isnan(distances), distances, jnp.inf)
