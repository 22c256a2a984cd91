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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import _native
from fedfuse_jax._core.bound_call import BoundCall
from fedfuse_jax._core.declaration import (
    MAX_BATCH_DIMS,
    Axis,
    Declaration,
    Layout,
    Operand,
    Operands,
    is_one,
)
from fedfuse_jax._core.lowering import lower_definition, lower_kernel
from fedfuse_jax._core.sharding import lower_for_devices, without_repeats
from fedfuse_jax._jax_internals import ad, batching, mlir


class Operation(Declaration):
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
        super().__init__(name, operands, results, new_axes)
        self.target = f"fedfuse.{name}.v1"
        self.definition = definition
        self.whole_axes, self.reduce, self.partitioned = whole_axes, reduce, partitioned
        self._jvp, self._transpose = jvp, transpose
        self.aliased, self.workspace = aliased, workspace
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
        for name in self.aliased:
            operands = {**operands, name: jax.tree.map(internals.in_device_memory, operands[name])}
        return self._outer.bind(*align_varying(self.flatten(operands, layout)), layout=layout)

    def run_local(self, operands: Operands, layout: Layout) -> list[Array]:
        """The kernel, or the definition, on this device alone: for use inside a partitioning rule."""
        return self.bind_inner(*self.flatten(operands, layout), layout=layout)

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
        mlir.register_lowering(self._outer, functools.partial(lower_for_devices, self))
        mlir.register_lowering(self._inner, functools.partial(lower_definition, self))
        for platform in ("cpu", "cuda"):
            if _native.has_kernel(self.name, platform):
                mlir.register_lowering(self._inner, functools.partial(lower_kernel, self), platform=platform)

    def _abstract_values(self, *avals: Any, layout: Layout) -> list[Any]:
        operand_axes, result_axes = self.axes([len(aval.shape) for aval in avals], layout)
        sizes = self.sizes(avals, operand_axes, layout)
        # On a mesh with Explicit axes a type says how it is sharded; results keep what their axes had.
        model = next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])
        spec_of: dict[Axis, Any] = {}
        for aval, axes in zip(avals, operand_axes, strict=True):
            for axis, entry in zip(axes, aval.sharding.spec, strict=False):
                if entry is not None:
                    spec_of.setdefault(axis, entry)
        values = []
        for axes, dtype in zip(result_axes, layout.out_dtypes, strict=True):
            spec = PartitionSpec(*without_repeats([spec_of.get(axis) for axis in axes]))
            shape = tuple(sizes[axis] for axis in axes)
            sharding = model.sharding.update(spec=spec)
            value = model.update(shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=sharding)
            # Wherever the operands are: what was offloaded to the host is read there.
            values.append(value.update(memory_space=jax.memory.Space.Device))
        return values

    def _abstract_values_with_workspace(self, *avals: Any, layout: Layout) -> list[Any]:
        values = self._abstract_values(*avals, layout=layout)
        if self.workspace is not None:
            operand_axes, _ = self.axes([len(aval.shape) for aval in avals], layout)
            shape = (self.workspace(self.sizes(avals, operand_axes, layout), layout),)
            sharding = values[0].sharding.update(spec=PartitionSpec(None))
            values.append(values[0].update(shape=shape, dtype=np.dtype(np.uint8), sharding=sharding))
        return values

    def bind_inner(self, *flat: Array, layout: Layout) -> list[Array]:
        results = self._inner.bind(*align_varying(flat), layout=layout)
        return results[:-1] if self.workspace is not None else results

    def _batch(self, flat: Sequence[Array], dims: Sequence[int | None], *, layout: Layout) -> tuple[Any, Any]:
        if layout.batch_dims == MAX_BATCH_DIMS:
            raise NotImplementedError(f"{self.name}: at most {MAX_BATCH_DIMS} nested vmaps are supported.")
        moved = [
            jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(flat, dims, strict=True)
        ]
        layout = layout._replace(batch_dims=layout.batch_dims + 1)
        operands = self.unflatten(moved, layout)
        if self.aliased:
            # A result that takes an operand's buffer needs one of full size.
            operand_axes, _ = self.axes([x.ndim for x in moved], layout)
            sizes = self.sizes(moved, operand_axes, layout)
            batch = tuple(sizes[f"batch{i}"] for i in range(layout.batch_dims))
            for name in self.aliased:
                operands[name] = jax.tree.map(
                    lambda x: jnp.broadcast_to(x, batch + x.shape[layout.batch_dims :]), operands[name]
                )
        results = self._outer.bind(*align_varying(self.flatten(operands, layout)), layout=layout)
        return results, [0] * len(results)

    def _differentiate(self, flat: Sequence[Any], tangents: Sequence[Any], *, layout: Layout) -> tuple[Any, Any]:
        results = self._outer.bind(*flat, layout=layout)
        known = [None if type(t) is ad.Zero else t for t in tangents]
        tangents_out: list[Any] = [None] * len(results)
        if self._jvp is not None:
            call = BoundCall(self, layout, results)
            primals = [internals.in_device_memory(x) for x in flat]
            known = [None if t is None else internals.in_device_memory(t) for t in known]
            tangents_out = self._jvp(call, self.unflatten(primals, layout), self.unflatten(known, layout))
        zeros = [internals.zero_tangent(result) for result in results]
        return results, [zero if t is None else t for zero, t in zip(zeros, tangents_out, strict=True)]

    def _transpose_rule(self, cotangents: Sequence[Any], *flat: Any, layout: Layout) -> list[Any]:
        known = [None if type(ct) is ad.Zero else ct for ct in cotangents]
        if all(ct is None for ct in known):
            return [None] * len(flat)
        full = [ad.instantiate_zeros(ct) for ct in cotangents]
        assert self._transpose is not None
        known_operands = [x if ad.is_undefined_primal(x) else internals.in_device_memory(x) for x in flat]
        by_operand = self._transpose(BoundCall(self, layout, None), full, self.unflatten(known_operands, layout))
        nothing = self.unflatten([None] * len(flat), layout)
        wanted = self.flatten({**nothing, **by_operand}, layout)
        return [
            _sum_shared(ct, x.aval, layout.batch_dims) if ad.is_undefined_primal(x) else None
            for ct, x in zip(wanted, flat, strict=True)
        ]


OPERATIONS: dict[str, Operation] = globals().get("OPERATIONS", {})  # the same one if this module is loaded anew


def align_varying(flat: Sequence[Array]) -> list[Array]:
    """Inside ``shard_map``, operands of one primitive vary over the same mesh axes."""
    axes: frozenset[Any] = frozenset().union(*(internals.varying_axes(x) for x in flat))
    return [internals.as_varying(x, axes) for x in flat]


def _sum_shared(cotangent: Array, aval: Any, batch_dims: int) -> Array:
    """Sums a cotangent over the batch axes along which the operand was shared."""
    shared = tuple(i for i in range(batch_dims) if is_one(aval.shape[i]) and not is_one(cotangent.shape[i]))
    if shared:
        cotangent = jnp.sum(cotangent, axis=shared, keepdims=True)
    cotangent = internals.with_sharding_of(aval, cotangent.astype(aval.dtype))
    return internals.in_memory_of(aval.memory_space, cotangent)
