"""Byzantine-robust rules that move a point among the clients: the geometric median and centered clipping.

Both read the updates once an iteration: one operation steps from the point toward the clients and measures how far
each of them is from where it arrives.
"""

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
from fedfuse_jax._primitive import REDUCTIONS, Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax.reduce import CLIENT_DOTS, WEIGHTED_SUM, block_sums_workspace, finite_clients
from fedfuse_jax.robust import coordinate_median

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
        _iterate(leaves.arrays, start, present, numbers, _weiszfeld_pulls, iterations, dtypes, axis_name)
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
        _iterate(leaves.arrays, start, where, numbers, _clipping_pulls, iterations, dtypes, axis_name)
    )


# --- Checks -----------------------------------------------------------------------------------------------------


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


# --- Iterations -------------------------------------------------------------------------------------------------


def _weiszfeld_pulls(distances: Array, present: Array, weights: Array | None, floor: Array) -> Array:
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
def _iterate(
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


def norms_of_parts(parts: Sequence[Array], axis_names: Any) -> Array:
    """Norms from those of parts, some of them on other devices, without overflow and by one all-reduce."""
    norm = REDUCTIONS["norm"]
    total = functools.reduce(jnp.add, map(norm.summand, parts))
    return norm.result(lax.psum(total, axis_names) if axis_names else total)


# --- The operation ----------------------------------------------------------------------------------------------


def _step_definition(*, updates: Any, center: Any, weights: Any, where: Any, out_dtypes: Any) -> list[Array]:
    moved, distances = reference.step_toward_clients(updates, center, weights, where=where)
    return [leaf.astype(dtype) for leaf, dtype in zip((*moved, distances), out_dtypes, strict=True)]


def _step_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    """By products with whole vectors, each of which is a call: nothing as large as the updates is made on the way."""
    assert call.results is not None
    updates, center, weights = primals["updates"], primals["center"], primals["weights"]
    *moved, distances = call.results
    # Whoever is not finite or is absent does not pull, and stays as far away as it is.
    counts = jnp.isfinite(distances)
    if primals["where"] is not None:
        counts = counts & primals["where"]
    step_dtypes = [leaf.dtype.name for leaf in moved]

    def total_of(numbers: Array, ndim: int) -> Array:
        return call.scalar(jnp.where(counts, numbers, 0).sum(-1), ndim)

    def dots(leaves: list[Array], others: list[Array], shared: bool) -> Array:
        operands = {"updates": leaves, "others": others, "where": counts}
        return call.bind(CLIENT_DOTS, operands, (distances.dtype.name,), shared=shared)[0]

    # Where the step arrives: c + Σ wᵢ (xᵢ − c).
    shifts = [jnp.zeros_like(leaf) for leaf in moved]
    for leaf, tangent in enumerate(tangents["center"]):
        if tangent is not None:
            shifts[leaf] += tangent * (1 - total_of(weights.astype(tangent.dtype), tangent.ndim))
    if (slope := tangents["weights"]) is not None:
        sums = call.bind(
            WEIGHTED_SUM, {"updates": updates, "weights": slope, "where": counts}, step_dtypes, divide=False
        )
        for leaf, (total, start) in enumerate(zip(sums, center, strict=True)):
            shifts[leaf] += total - start * total_of(slope.astype(start.dtype), start.ndim)
    own = [leaf for leaf, tangent in enumerate(tangents["updates"]) if tangent is not None]
    own_tangents = [tangents["updates"][leaf] for leaf in own]
    if own:
        operands = {"updates": own_tangents, "weights": weights, "where": counts}
        sums = call.bind(WEIGHTED_SUM, operands, [step_dtypes[leaf] for leaf in own], divide=False)
        for leaf, total in zip(own, sums, strict=True):
            shifts[leaf] += total

    # How far it is from there: ⟨xᵢ − y, xᵢ' − y'⟩ / ‖xᵢ − y‖.
    of_end = [
        jnp.sum(end * shift, axis=tuple(range(call.batch_dims, end.ndim)))
        for end, shift in zip(moved, shifts, strict=True)
    ]
    of_tree = functools.reduce(jnp.add, [product.astype(distances.dtype) for product in of_end])
    products = of_tree[..., None] - dots(updates, shifts, shared=True)
    if own:
        products += dots(own_tangents, [updates[leaf] for leaf in own], shared=False)
        products -= dots(own_tangents, [moved[leaf] for leaf in own], shared=True)
    is_away = counts & (distances > 0)
    return [*shifts, jnp.where(is_away, products / jnp.where(is_away, distances, 1), 0)]


def _step_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Every device steps in its own coordinates; the norms are put together by one all-reduce."""
    layout = call.layout
    shards = call.operation.shards_of_leaves(layout, operands, mesh_axes)
    moved: dict[int, Array] = {}
    parts = []
    for leaves, counts in shards.groups:
        dtypes = (*(layout.out_dtypes[leaf] for leaf in leaves), layout.out_dtypes[-1])
        *steps, distances = call.run_local(call.restrict(operands, leaves), num_leaves=len(leaves), out_dtypes=dtypes)
        moved.update(zip(leaves, steps, strict=True))
        parts.append(jnp.where(counts(), distances, 0))
    distances = parts[0] if len(parts) == 1 and not shards.names else norms_of_parts(parts, shards.names)
    return [*(moved[leaf] for leaf in range(layout.num_leaves)), distances]


# center + Σ weightᵢ · (clientᵢ − center), and every client's distance from there.
STEP_TOWARD_CLIENTS = Operation(
    "step_toward_clients",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("center", per_leaf=True),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("moved", per_leaf=True), Operand("distances", ("clients",))),
    definition=_step_definition,
    whole_axes=("clients",),
    partitioned=_step_partitioned,
    jvp=_step_jvp,
    workspace=block_sums_workspace,
)
