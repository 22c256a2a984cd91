"""From a bound operation to one custom call, or to its definition where no kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import _native
from fedfuse_jax._core.declaration import (
    Layout,
    Operand,
    is_one,
)
from fedfuse_jax._jax_internals import mlir

if TYPE_CHECKING:
    from fedfuse_jax._core.operation import Operation


def lower_kernel(operation: Operation, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
    attributes: dict[str, Any] = {name: as_attribute(value) for name, value in layout.attributes}
    attributes["batch_dims"] = np.int32(layout.batch_dims)
    attributes["num_leaves"] = np.int32(layout.num_leaves)
    for spec in operation.operands(layout.attributes):
        if spec.optional:
            attributes[f"has_{spec.name}"] = np.bool_(spec.name in layout.optional)
    operands = _positions(operation.present_operands(layout), layout.num_leaves)
    results = _positions(operation.results(layout.attributes), layout.num_leaves)
    aliases = {
        operand: result
        for name in operation.aliased
        for operand, result in zip(operands[name], results[name], strict=True)
    }
    # For each operand of a call without side effects XLA asks whether what makes it may be fused into the call, and
    # where results take operands' buffers an answer costs the square of the leaves: minutes for a thousand. Its
    # partitioner, though, refuses calls with side effects.
    is_opaque = bool(aliases) and internals.is_code_of_one_device(ctx)
    lower = jax.ffi.ffi_lowering(operation.target, operand_output_aliases=aliases or None, has_side_effect=is_opaque)
    return lower(ctx, *flat, **attributes)


def lower_definition(operation: Operation, ctx: mlir.LoweringRuleContext, *flat: Any, layout: Layout) -> Any:
    _native.say_once_that_definitions_run(ctx.module_context.platforms)

    def run(*flat: Array) -> list[Array]:
        with internals.keeping_types(flat):
            results = define(operation, flat, layout)
        if operation.workspace is not None:
            results.append(jnp.zeros(ctx.avals_out[-1].shape, np.uint8))
        return results

    return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)


def define(operation: Operation, flat: Sequence[Array], layout: Layout) -> list[Array]:
    """The definition, mapped over the batch axes."""

    def unbatched(*flat: Array) -> list[Array]:
        operands = operation.unflatten([internals.in_device_memory(x) for x in flat], layout)
        return list(operation.definition(out_dtypes=layout.out_dtypes, **operands, **dict(layout.attributes)))

    run = unbatched
    for depth in reversed(range(layout.batch_dims)):
        # Axes before `depth` are gone when this map sees its operands.
        sizes = [x.shape[depth] for x in flat]
        run = _map_leading_axis(run, sizes)
    return run(*flat)


def _positions(specs: Sequence[Operand], num_leaves: int) -> dict[str, range]:
    """Where each operand, or result, lies in the flat list."""
    positions: dict[str, range] = {}
    begin = 0
    for spec in specs:
        positions[spec.name] = range(begin, begin + (num_leaves if spec.per_leaf else 1))
        begin = positions[spec.name].stop
    return positions


def _map_leading_axis(run: Callable[..., list[Array]], sizes: Sequence[Any]) -> Callable[..., list[Array]]:
    """``vmap`` over the leading axis, where size 1 means shared."""
    batch = next((size for size in sizes if not is_one(size)), 1)
    in_axes = [None if is_one(size) and not is_one(batch) else 0 for size in sizes]

    def mapped(*flat: Array) -> list[Array]:
        squeezed = [x[0] if axis is None else x for x, axis in zip(flat, in_axes, strict=True)]
        return jax.vmap(run, in_axes=in_axes)(*squeezed)

    return mapped


def as_attribute(value: Any) -> Any:
    """FFI attributes: Python's int and float would become 64 bits wide whatever the handler expects."""
    if isinstance(value, bool):
        return np.bool_(value)
    return np.int32(value) if isinstance(value, int) else value
