"""The factory: an operation is declared once, here it becomes a JAX primitive.

An :class:`Operation` says which operands it takes, along which named axes they lie, what it means in
``jax.numpy`` and how it is differentiated. From that it gets

* its abstract value (shapes, dtypes, shardings) and a check that the operands fit together;
* a lowering to one custom call where a kernel is compiled and loaded, and to its definition anywhere else;
* batching: mapped axes go to the front, unmapped operands get an axis of size 1, and the handler walks the
  batch itself, so that any ``vmap`` is still one call and nothing is broadcast;
* sharding: which axes may stay sharded, and which collectives that costs;
* derivatives, transposition, export.

Two primitives stand behind each operation. The *outer* one is what users' programs contain: it has all the
rules. Its lowering binds the *inner* one, wrapped in ``custom_partitioning`` when the program is compiled for
several devices. The inner one only knows how to lower itself on one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import _native, reference
from fedfuse_jax._jax_internals import ad, batching, mlir

# A kernel decodes the batch with a table of this many axes; see ffi/contract/buffers.h.
MAX_BATCH_DIMS = 8

# An axis of an operand, by what it means: "clients", "batch0", or "leaf2.axis1" for a parameter axis.
Axis = str
# The mesh axes that an axis is sharded over.
MeshAxes = tuple[str, ...]


class Operand(NamedTuple):
    """One operand or result: its leading named axes, and whether there is one per leaf of the tree.

    An operand per leaf has the leaf's parameter axes after its named ones.
    """

    name: str
    axes: tuple[Axis, ...] = ()
    per_leaf: bool = False
    optional: bool = False


class Layout(NamedTuple):
    """The static part of a bound operation: how its flat operands are to be read."""

    num_leaves: int
    batch_dims: int
    optional: tuple[str, ...]  # the optional operands that are there
    out_dtypes: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]

    def attribute(self, name: str) -> Any:
        return dict(self.attributes)[name]


# Operands by name: a list for one per leaf, an array for a single one, None for an optional one left out.
Operands = dict[str, Any]


class Operation:
    """One operation, from its declaration to a bound JAX primitive.

    Args:
      name: The operation's public name; the custom call's target is ``fedfuse.<name>.v1``.
      operands: Its operands in the kernel's order; or a function of the attributes that gives them.
      results: Its results, likewise. Every axis of a result is an axis of an operand, or in ``new_axes``.
      definition: ``definition(out_dtypes=…, **operands, **attributes) -> list`` in ``jax.numpy``, unbatched.
      whole_axes: Axes that one device must see whole. They are resharded over parameter axes.
      reduce: How partial results combine over sharded axes that no result has: ``"sum"``, ``"all"`` or ``"norm"``. With
        operands per leaf, those are parameter axes; without (where ``"sum"`` is all there is), any.
      partitioned: Replaces what one device of several does: ``partitioned(call, operands, mesh_axes)``.
      new_axes: ``new_axes(attributes) -> {axis: size}`` for axes that only results have; a size may be the name of the
        operands' axis that has it.
      jvp: ``jvp(call, primals, tangents) -> [tangent or None, …]``; ``None``: the results have no derivative.
      transpose: ``transpose(call, cotangents, operands) -> {operand: cotangents}`` for the linear operands.
      aliased: Operands whose buffers the results of the same names may reuse.
      workspace: ``workspace(sizes, layout) -> bytes``: scratch memory a kernel needs, as an extra result; sizes
        are by axis.
    """

    def __init__(
        self,
        name: str,
        *,
        operands: Sequence[Operand] | Callable[..., Sequence[Operand]],
        results: Sequence[Operand] | Callable[..., Sequence[Operand]],
        definition: Callable[..., list[Array]],
        whole_axes: tuple[Axis, ...] = (),
        reduce: str | None = None,
        partitioned: Callable[..., list[Array]] | None = None,
        new_axes: Callable[..., Mapping[Axis, int | Axis]] | None = None,
        jvp: Callable[..., list[Array | None]] | None = None,
        transpose: Callable[..., Operands] | None = None,
        aliased: tuple[str, ...] = (),
        workspace: Callable[..., Any] | None = None,
    ):
        self.name = name
        self.target = f"fedfuse.{name}.v1"
        self._operands, self._results = operands, results
        self._definition = definition
        self._whole_axes, self._reduce, self._partitioned = whole_axes, reduce, partitioned
        self._new_axes = new_axes
        self._jvp, self._transpose = jvp, transpose
        self._aliased, self._workspace = aliased, workspace
        self._outer = self._make_primitive(f"fedfuse_{name}", self._abstract_values)
        self._inner = self._make_primitive(f"fedfuse_{name}_local", self._abstract_values_with_workspace)
        self._register_rules()
        OPERATIONS[name] = self

    def bind(self, operands: Operands, out_dtypes: Sequence[str], **attributes: Any) -> list[Array]:
        """Calls the operation on unbatched operands."""
        return self.bind_batched(operands, out_dtypes, 0, tuple(sorted(attributes.items())))

    def bind_batched(
        self, operands: Operands, out_dtypes: Sequence[str], batch_dims: int, attributes: tuple[tuple[str, Any], ...]
    ) -> list[Array]:
        """Calls the operation on operands that all have ``batch_dims`` leading axes of full size or 1."""
        declared = self.operands(attributes)
        present = tuple(spec.name for spec in declared if spec.optional and operands[spec.name] is not None)
        num_leaves = next((len(operands[spec.name]) for spec in declared if spec.per_leaf), 0)
        layout = Layout(num_leaves, batch_dims, present, tuple(out_dtypes), attributes)
        for name in self._aliased:
            operands = {**operands, name: jax.tree.map(internals.in_device_memory, operands[name])}
        return self._outer.bind(*_align_varying(self._flatten(operands, layout)), layout=layout)

    def run_local(self, operands: Operands, layout: Layout) -> list[Array]:
        """The kernel, or the definition, on this device alone: for use inside a partitioning rule."""
        return self._bind_inner(*self._flatten(operands, layout), layout=layout)

    # --- Reading the declaration -------------------------------------------------------------------------------

    def operands(self, attributes: tuple[tuple[str, Any], ...]) -> Sequence[Operand]:
        return self._operands(**dict(attributes)) if callable(self._operands) else self._operands

    def results(self, attributes: tuple[tuple[str, Any], ...]) -> Sequence[Operand]:
        return self._results(**dict(attributes)) if callable(self._results) else self._results

    def _present_operands(self, layout: Layout) -> list[Operand]:
        declared = self.operands(layout.attributes)
        return [spec for spec in declared if not spec.optional or spec.name in layout.optional]

    def _flatten(self, operands: Operands, layout: Layout) -> list[Any]:
        flat: list[Any] = []
        for spec in self._present_operands(layout):
            value = operands[spec.name]
            flat.extend(value if spec.per_leaf else [value])
        return flat

    def _unflatten(self, flat: Sequence[Any], layout: Layout) -> Operands:
        operands: Operands = {spec.name: None for spec in self.operands(layout.attributes)}
        position = 0
        for spec in self._present_operands(layout):
            if spec.per_leaf:
                operands[spec.name] = list(flat[position : position + layout.num_leaves])
                position += layout.num_leaves
            else:
                operands[spec.name] = flat[position]
                position += 1
        return operands

    def _axes(self, ndims: Sequence[int], layout: Layout) -> tuple[list[tuple[Axis, ...]], list[tuple[Axis, ...]]]:
        """The named axes of every flat operand and result, given the operands' numbers of dimensions."""
        batch = tuple(f"batch{i}" for i in range(layout.batch_dims))
        parameters: dict[int, tuple[Axis, ...]] = {}
        operand_axes: list[tuple[Axis, ...]] = []
        for spec in self._present_operands(layout):
            if not spec.per_leaf:
                operand_axes.append(batch + spec.axes)
                continue
            for leaf in range(layout.num_leaves):
                ndim = ndims[len(operand_axes)] - layout.batch_dims - len(spec.axes)
                parameters.setdefault(leaf, tuple(f"leaf{leaf}.axis{i}" for i in range(ndim)))
                operand_axes.append(batch + spec.axes + parameters[leaf])
        result_axes: list[tuple[Axis, ...]] = []
        for spec in self.results(layout.attributes):
            if spec.per_leaf:
                result_axes.extend(batch + spec.axes + parameters[leaf] for leaf in range(layout.num_leaves))
            else:
                result_axes.append(batch + spec.axes)
        return operand_axes, result_axes

    def _sizes(self, avals: Sequence[Any], operand_axes: Sequence[tuple[Axis, ...]], layout: Layout) -> dict[Axis, Any]:
        """The size of every axis. Operands must agree, but for batch axes, where size 1 means shared."""
        new_axes = dict(self._new_axes(**dict(layout.attributes))) if self._new_axes else {}
        sizes: dict[Axis, Any] = {axis: size for axis, size in new_axes.items() if not isinstance(size, str)}
        for aval, axes in zip(avals, operand_axes, strict=True):
            if len(aval.shape) != len(axes):
                raise ValueError(f"{self.name}: an operand of shape {aval.shape} does not have the axes {axes}.")
            for axis, size in zip(axes, aval.shape, strict=True):
                known = sizes.setdefault(axis, size)
                if axis.startswith("batch") and _is_one(known):
                    sizes[axis] = size
                elif not (axis.startswith("batch") and _is_one(size)) and known != size:
                    raise ValueError(f"{self.name}: axis {axis} has size {size} in one operand and {known} in another.")
        sizes.update({axis: sizes[model] for axis, model in new_axes.items() if isinstance(model, str)})
        return sizes

    # --- Rules of the primitives -------------------------------------------------------------------------------

    def _make_primitive(self, name: str, abstract_values: Callable[..., Any]) -> Any:
        primitive = internals.Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(internals.apply_primitive, primitive))
        primitive.def_abstract_eval(abstract_values)
        return primitive

    def _register_rules(self) -> None:
        batching.primitive_batchers[self._outer] = self._batch
        ad.primitive_jvps[self._outer] = self._differentiate
        if self._transpose is not None:
            ad.primitive_transposes[self._outer] = self._transpose_rule
        internals.needs_devices_to_lower(self._outer)
        mlir.register_lowering(self._outer, self._lower_outer)
        mlir.register_lowering(self._inner, self._lower_definition)
        for platform in ("cpu", "cuda"):
            if _native.has_kernel(self.name, platform):
                mlir.register_lowering(self._inner, self._lower_kernel, platform=platform)

    def _abstract_values(self, *avals: Any, layout: Layout) -> list[Any]:
        operand_axes, result_axes = self._axes([len(aval.shape) for aval in avals], layout)
        sizes = self._sizes(avals, operand_axes, layout)
        # On a mesh with Explicit axes a type says how it is sharded; results keep what their axes had.
        model = next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])
        spec_of: dict[Axis, Any] = {}
        for aval, axes in zip(avals, operand_axes, strict=True):
            for axis, entry in zip(axes, aval.sharding.spec, strict=False):
                if entry is not None:
                    spec_of.setdefault(axis, entry)
        values = []
        for axes, dtype in zip(result_axes, layout.out_dtypes, strict=True):
            spec = PartitionSpec(*_without_repeats([spec_of.get(axis) for axis in axes]))
            shape = tuple(sizes[axis] for axis in axes)
            sharding = model.sharding.update(spec=spec)
            value = model.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)
            # Wherever the operands are: what was offloaded to the host is read there.
            values.append(value.update(memory_space=jax.memory.Space.Device))
        return values

    def _abstract_values_with_workspace(self, *avals: Any, layout: Layout) -> list[Any]:
        values = self._abstract_values(*avals, layout=layout)
        if self._workspace is not None:
            operand_axes, _ = self._axes([len(aval.shape) for aval in avals], layout)
            shape = (self._workspace(self._sizes(avals, operand_axes, layout), layout),)
            sharding = values[0].sharding.update(spec=PartitionSpec(None))
            values.append(values[0].update(shape=shape, dtype=np.dtype(np.uint8), sharding=sharding))
        return values

    def _bind_inner(self, *flat: Array, layout: Layout) -> list[Array]:
        results = self._inner.bind(*_align_varying(flat), layout=layout)
        return results[:-1] if self._workspace is not None else results

    def _batch(self, flat: Sequence[Array], dims: Sequence[int | None], *, layout: Layout) -> tuple[Any, Any]:
        if layout.batch_dims == MAX_BATCH_DIMS:
            raise NotImplementedError(f"{self.name}: at most {MAX_BATCH_DIMS} nested vmaps are supported.")
        moved = [
            jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(flat, dims, strict=True)
        ]
        layout = layout._replace(batch_dims=layout.batch_dims + 1)
        operands = self._unflatten(moved, layout)
        if self._aliased:
            # A result that takes an operand's buffer needs one of full size.
            operand_axes, _ = self._axes([x.ndim for x in moved], layout)
            sizes = self._sizes(moved, operand_axes, layout)
            batch = tuple(sizes[f"batch{i}"] for i in range(layout.batch_dims))
            for name in self._aliased:
                operands[name] = jax.tree.map(
                    lambda x: jnp.broadcast_to(x, batch + x.shape[layout.batch_dims :]), operands[name]
                )
        results = self._outer.bind(*_align_varying(self._flatten(operands, layout)), layout=layout)
        return results, [0] * len(results)

    def _differentiate(self, flat: Sequence[Any], tangents: Sequence[Any], *, layout: Layout) -> tuple[Any, Any]:
        results = self._outer.bind(*flat, layout=layout)
        known = [None if type(t) is ad.Zero else t for t in tangents]
        tangents_out: list[Any] = [None] * len(results)
        if self._jvp is not None:
            call = BoundCall(self, layout, results)
            primals = [internals.in_device_memory(x) for x in flat]
            known = [None if t is None else internals.in_device_memory(t) for t in known]
            tangents_out = self._jvp(call, self._unflatten(primals, layout), self._unflatten(known, layout))
        zeros = [internals.zero_tangent(result) for result in results]
        return results, [zero if t is None else t for zero, t in zip(zeros, tangents_out, strict=True)]

    def _transpose_rule(self, cotangents: Sequence[Any], *flat: Any, layout: Layout) -> list[Any]:
        known = [None if type(ct) is ad.Zero else ct for ct in cotangents]
        if all(ct is None for ct in known):
            return [None] * len(flat)
        full = [ad.instantiate_zeros(ct) for ct in cotangents]
        assert self._transpose is not None
        known_operands = [x if ad.is_undefined_primal(x) else internals.in_device_memory(x) for x in flat]
        by_operand = self._transpose(BoundCall(self, layout, None), full, self._unflatten(known_operands, layout))
        nothing = self._unflatten([None] * len(flat), layout)
        wanted = self._flatten({**nothing, **by_operand}, layout)
        return [
            _sum_shared(ct, x.aval, layout.batch_dims) if ad.is_undefined_primal(x) else None
            for ct, x in zip(wanted, flat, strict=True)
        ]

    # --- Lowering ----------------------------------------------------------------------------------------------

    def _lower_outer(self, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
        avals_in: Sequence[Any] = ctx.avals_in
        shardings = [aval.sharding for aval in avals_in if internals.explicit_axes(aval.sharding.mesh)]
        sharded = [sharding for sharding in shardings if any(entry is not None for entry in sharding.spec)]
        if sharded:
            run = self._shard_map(sharded[0].mesh, ctx.avals_out, layout)
        elif internals.lowers_for_many_devices(ctx):
            run = self._partition(layout)
        else:
            run = functools.partial(self._bind_inner, layout=layout)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)

    def _lower_kernel(self, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
        attributes: dict[str, Any] = {name: _as_attribute(value) for name, value in layout.attributes}
        attributes["batch_dims"] = np.int32(layout.batch_dims)
        attributes["num_leaves"] = np.int32(layout.num_leaves)
        for spec in self.operands(layout.attributes):
            if spec.optional:
                attributes[f"has_{spec.name}"] = np.bool_(spec.name in layout.optional)
        operands = _positions(self._present_operands(layout), layout.num_leaves)
        results = _positions(self.results(layout.attributes), layout.num_leaves)
        aliases = {
            operand: result
            for name in self._aliased
            for operand, result in zip(operands[name], results[name], strict=True)
        }
        # For each operand of a call without side effects XLA asks whether what makes it may be fused into the call, and
        # where results take operands' buffers an answer costs the square of the leaves: minutes for a thousand. Its
        # partitioner, though, refuses calls with side effects.
        is_opaque = bool(aliases) and internals.is_code_of_one_device(ctx)
        lower = jax.ffi.ffi_lowering(self.target, operand_output_aliases=aliases or None, has_side_effect=is_opaque)
        return lower(ctx, *flat, **attributes)

    def _lower_definition(self, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
        _native.say_once_that_definitions_run(ctx.module_context.platforms)

        def run(*flat: Array) -> list[Array]:
            with internals.keeping_types(flat):
                results = self._define(flat, layout)
            if self._workspace is not None:
                results.append(jnp.zeros(ctx.avals_out[-1].shape, np.uint8))
            return results

        return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)

    def _define(self, flat: Sequence[Array], layout: Layout) -> list[Array]:
        """The definition, mapped over the batch axes."""

        def unbatched(*flat: Array) -> list[Array]:
            operands = self._unflatten([internals.in_device_memory(x) for x in flat], layout)
            return list(self._definition(out_dtypes=layout.out_dtypes, **operands, **dict(layout.attributes)))

        run = unbatched
        for depth in reversed(range(layout.batch_dims)):
            # Axes before `depth` are gone when this map sees its operands.
            sizes = [x.shape[depth] for x in flat]
            run = _map_leading_axis(run, sizes)
        return run(*flat)

    # --- Sharding ----------------------------------------------------------------------------------------------

    def _partition(self, layout: Layout) -> Callable[..., Any]:
        """The operation wrapped so that XLA's partitioner asks us instead of gathering everything."""

        @internals.custom_partitioning
        def run(*flat: Array) -> list[Array]:
            return self._bind_inner(*flat, layout=layout)

        def partition(mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
            specs = [arg.sharding.spec if isinstance(arg.sharding, NamedSharding) else () for arg in arg_shapes]
            plan = self._plan(mesh, [arg.shape for arg in arg_shapes], specs, layout)
            results = [NamedSharding(mesh, spec) for spec in plan.result_specs]
            return mesh, plan.run, results, tuple(NamedSharding(mesh, spec) for spec in plan.operand_specs)

        def rule(mesh: Any, value_types: Any, result_types: Any) -> Any:
            operand_axes, result_axes = self._axes([len(t.shape) for t in value_types], layout)
            return _shardy_rule(value_types, operand_axes, result_types, result_axes)

        run.def_partition(partition=partition, sharding_rule=rule)
        return run

    def _shard_map(self, mesh: Any, avals_out: Sequence[Any], layout: Layout) -> Callable[..., Any]:
        """The operation as a ``shard_map`` over the Explicit axes of ``mesh``, by the operands' own types."""

        def run(*flat: Array) -> list[Array]:
            plan = self._plan(mesh, [x.shape for x in flat], [jax.typeof(x).sharding.spec for x in flat], layout)
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
            return [
                internals.resharded(x, mesh, aval.sharding.spec) for x, aval in zip(results, avals_out, strict=True)
            ]

        return run

    def _plan(self, mesh: Any, shapes: Sequence[Any], specs: Sequence[Any], layout: Layout) -> ShardingPlan:
        """How the operands are to lie on the mesh, what every device does, and how the results lie then."""
        operand_axes, result_axes = self._axes([len(shape) for shape in shapes], layout)
        mesh_axes = self._choose_mesh_axes(mesh, shapes, specs, operand_axes)
        # Different operands may ask for one mesh axis for two axes of a third, or of a result: the first keeps it.
        for axes in (*operand_axes, *result_axes):
            kept = _without_repeats([mesh_axes.get(axis, ()) for axis in axes])
            mesh_axes.update({axis: _as_tuple(entry) for axis, entry in zip(axes, kept, strict=True)})

        def run(*flat: Array) -> list[Array]:
            share = self._partitioned or self.run_partitioned
            # XLA asks for this from a thread of its own, where a context manager of the user's has no effect.
            with internals.keeping_types(flat):
                return share(BoundCall(self, layout, None), self._unflatten(flat, layout), mesh_axes)

        operand_specs = [_spec(shape, axes, mesh_axes) for shape, axes in zip(shapes, operand_axes, strict=True)]
        result_specs = [_spec(None, axes, mesh_axes) for axes in result_axes]
        return ShardingPlan(operand_specs, result_specs, run)

    def _choose_mesh_axes(
        self, mesh: Any, shapes: Sequence[Any], specs: Sequence[Any], operand_axes: Sequence[tuple[Axis, ...]]
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
                names = tuple(name for name in _as_tuple(entry) if name not in used)
                # Uneven shards would be padded, and a sum over coordinates must not see padding.
                chosen[axis] = names if size % _num_shards(mesh, names) == 0 else ()
                used.update(chosen[axis])
        for axis in self._whole_axes:
            freed = chosen.get(axis, ())
            chosen[axis] = ()
            if freed:
                self._spread_over_parameters(freed, mesh, shapes, operand_axes, chosen)
        return chosen

    def _spread_over_parameters(
        self,
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

    def run_partitioned(self, call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
        """One device's share, and the collectives that make it whole."""
        if self._reduce is None:
            return call.run_local(operands)
        if call.layout.num_leaves == 0:
            return self._sum_over_lost_axes(call, operands, mesh_axes)
        shards = self.shards_of_leaves(call.layout, operands, mesh_axes)
        reduction = REDUCTIONS[self._reduce]
        parts: list[list[Array]] = []
        for leaves, counts in shards.groups:
            part = call.run_local(call.restrict(operands, leaves), num_leaves=len(leaves))
            parts.append([jnp.where(counts(), reduction.summand(x), 0) for x in part])
        names = shards.names
        totals = [
            lax.psum(sum(xs[1:], xs[0]), names) if names else sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True)
        ]
        return [reduction.result(total) for total in totals]

    def _sum_over_lost_axes(self, call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
        """Partial results of an operation without leaves, summed over every sharded axis that no result has."""
        operand_axes, result_axes = self._axes([x.ndim for x in self._flatten(operands, call.layout)], call.layout)
        lost = {axis for axes in operand_axes for axis in axes} - {axis for axes in result_axes for axis in axes}
        names = tuple(sorted({name for axis in lost for name in mesh_axes.get(axis, ())}))
        return [lax.psum(part, names) if names else part for part in call.run_local(operands)]

    def shards_of_leaves(
        self, layout: Layout, operands: Operands, mesh_axes: Mapping[Axis, MeshAxes]
    ) -> ShardsOfLeaves:
        """The leaves by the mesh axes that their parameters are sharded over."""
        operand_axes, _ = self._axes([x.ndim for x in self._flatten(operands, layout)], layout)
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


# --- Reductions over devices --------------------------------------------------------------------------------------


class Reduction(NamedTuple):
    """How partial results become one by a sum over devices: what is summed, and what the sum means."""

    summand: Callable[[Array], Array]
    result: Callable[[Array], Array]


def _norm_summand(norms: Array) -> Array:
    """The squares of large, middling and small norms apart, each scaled so that no square leaves the range."""
    bound, scale = _norm_scales(norms.dtype)
    large, small = norms > bound, norms < 1 / bound
    middling = ~(large | small)  # and NaN
    return jnp.stack(
        [
            jnp.where(large, norms / scale, 0) ** 2,
            jnp.where(middling, norms, 0) ** 2,
            jnp.where(small, norms * scale, 0) ** 2,
        ]
    )


def _norm_result(squares: Array) -> Array:
    """The square root of the sum of what :func:`_norm_summand` took apart.

    The three become norms first, and are added relative to the largest: no two constants meet, of which a compiler
    could make one beyond the range.
    """
    _, scale = _norm_scales(squares.dtype)
    units = jnp.array([scale, 1, 1 / scale], squares.dtype).reshape(-1, *[1] * (squares.ndim - 1))
    # No square root of 0, of which there is no derivative.
    nothing = squares == 0
    norms = jnp.where(nothing, 0, units * jnp.sqrt(jnp.where(nothing, 1, squares)))
    largest = jnp.max(norms, axis=0)
    is_measured = jnp.isfinite(largest) & (largest > 0)
    unit = reference.power_of_two_near(jnp.where(is_measured, largest, 1))
    total = jnp.where(is_measured, jnp.sum((norms / unit) ** 2, axis=0), 1)
    # Infinities and NaNs, which have no unit, are added as they are.
    return jnp.where(is_measured, unit * jnp.sqrt(total), jnp.sum(norms, axis=0))


def _norm_scales(dtype: Any) -> tuple[float, float]:
    range_exponent = int(jnp.finfo(dtype).maxexp)
    return 2.0 ** (7 * range_exponent // 16), 2.0 ** (9 * range_exponent // 16)


REDUCTIONS = {
    "sum": Reduction(lambda x: x, lambda total: total),
    "all": Reduction(lambda x: (~x).astype(jnp.int32), lambda total: total == 0),
    "norm": Reduction(_norm_summand, _norm_result),
}


def all_reduce(kind: str, value: Array, axis_name: Any) -> Array:
    """Makes one result of every device's own, inside a ``shard_map``."""
    reduction = REDUCTIONS[kind]
    return reduction.result(lax.psum(reduction.summand(value), axis_name))


class ShardsOfLeaves(NamedTuple):
    """Leaves sharded alike, whether this device's share of them counts, and all mesh axes they are sharded over."""

    groups: list[tuple[list[int], Callable[[], Any]]]
    names: MeshAxes


class ShardingPlan(NamedTuple):
    """What partitioning needs to know: where operands and results lie, and one device's share of the work."""

    operand_specs: list[PartitionSpec]
    result_specs: list[PartitionSpec]
    run: Callable[..., list[Array]]


OPERATIONS: dict[str, Operation] = globals().get("OPERATIONS", {})  # the same one if this module is loaded anew


class BoundCall(NamedTuple):
    """What a derivative or partitioning rule gets to know of the call it stands for."""

    operation: Operation
    layout: Layout
    results: list[Array] | None  # the call's own results, in a derivative rule

    @property
    def batch_dims(self) -> int:
        return self.layout.batch_dims

    def bind(
        self, operation: Operation, operands: Operands, out_dtypes: Sequence[str], **attributes: Any
    ) -> list[Array]:
        """Calls another operation on operands with this call's batch axes."""
        return operation.bind_batched(operands, out_dtypes, self.batch_dims, tuple(sorted(attributes.items())))

    def run_local(self, operands: Operands, **changes: Any) -> list[Array]:
        """The kernel (or definition) on this device's shard; ``changes`` replace fields of the layout."""
        return self.operation.run_local(operands, self.layout._replace(**changes))

    def restrict(self, operands: Operands, leaves: Sequence[int]) -> Operands:
        """The operands of some of the leaves alone."""
        return {
            name: [value[leaf] for leaf in leaves] if isinstance(value, list) else value
            for name, value in operands.items()
        }

    def per_client(self, vector: Array, ndim: int) -> Array:
        """Reshapes ``(*batch, n_clients)`` to broadcast against a client-stacked leaf of ``ndim`` dimensions."""
        return vector.reshape(vector.shape + (1,) * (ndim - vector.ndim))

    def scalar(self, value: Array, ndim: int) -> Array:
        """Reshapes ``(*batch,)`` to broadcast against an array of ``ndim`` dimensions."""
        return value.reshape(value.shape + (1,) * (ndim - value.ndim))

    def over_clients(self, leaf: Array) -> Array:
        """Gives ``(*batch, *parameters)`` a client axis of size 1."""
        return jnp.expand_dims(leaf, self.batch_dims)


def leaf_of(axis: Axis) -> int | None:
    """Which leaf a parameter axis is of."""
    leaf, dot, _ = axis.partition(".")
    return int(leaf.removeprefix("leaf")) if dot else None


def coordinates_of_leaves(sizes: Mapping[Axis, Any], num_leaves: int) -> list[Any]:
    """How many coordinates each leaf has, by one pass over the sizes of all axes."""
    coordinates: list[Any] = [1] * num_leaves
    for axis, size in sizes.items():
        if (leaf := leaf_of(axis)) is not None:
            coordinates[leaf] = coordinates[leaf] * size
    return coordinates


def _is_first_along(names: Sequence[str]) -> Any:
    """Whether this device is the first along these mesh axes: what several hold alike then counts once."""
    return sum(lax.axis_index(name) for name in names) == 0


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _positions(specs: Sequence[Operand], num_leaves: int) -> dict[str, range]:
    """Where each operand, or result, lies in the flat list."""
    positions: dict[str, range] = {}
    begin = 0
    for spec in specs:
        positions[spec.name] = range(begin, begin + (num_leaves if spec.per_leaf else 1))
        begin = positions[spec.name].stop
    return positions


def _as_tuple(entry: Any) -> MeshAxes:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _without_repeats(entries: Sequence[Any]) -> list[Any]:
    """A spec may name a mesh axis once: later repetitions are dropped."""
    seen: set[str] = set()
    kept: list[Any] = []
    for entry in entries:
        names = tuple(name for name in _as_tuple(entry) if name not in seen)
        seen.update(names)
        kept.append(None if not names else names if len(names) > 1 else names[0])
    return kept


def _num_shards(mesh: Any, names: MeshAxes) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _spec(shape: Sequence[int] | None, axes: Sequence[Axis], mesh_axes: Mapping[Axis, MeshAxes]) -> PartitionSpec:
    """The spec of an array with the given axes; an axis of size 1 (a shared batch axis, say) is not sharded."""
    sizes = shape if shape is not None else (None,) * len(axes)
    entries = [None if size == 1 else mesh_axes.get(axis, ()) or None for axis, size in zip(axes, sizes, strict=True)]
    return PartitionSpec(*_without_repeats(entries))


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


def _align_varying(flat: Sequence[Array]) -> list[Array]:
    """Inside ``shard_map``, operands of one primitive vary over the same mesh axes."""
    axes: frozenset[Any] = frozenset().union(*(internals.varying_axes(x) for x in flat))
    return [internals.as_varying(x, axes) for x in flat]


def _map_leading_axis(run: Callable[..., list[Array]], sizes: Sequence[Any]) -> Callable[..., list[Array]]:
    """``vmap`` over the leading axis, where size 1 means shared."""
    batch = next((size for size in sizes if not _is_one(size)), 1)
    in_axes = [None if _is_one(size) and not _is_one(batch) else 0 for size in sizes]

    def mapped(*flat: Array) -> list[Array]:
        squeezed = [x[0] if axis is None else x for x, axis in zip(flat, in_axes, strict=True)]
        return jax.vmap(run, in_axes=in_axes)(*squeezed)

    return mapped


def _sum_shared(cotangent: Array, aval: Any, batch_dims: int) -> Array:
    """Sums a cotangent over the batch axes along which the operand was shared."""
    shared = tuple(i for i in range(batch_dims) if _is_one(aval.shape[i]) and not _is_one(cotangent.shape[i]))
    if shared:
        cotangent = jnp.sum(cotangent, axis=shared, keepdims=True)
    cotangent = internals.with_sharding_of(aval, cotangent.astype(aval.dtype))
    return internals.in_memory_of(aval.memory_space, cotangent)


def _as_attribute(value: Any) -> Any:
    """FFI attributes: Python's int and float would become 64 bits wide whatever the handler expects."""
    if isinstance(value, bool):
        return np.bool_(value)
    return np.int32(value) if isinstance(value, int) else value
