"""Points among the clients, found by iteration: the geometric median and centered clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._primitives.centers import STEP_TOWARD_CLIENTS, norms_of_parts
from fedfuse_jax.norms import finite_clients
from fedfuse_jax.order_statistics import coordinate_median

PyTree = Any


def geometric_median(
    updates: PyTree,
    weights: Any = None,
    *,
    num_iterations: int = 8,
    smoothing: Any = 1e-6,
    where: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Finds the point with the least weighted sum of distances to the clients, over the whole tree.

    .. math:: y = \\operatorname{argmin}_z \\sum_i w_i \\|x_i - z\\|

    By smoothed Weiszfeld iterations from the coordinate median of the clients,
    :math:`z \\leftarrow \\sum_i \\beta_i x_i / \\sum_i \\beta_i` with
    :math:`\\beta_i = w_i / \\max(\\nu, \\|x_i - z\\|)`.
    Every leaf ``(n_clients, *shape)`` becomes ``(*shape)``. A client that is not finite has no influence.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, not negative. Default: all alike.
      num_iterations: How many iterations, a Python integer of at least 1. Each reads the updates once.
      smoothing: ν, a distance below which clients pull no harder; may be traced.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      A pytree like ``updates`` without the client axis; NaN when nobody takes part who is finite, or all their weights
      are 0.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: ``num_iterations`` is less than 1, ``smoothing`` is a negative Python number, or arguments disagree on
        the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1e9, 1e9]])
      >>> bool(jnp.all(jnp.abs(ff.geometric_median(updates)) < 1))
      True

    Source:
      Robust aggregation by the smoothed Weiszfeld algorithm: Pillutla et al. 2022, https://arxiv.org/abs/1912.13445.

    Notes:
      *Differentiability*: through the iterations, in ``updates``, ``weights`` and ``smoothing``; an absent client's
      gradient is exactly 0.
      *Sharding*: sharded parameters cost one all-reduce of O(``n_clients``) numbers an iteration; sharded clients are
      resharded to parameters.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves distances by a few ulp.
    """
    name = "geometric_median"
    leaves, n_clients = checks.client_stacked(name, updates)
    dtype = checks.tree_accumulator(leaves.arrays)
    if weights is not None:
        weights = internals.replicated(checks.per_client(name, "weights", weights, n_clients, dtype))
    iterations = checks.python_int(name, "num_iterations", num_iterations, 1)
    floor = checks.bounded_scalar(name, "smoothing", smoothing, dtype)
    where = checks.participation(name, where, n_clients)
    dtypes = checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    present = internals.replicated(finite_clients(updates, axis_name=axis_name))
    if where is not None:
        present = present & internals.replicated(where)

    start = leaves.treedef.flatten_up_to(coordinate_median(updates, where=present))
    numbers = {"present": present, "weights": weights, "floor": floor}
    return leaves.unflatten(
        iterate(leaves.arrays, start, present, numbers, weiszfeld_pulls, iterations, dtypes, axis_name)
    )


def centered_clipping(
    updates: PyTree,
    center: PyTree,
    radius: Any,
    *,
    num_iterations: int = 1,
    where: Any = None,
    out_dtype: Any = None,
    axis_name: Any = None,
) -> PyTree:
    """Moves a center by the mean of the clients' differences from it, each clipped to a radius.

    .. math:: c \\leftarrow c + \\frac{1}{m} \\sum_i \\min\\Bigl(1, \\frac{\\tau}{\\|x_i - c\\|}\\Bigr) (x_i - c)

    for the m clients that take part and are finite, with norms over the whole tree. Usually the center is the last
    round's result. A client that is not finite has no influence.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      center: Pytree like ``updates`` without the client axis, of floating leaves.
      radius: τ, a real scalar, not negative; may be traced.
      num_iterations: How many iterations, a Python integer of at least 1. Each reads the updates once.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).
      axis_name: Inside your own ``shard_map``: the mesh axes over which the parameters are sharded.

    Returns:
      The new center. When nobody takes part who is finite, a step of length 0: the center as it was. NaN for a traced
      ``radius`` that is negative or NaN.

    Raises:
      TypeError: A leaf is not floating point, or an argument is not what it needs to be.
      ValueError: ``center`` differs from ``updates`` in structure or shapes, ``num_iterations`` is less than 1,
        ``radius`` is a negative Python number, or arguments disagree on the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0, 0.0], [0.0, 1.0], [1e9, 0.0], [jnp.nan, 0.0]])
      >>> ff.centered_clipping(updates, jnp.zeros(2), 2.0).tolist()
      [1.0, 0.3333333432674408]

    Source:
      Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333.

    Notes:
      *Differentiability*: through the iterations, in ``updates``, ``center`` and ``radius``; an absent client's
      gradient is exactly 0.
      *Sharding*: sharded parameters cost one all-reduce of O(``n_clients``) numbers an iteration; sharded clients are
      resharded to parameters.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves distances by a few ulp.
    """
    name = "centered_clipping"
    leaves, n_clients = checks.client_stacked(name, updates)
    start = _center_of(name, leaves, center)
    dtype = checks.tree_accumulator(leaves.arrays)
    limit = checks.bounded_scalar(name, "radius", radius, dtype)
    iterations = checks.python_int(name, "num_iterations", num_iterations, 1)
    where = checks.participation(name, where, n_clients)
    dtypes = checks.result_dtypes(name, leaves.arrays, out_dtype)
    axis_name = checks.mesh_axes(name, axis_name)
    everybody = jnp.ones((n_clients,), bool) if where is None else internals.replicated(where)
    numbers = {"present": everybody, "limit": limit}
    return leaves.unflatten(
        iterate(leaves.arrays, start, where, numbers, _clipping_pulls, iterations, dtypes, axis_name)
    )


def _center_of(operation: str, updates: checks.Leaves, center: PyTree) -> list[Array]:
    """The center's leaves in the accumulators' dtypes."""
    leaves = checks.float_leaves(operation, "center", center)
    if leaves.treedef != updates.treedef:
        raise ValueError(
            f"{operation}: center has the structure {leaves.treedef}; it needs updates', {updates.treedef}."
        )
    for array, path, update in zip(leaves.arrays, leaves.paths, updates.arrays, strict=True):
        if array.shape != update.shape[1:]:
            raise ValueError(f"{operation}: {path} has shape {array.shape}; it needs {update.shape[1:]}, a client's.")
    return [
        array.astype(reference.accumulator_dtype(update.dtype))
        for array, update in zip(leaves.arrays, updates.arrays, strict=True)
    ]


def weiszfeld_pulls(distances: Array, present: Array, weights: Array | None, floor: Array) -> Array:
    """How strongly each client pulls, in smoothed Weiszfeld steps."""
    # Selections, unlike maxima, have derivatives in which nothing is multiplied by 0, which may be infinite here.
    tiny = jnp.finfo(distances.dtype).tiny
    floor = jnp.where(floor < tiny, tiny, floor)
    far = jnp.where(distances > floor, distances, floor)
    # Relative to the nearest client nothing overflows or vanishes.
    nearest = lax.stop_gradient(jnp.min(jnp.where(present, far, jnp.inf)))
    pull = jnp.where(present, 1 / jnp.where(present, far / nearest, 1), 0)
    if weights is not None:
        pull = jnp.where(present, weights * pull, 0)
    return pull / jnp.sum(pull)


def _clipping_pulls(distances: Array, present: Array, limit: Array) -> Array:
    finite = present & jnp.isfinite(distances)
    clipped = finite & (distances > limit)
    shares = jnp.where(clipped, limit / jnp.where(clipped, distances, 1), 1)
    # A traced radius that is none must not mean that nobody is clipped.
    shares = reference.or_nan(limit >= 0, shares)
    num_finite = jnp.maximum(jnp.sum(finite, dtype=jnp.int32), 1)
    return jnp.where(finite, shares / num_finite.astype(distances.dtype), 0)


# Compiled once for all calls alike: outside of any `jit`, a loop over a new closure would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("pulls", "num_iterations", "out_dtypes", "axis_name"))
def iterate(
    updates: Sequence[Array],
    center: Sequence[Array],
    where: Array | None,
    numbers: Mapping[str, Array | None],
    pulls: Callable[..., Array],
    num_iterations: int,
    out_dtypes: tuple[str, ...],
    axis_name: Any,
) -> list[Array]:
    """Steps as often as asked, by weights that ``pulls`` makes of ``numbers`` and the distances from the last step."""
    # Every iteration reads them: not from the host, if that is where they were offloaded to.
    updates = [internals.in_device_memory(leaf) for leaf in updates]
    center = [internals.in_device_memory(leaf) for leaf in center]
    dtype = reference.accumulator_dtype(*(leaf.dtype for leaf in updates))
    step_dtypes = (*(leaf.dtype.name for leaf in center), dtype.name)

    def step(center: Sequence[Array], weights: Array) -> tuple[list[Array], Array]:
        operands = {"updates": list(updates), "center": list(center), "weights": weights, "where": where}
        *moved, distances = STEP_TOWARD_CLIENTS.bind(operands, step_dtypes)
        if axis_name is not None:
            distances = norms_of_parts([distances], axis_name)
        return moved, internals.replicated(distances)

    # Nobody pulls: this only measures.
    state = step(center, jnp.zeros(updates[0].shape[0], dtype))
    moved, _ = lax.fori_loop(0, num_iterations, lambda _, state: step(state[0], pulls(state[1], **numbers)), state)
    return [leaf.astype(dtype) for leaf, dtype in zip(moved, out_dtypes, strict=True)]
