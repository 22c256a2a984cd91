"""Which axes stay sharded, what every device does, and which collectives that costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax._core.bound_call import BoundCall
from fedfuse_jax._core.declaration import (
    Axis,
    Layout,
    MeshAxes,
    Operands,
    leaf_of,
)
from fedfuse_jax._core.reductions import REDUCTIONS
from fedfuse_jax._jax_internals import mlir

if TYPE_CHECKING:
    from fedfuse_jax._core.operation import Operation


class ShardsOfLeaves(NamedTuple):
    """Leaves sharded alike, whether this device's share of them counts, and all mesh axes they are sharded over."""

    groups: list[tuple[list[int], Callable[[], Any]]]
    names: MeshAxes


class ShardingPlan(NamedTuple):
    """What partitioning needs to know: where operands and results lie, and one device's share of the work."""

    operand_specs: list[PartitionSpec]
    result_specs: list[PartitionSpec]
    run: Callable[..., list[Array]]


def lower_for_devices(operation: Operation, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
    avals_in: Sequence[Any] = ctx.avals_in
    shardings = [aval.sharding for aval in avals_in if internals.explicit_axes(aval.sharding.mesh)]
    sharded = [sharding for sharding in shardings if any(entry is not None for entry in sharding.spec)]
    if sharded:
        run = mapped_over_shards(operation, sharded[0].mesh, ctx.avals_out, layout)
    elif internals.lowers_for_many_devices(ctx):
        run = partitioned_by_xla(operation, layout)
    else:
        run = functools.partial(operation.bind_inner, layout=layout)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)


def partitioned_by_xla(operation: Operation, layout: Layout) -> Callable[..., Any]:
    """The operation wrapped so that XLA's partitioner asks us instead of gathering everything."""

    @internals.custom_partitioning
    def run(*flat: Array) -> list[Array]:
        return operation.bind_inner(*flat, layout=layout)

    def partition(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        specs = [arg.sharding.spec if isinstance(arg.sharding, NamedSharding) else () for arg in arg_shapes]
        plan = plan_sharding(operation, mesh, [arg.shape for arg in arg_shapes], specs, layout)
        results = [NamedSharding(mesh, spec) for spec in plan.result_specs]
        return mesh, plan.run, results, tuple(NamedSharding(mesh, spec) for spec in plan.operand_specs)

    def rule(mesh: Any, value_types: Any, result_types: Any) -> Any:
        operand_axes, result_axes = operation.axes([len(t.shape) for t in value_types], layout)
        return _shardy_rule(value_types, operand_axes, result_types, result_axes)

    run.def_partition(partition=partition, sharding_rule=rule)
    return run


def mapped_over_shards(operation: Operation, mesh: Any, avals_out: Sequence[Any], layout: Layout) -> Callable[..., Any]:
    """The operation as a ``shard_map`` over the Explicit axes of ``mesh``, by the operands' own types."""

    def run(*flat: Array) -> list[Array]:
        plan = plan_sharding(
            operation, mesh, [x.shape for x in flat], [jax.typeof(x).sharding.spec for x in flat], layout
        )
        operands = [internals.resharded(x, mesh, spec) for x, spec in zip(flat, plan.operand_specs, strict=True)]
        mapped = jax.shard_map(
            plan.run,
            mesh=mesh,
            in_specs=tuple(plan.operand_specs),
            out_specs=plan.result_specs,
            axis_names=internals.explicit_axes(mesh),
            # Nothing is differentiated here any more, and a leaf that is replicated may stand beside a sharded one.
            check_vma=False,
        )
        results = mapped(*operands)
        return [internals.resharded(x, mesh, aval.sharding.spec) for x, aval in zip(results, avals_out, strict=True)]

    return run


def plan_sharding(
    operation: Operation, mesh: Any, shapes: Sequence[Any], specs: Sequence[Any], layout: Layout
) -> ShardingPlan:
    """How the operands are to lie on the mesh, what every device does, and how the results lie then."""
    operand_axes, result_axes = operation.axes([len(shape) for shape in shapes], layout)
    mesh_axes = choose_mesh_axes(operation, mesh, shapes, specs, operand_axes)
    # Different operands may ask for one mesh axis for two axes of a third, or of a result: the first keeps it.
    for axes in (*operand_axes, *result_axes):
        kept = without_repeats([mesh_axes.get(axis, ()) for axis in axes])
        mesh_axes.update({axis: as_tuple(entry) for axis, entry in zip(axes, kept, strict=True)})

    def run(*flat: Array) -> list[Array]:
        share = operation.partitioned or functools.partial(run_partitioned, operation)
        # XLA asks for this from a thread of its own, where a context manager of the user's has no effect.
        with internals.keeping_types(flat):
            return share(BoundCall(operation, layout, None), operation.unflatten(flat, layout), mesh_axes)

    operand_specs = [_spec(shape, axes, mesh_axes) for shape, axes in zip(shapes, operand_axes, strict=True)]
    result_specs = [_spec(None, axes, mesh_axes) for axes in result_axes]
    return ShardingPlan(operand_specs, result_specs, run)


def choose_mesh_axes(
    operation: Operation,
    mesh: Any,
    shapes: Sequence[Any],
    specs: Sequence[Any],
    operand_axes: Sequence[tuple[Axis, ...]],
) -> dict[Axis, MeshAxes]:
    """Which mesh axes every axis is sharded over; the largest operand that has an axis decides."""
    chosen: dict[Axis, MeshAxes] = {}
    for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i])):
        entries = tuple(specs[i]) + (None,) * (len(shapes[i]) - len(specs[i]))
        own = [axis for axis, size in zip(operand_axes[i], shapes[i], strict=True) if size != 1]
        used = {name for axis in own for name in chosen.get(axis, ())}
        for axis, size, entry in zip(operand_axes[i], shapes[i], entries, strict=True):
            if axis in chosen or size == 1:
                continue
            names = tuple(name for name in as_tuple(entry) if name not in used)
            # Uneven shards would be padded, and a sum over coordinates must not see padding.
            chosen[axis] = names if size % _num_shards(mesh, names) == 0 else ()
            used.update(chosen[axis])
    for axis in operation.whole_axes:
        freed = chosen.get(axis, ())
        chosen[axis] = ()
        if freed:
            spread_over_parameters(operation, freed, mesh, shapes, operand_axes, chosen)
    return chosen


def spread_over_parameters(
    operation: Operation,
    freed: MeshAxes,
    mesh: Any,
    shapes: Sequence[Any],
    operand_axes: Sequence[tuple[Axis, ...]],
    chosen: dict[Axis, MeshAxes],
) -> None:
    """Gives the mesh axes freed from the clients to one parameter axis of every leaf that they divide."""
    done: set[str] = set()
    for shape, axes in zip(shapes, operand_axes, strict=True):
        for axis, size in zip(axes, shape, strict=True):
            leaf = axis.split(".")[0]
            names = chosen.get(axis, ()) + freed
            if axis.startswith("leaf") and leaf not in done and size > 1 and size % _num_shards(mesh, names) == 0:
                chosen[axis] = names
                done.add(leaf)


def run_partitioned(
    operation: Operation, call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]
) -> list[Array]:
    """One device's share, and the collectives that make it whole."""
    if operation.reduce is None:
        return call.run_local(operands)
    if call.layout.num_leaves == 0:
        return sum_over_lost_axes(operation, call, operands, mesh_axes)
    shards = shards_of_leaves(operation, call.layout, operands, mesh_axes)
    reduction = REDUCTIONS[operation.reduce]
    parts: list[list[Array]] = []
    for leaves, counts in shards.groups:
        part = call.run_local(call.restrict(operands, leaves), num_leaves=len(leaves))
        parts.append([jnp.where(counts(), reduction.summand(x), 0) for x in part])
    names = shards.names
    totals = [lax.psum(sum(xs[1:], xs[0]), names) if names else sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True)]
    return [reduction.result(total) for total in totals]


def sum_over_lost_axes(
    operation: Operation, call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]
) -> list[Array]:
    """Partial results of an operation without leaves, summed over every sharded axis that no result has."""
    operand_axes, result_axes = operation.axes([x.ndim for x in operation.flatten(operands, call.layout)], call.layout)
    lost = {axis for axes in operand_axes for axis in axes} - {axis for axes in result_axes for axis in axes}
    names = tuple(sorted({name for axis in lost for name in mesh_axes.get(axis, ())}))
    return [lax.psum(part, names) if names else part for part in call.run_local(operands)]


def shards_of_leaves(
    operation: Operation, layout: Layout, operands: Operands, mesh_axes: Mapping[Axis, MeshAxes]
) -> ShardsOfLeaves:
    """The leaves by the mesh axes that their parameters are sharded over."""
    operand_axes, _ = operation.axes([x.ndim for x in operation.flatten(operands, layout)], layout)
    names_of: list[set[str]] = [set() for _ in range(layout.num_leaves)]
    for axis in {axis for axes in operand_axes for axis in axes}:
        if (leaf := leaf_of(axis)) is not None:
            names_of[leaf].update(mesh_axes.get(axis, ()))
    leaf_axes = [frozenset(names) for names in names_of]
    everything = frozenset().union(*leaf_axes)
    groups: list[tuple[list[int], Callable[[], Any]]] = []
    for sharded_over in sorted(set(leaf_axes), key=sorted):
        others = sorted(everything - sharded_over)
        leaves = [leaf for leaf in range(layout.num_leaves) if leaf_axes[leaf] == sharded_over]
        groups.append((leaves, functools.partial(_is_first_along, others)))
    return ShardsOfLeaves(groups, tuple(sorted(everything)))


def _is_first_along(names: Sequence[str]) -> Any:
    """Whether this device is the first along these mesh axes: what several hold alike then counts once."""
    return sum(lax.axis_index(name) for name in names) == 0


def _num_shards(mesh: Any, names: MeshAxes) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _spec(shape: Sequence[int] | None, axes: Sequence[Axis], mesh_axes: Mapping[Axis, MeshAxes]) -> PartitionSpec:
    """The spec of an array with the given axes; an axis of size 1 (a shared batch axis, say) is not sharded."""
    sizes = shape if shape is not None else (None,) * len(axes)
    entries = [None if size == 1 else mesh_axes.get(axis, ()) or None for axis, size in zip(axes, sizes, strict=True)]
    return PartitionSpec(*without_repeats(entries))


def _shardy_rule(operands: Any, operand_axes: Any, results: Any, result_axes: Any) -> Any:
    """Tells Shardy which axes of operands and results are the same, for propagation."""
    fresh = iter(range(10**9))

    def mapping(types: Any, axes_of: Any) -> tuple[Any, ...]:
        mappings = []
        for t, axes in zip(types, axes_of, strict=True):
            # An axis of size 1 is not sharded, and must not clash with its full-size namesake.
            named = [
                axis.replace(".", "_") if size != 1 else f"one{next(fresh)}"
                for axis, size in zip(axes, t.shape, strict=True)
            ]
            mappings.append(internals.ArrayMapping(*named))
        return tuple(mappings)

    return internals.SdyShardingRule(mapping(operands, operand_axes), mapping(results, result_axes))


def without_repeats(entries: Sequence[Any]) -> list[Any]:
    """A spec may name a mesh axis once: later repetitions are dropped."""
    seen: set[str] = set()
    kept: list[Any] = []
    for entry in entries:
        names = tuple(name for name in as_tuple(entry) if name not in seen)
        seen.update(names)
        kept.append(None if not names else names if len(names) > 1 else names[0])
    return kept


def as_tuple(entry: Any) -> MeshAxes:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)
