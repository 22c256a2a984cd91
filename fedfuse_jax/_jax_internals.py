"""Everything the package uses of JAX that JAX does not promise to keep. No other file may import such things.

The tests import this file under the oldest and the newest supported JAX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax._src import core, dispatch
from jax._src.export import _export
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.extend.random import threefry2x32_p
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "ArrayMapping",
    "Primitive",
    "SdyShardingRule",
    "ad",
    "apply_primitive",
    "as_varying",
    "batching",
    "bound_axes",
    "custom_partitioning",
    "explicit_axes",
    "flattened",
    "in_device_memory",
    "in_memory_of",
    "is_code_of_one_device",
    "is_known",
    "keeping_types",
    "lowers_for_many_devices",
    "mlir",
    "needs_devices_to_lower",
    "register_namedtuple_serialization",
    "replicated",
    "resharded",
    "threefry_bits",
    "threefry_is_partitionable",
    "varying_axes",
    "with_sharding_of",
    "zero_tangent",
]

apply_primitive = dispatch.apply_primitive


def needs_devices_to_lower(primitive: Primitive) -> None:
    """Says that lowering ``primitive`` may meet ``custom_partitioning``, which wants to know the devices."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def lowers_for_many_devices(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA's partitioner will split what is lowered in ``ctx`` over several devices.

    Not inside a fully manual ``shard_map`` (the code already is one device's), not on a mesh with Explicit axes
    (types say what is sharded there), not in an export, where a Python callback cannot travel along, and not where
    the devices are not known: JAX looks for primitives that ask for them, but not inside other primitives' lowerings.
    """
    module = ctx.module_context
    if module.lowering_parameters.for_export or explicit_axes(jax.sharding.get_abstract_mesh()):
        return False
    context = module.axis_context
    if isinstance(context, SPMDAxisContext):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return isinstance(context, ShardingContext) and context.num_devices > 1 and context.device_assignment is not None


def is_code_of_one_device(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA's partitioner leaves what is lowered in ``ctx`` alone: on one device, or all mesh axes are manual."""
    context = ctx.module_context.axis_context
    if isinstance(context, SPMDAxisContext):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return isinstance(context, ShardingContext) and context.num_devices == 1


def keeping_types(values: Sequence[Any]) -> AbstractContextManager[Any]:
    """A context in which what is computed from ``values`` keeps their types, of 64 bits as well."""
    is_wide = any(value.dtype == np.float64 for value in values)
    return jax.enable_x64(True) if is_wide else contextlib.nullcontext()


def in_device_memory(value: Any) -> Any:
    """``value``, moved if it was offloaded to the host's memory: JAX computes nothing from arrays in two memories."""
    return in_memory_of(jax.memory.Space.Device, value)


def in_memory_of(space: Any, value: Any) -> Any:
    """``value`` in a memory space."""
    return value if jax.typeof(value).memory_space == space else jax.device_put(value, space)


def is_known(compare: Callable[[], bool]) -> bool:
    """Whether a comparison of sizes, symbolic ones perhaps, can be told."""
    try:
        compare()
    except core.InconclusiveDimensionOperation:
        return False
    return True


def register_namedtuple_serialization(kind: type, name: str) -> None:
    """Lets an exported program take and return a ``kind``; that of a module loaded anew takes the place of the old."""
    _export.deserialization_registry.pop(name, None)
    _export.register_namedtuple_serialization(kind, serialized_name=name)


def bound_axes() -> tuple[Any, ...]:
    """The names over which collectives may reduce where this is traced."""
    return core.get_axis_env().axis_names()


def varying_axes(value: Any) -> frozenset[Any]:
    """The manual mesh axes over which ``value`` differs from device to device inside a ``shard_map``."""
    aval = jax.typeof(value)
    manual = getattr(aval, "mat", None)  # JAX ≥ 0.10; before, the set hung on the type itself
    return aval.vma if manual is None else manual.varying


def as_varying(value: Any, axes: frozenset[Any]) -> Any:
    """``value``, marked as varying over ``axes`` (its cotangent will be summed over them)."""
    missing = tuple(sorted(axes - varying_axes(value), key=str))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # type: ignore[attr-defined]  # JAX < 0.9


def threefry_is_partitionable() -> bool:
    """Whether JAX counts the elements of a random array by their index, as our kernels do."""
    return bool(jax.config.jax_threefry_partitionable)  # type: ignore[attr-defined]


def threefry_bits(key: Any, high: Any, low: Any) -> Any:
    """The 32 random bits that a Threefry key, two words, has for each counter of two words."""
    operands = jax.numpy.broadcast_arrays(key[0], key[1], high, low)
    first, second = threefry2x32_p.bind(*operands)
    return first ^ second


def zero_tangent(value: Any) -> ad.Zero:
    """The symbolic zero tangent of ``value`` (of dtype float0 for integers and booleans)."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def explicit_axes(mesh: Any) -> frozenset[Any]:
    """The axes of ``mesh`` whose shardings are part of types."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True) if not mesh.empty else ()
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def resharded(value: Any, mesh: Any, spec: Any) -> Any:
    """``value`` with the type that ``spec`` gives it on a mesh with Explicit axes; elsewhere, ``value``."""
    sharding = jax.typeof(value).sharding
    if not explicit_axes(mesh) or (sharding.mesh == mesh and sharding.spec == spec):
        return value
    return jax.sharding.reshard(value, NamedSharding(mesh, spec))


def replicated(value: Any) -> Any:
    """``value``, whole on every device of a mesh with Explicit axes; elsewhere, ``value``."""
    return resharded(value, jax.typeof(value).sharding.mesh, PartitionSpec(*[None] * value.ndim))


def flattened(value: Any) -> Any:
    """``value`` as a vector, sharded as its axes are where types say so (of merged axes, the leading ones at most)."""
    sharding = jax.typeof(value).sharding
    if not explicit_axes(sharding.mesh):
        return value.reshape(-1)
    names = [name for entry in sharding.spec if entry is not None for name in _as_tuple(entry)]
    spec = jax.sharding.PartitionSpec(tuple(names) or None)
    return jax.numpy.reshape(value, -1, out_sharding=NamedSharding(sharding.mesh, spec))


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def with_sharding_of(aval: Any, value: Any) -> Any:
    """A cotangent with the sharding that its primal's type asks for."""
    mesh = jax.typeof(value).sharding.mesh if aval.sharding.mesh.empty else aval.sharding.mesh
    return resharded(value, mesh, aval.sharding.spec)
