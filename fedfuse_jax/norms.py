"""One number for each client, over the whole tree: squared norms, and whether all is finite."""

from __future__ import annotations

from typing import Any

from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax._core import all_reduce
from fedfuse_jax._primitives.norms import FINITE_CLIENTS, SQUARED_NORMS

PyTree = Any


def squared_norms(updates: PyTree, *, where: Any = None, axis_name: Any = None) -> Array:
    """Squares and sums each client's coordinates, over the whole tree.

    .. math:: s_i = \\|x_i\\|^2

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      where: ``(n_clients,)`` bool, the clients that take part; an absent client's norm is 0, NaN or not.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded, and the norms are summed over them.

    Returns:
      ``(n_clients,)``, float32, or float64 if any leaf is. Sums are kept in float64, so that a billion
      coordinates keep their digits; a squared norm beyond float32 is inf.

    Raises:
      TypeError: A leaf is not floating point, or ``where`` is not bool.
      ValueError: Leaves and ``where`` disagree on the number of clients, there is none, or
        ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.squared_norms({"w": jnp.array([[3.0, 0.0], [1.0, 2.0]]), "b": jnp.array([4.0, 2.0])}).tolist()
      [25.0, 9.0]

    Source:
      The norm that clipping rules clip: McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Notes:
      *Differentiability*: in ``updates``, to any order.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients`` numbers, sharded clients nothing.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves them by a few ulp.
    """
    leaves, n_clients = checks.client_stacked("squared_norms", updates)
    where = checks.participation("squared_norms", where, n_clients)
    axis_name = checks.mesh_axes("squared_norms", axis_name)
    dtype = checks.tree_accumulator(leaves.arrays)
    (norms,) = SQUARED_NORMS.bind({"updates": leaves.arrays, "where": where}, (dtype.name,))
    return norms if axis_name is None else lax.psum(norms, axis_name)


def finite_clients(updates: PyTree, *, axis_name: Any = None) -> Array:
    """Tells which clients sent nothing but finite numbers, over the whole tree.

    .. math:: f_i = \\bigwedge_j |x_{ij}| < \\infty

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded.

    Returns:
      ``(n_clients,)`` bool, made to be passed as ``where``.

    Raises:
      TypeError: A leaf is not floating point.
      ValueError: Leaves disagree on the number of clients, there is none, or
        ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, jnp.inf]])
      >>> ff.finite_clients(updates).tolist()
      [True, False, False]
      >>> ff.weighted_mean(updates, where=ff.finite_clients(updates)).tolist()
      [1.0, 2.0]

    Source:
      The guard TensorFlow Federated's finalizers apply to a whole round, per client.

    Notes:
      *Differentiability*: none; the result is boolean.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients`` numbers, sharded clients nothing.
      *Determinism*: exact.
    """
    leaves, _ = checks.client_stacked("finite_clients", updates)
    axis_name = checks.mesh_axes("finite_clients", axis_name)
    (finite,) = FINITE_CLIENTS.bind({"updates": leaves.arrays}, ("bool",))
    return finite if axis_name is None else all_reduce("all", finite, axis_name)
