"""Clipped and noisy sums as primitives, and the noise that each device makes of its own coordinates."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._core import Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax._core.sharding import run_partitioned
from fedfuse_jax._primitives.linear import WEIGHTED_SUM
from fedfuse_jax._primitives.norms import CLIENT_NORMS, norm_slopes, norms_workspace


def _operands(clip: bool, noise: bool) -> tuple[Operand, ...]:
    operands = [Operand("updates", ("clients",), per_leaf=True), Operand("weights", ("clients",))]
    if clip:
        operands += [Operand("max_norm"), Operand("given_norms", ("clients",), optional=True)]
    operands.append(Operand("where", ("clients",), optional=True))
    if noise:
        # Of each leaf, Threefry's two words; and where this device's block of it lies, see _blocks.
        operands += [Operand("keys", ("leaves", "words")), Operand("stddev")]
        operands.append(Operand("blocks", ("leaves", "levels", "extents"), optional=True))
    return tuple(operands)


def _results(clip: bool, noise: bool) -> tuple[Operand, ...]:
    norms = (Operand("norms", ("clients",)),) if clip else ()
    return (*norms, Operand("reduced", per_leaf=True))


def _workspace(sizes: Any, layout: Any) -> Any:
    """The norms' workspace, and two float64 for every client's clip factor."""
    factors = 16 * sizes["clients"]
    for i in range(layout.batch_dims):
        factors = factors * sizes[f"batch{i}"]
    return norms_workspace(sizes, layout) + factors


def _definition(
    *,
    updates: Any,
    weights: Any,
    where: Any,
    out_dtypes: Any,
    clip: bool,
    noise: bool,
    max_norm: Any = None,
    given_norms: Any = None,
    keys: Any = None,
    stddev: Any = None,
    blocks: Any = None,
) -> list[Array]:
    norms: list[Array] = []
    if clip:
        totals, of_clients = reference.clipped_weighted_sum(
            updates, weights, max_norm, where=where, return_norms=True, given_norms=given_norms
        )
        norms = [of_clients.astype(out_dtypes[0])]
    else:
        totals = reference.weighted_sum(updates, weights, where=where)
    if noise:
        totals = [
            total + stddev.astype(total.dtype) * _normals(keys[leaf], total.shape, blocks, leaf).astype(total.dtype)
            for leaf, total in enumerate(totals)
        ]
    return [*norms, *totals]


def _normals(key: Array, shape: tuple[int, ...], blocks: Array | None, leaf: int) -> Array:
    if blocks is None:
        return jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, np.float32)
    # What jax.random.normal does with the bits of a counter, for the counters of this block.
    high, low = _counters(math.prod(shape), blocks[leaf])
    bits = internals.threefry_bits(key, high, low)
    fraction = lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), np.float32) - np.float32(1)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
    return (np.float32(np.sqrt(2)) * lax.erf_inv(uniform)).reshape(shape)


def _counters(size: int, levels: Array) -> tuple[Array, Array]:
    """The row-major index in the whole leaf of every coordinate of a block, as two words of 32 bits."""
    rest = jnp.arange(size, dtype=np.uint32)
    positions = []
    for level in reversed(range(levels.shape[0])):
        origin, _, own = levels[level]
        positions.append(origin + rest % own)
        rest = rest // own
    high = low = jnp.zeros(size, np.uint32)
    for level, position in enumerate(reversed(positions)):
        extent = levels[level, 1]
        # high · 2³² + low, times the extent: in halves, since there may be no 64-bit integers.
        small, large = (low & 0xFFFF) * (extent & 0xFFFF), (low >> 16) * (extent >> 16)
        cross, other = (low >> 16) * (extent & 0xFFFF), (low & 0xFFFF) * (extent >> 16)
        middle = (small >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
        high = high * extent + large + (cross >> 16) + (other >> 16) + (middle >> 16)
        low = (small & 0xFFFF) | (middle << 16)
        high, low = high + (low + position < low), low + position
    return high, low


def _blocks(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> Array:
    """Where this device's block lies in each leaf: levels of (origin, extent in the leaf, own extent).

    Neighbouring axes that are whole make one level; leaves with fewer levels begin with trivial ones.
    """
    of_leaves: list[list[tuple[Any, int, int]]] = []
    for leaf, update in enumerate(operands["updates"]):
        levels: list[tuple[Any, int, int]] = []
        may_merge = False
        for axis, own in enumerate(update.shape[call.batch_dims + 1 :]):
            names = mesh_axes.get(f"leaf{leaf}.axis{axis}", ())
            extent, origin = own, jnp.uint32(0)
            for name in names:  # the first one varies slowest
                extent *= lax.axis_size(name)
                origin = origin * np.uint32(lax.axis_size(name)) + lax.axis_index(name).astype(np.uint32)
            origin = origin * np.uint32(own)
            merged = levels[-1][1] * own if levels else 0
            if may_merge and not names and merged < 2**32:
                levels[-1] = (origin, merged, merged)
            else:
                levels.append((origin, extent, own))
            may_merge = not names
        of_leaves.append(levels)
    depth = max(1, *map(len, of_leaves))
    trivial = (jnp.uint32(0), 1, 1)
    words = [
        jnp.stack(
            [jnp.asarray(word, np.uint32) for level in [trivial] * (depth - len(levels)) + levels for word in level]
        )
        for levels in of_leaves
    ]
    return jnp.stack(words).reshape((1,) * call.batch_dims + (len(of_leaves), depth, 3))


def _partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Norms over all devices first; noise once, each device for its own coordinates; then sums over clients."""
    layout, optional = call.layout, set(call.layout.optional)
    clip, noise = layout.attribute("clip"), layout.attribute("noise")
    clients = mesh_axes.get("clients", ())
    parameters = any(names for axis, names in mesh_axes.items() if axis.startswith("leaf"))
    if clip and parameters and "given_norms" not in optional:
        has_where = tuple(name for name in layout.optional if name == "where")
        norms_layout = layout._replace(optional=has_where, out_dtypes=layout.out_dtypes[:1], attributes=())
        norms_of = {"updates": operands["updates"], "where": operands["where"]}
        (norms,) = run_partitioned(CLIENT_NORMS, BoundCall(CLIENT_NORMS, norms_layout, None), norms_of, mesh_axes)
        operands, optional = {**operands, "given_norms": norms}, optional | {"given_norms"}
    if noise and parameters:
        operands = {**operands, "blocks": _blocks(call, operands, mesh_axes)}
        optional |= {"blocks"}
    if noise and clients:
        first = functools.reduce(jnp.logical_and, [lax.axis_index(name) == 0 for name in clients])
        operands = {**operands, "stddev": jnp.where(first, operands["stddev"], 0)}
    results = call.run_local(operands, optional=tuple(sorted(optional)))
    if not clients:
        return results
    return [*results[:1], *lax.psum(results[1:], clients)] if clip else list(lax.psum(results, clients))


def _jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, results = call.layout, call.results
    assert results is not None
    clip, noise = layout.attribute("clip"), layout.attribute("noise")
    weights, where = primals["weights"], primals["where"]
    scale, slope, norm_slope = weights, tangents["weights"], None
    if clip:
        norms = results[0]
        max_norm = call.per_client(primals["max_norm"], norms.ndim)
        if primals["given_norms"] is None:
            norm_slope = norm_slopes(call, primals["updates"], tangents["updates"], norms, where)
        else:
            norm_slope = tangents["given_norms"]
        finite = jnp.isfinite(norms)
        where = finite if where is None else finite & where
        clipped = where & (norms > max_norm)
        safe_norms = jnp.where(clipped, norms, 1)
        factor = jnp.where(clipped, max_norm / safe_norms, 1)
        scale = weights * factor
        slope = None if slope is None else slope * factor
        for part, of_factor in ((norm_slope, -factor / safe_norms), (tangents["max_norm"], 1 / safe_norms)):
            if part is not None:
                step = weights * jnp.where(clipped, call.per_client(part, norms.ndim) * of_factor, 0)
                slope = step if slope is None else slope + step
    dtypes = layout.out_dtypes[len(results) - layout.num_leaves :]
    terms: list[list[Array]] = [[] for _ in dtypes]
    leaves = [leaf for leaf, tangent in enumerate(tangents["updates"]) if tangent is not None]
    if leaves:
        operands = {"updates": [tangents["updates"][i] for i in leaves], "weights": scale, "where": where}
        summed = call.bind(WEIGHTED_SUM, operands, [dtypes[i] for i in leaves], divide=False)
        for leaf, value in zip(leaves, summed, strict=True):
            terms[leaf].append(value)
    if slope is not None:
        operands = {"updates": primals["updates"], "weights": slope, "where": where}
        for leaf, value in enumerate(call.bind(WEIGHTED_SUM, operands, dtypes, divide=False)):
            terms[leaf].append(value)
    if noise and tangents["stddev"] is not None:
        for leaf, normals in enumerate(_noise_alone(call, primals, dtypes)):
            terms[leaf].append(call.scalar(tangents["stddev"].astype(normals.dtype), normals.ndim) * normals)
    totals = results[len(results) - layout.num_leaves :]
    reduced = [
        jnp.broadcast_to(functools.reduce(jnp.add, parts), total.shape) if parts else None
        for parts, total in zip(terms, totals, strict=True)
    ]
    return [norm_slope, *reduced] if clip else reduced


def _noise_alone(call: BoundCall, primals: Operands, dtypes: Sequence[str]) -> list[Array]:
    """The call's noise at a standard deviation of 1: that of a sum of nothing."""
    assert call.results is not None
    batch = (1,) * call.batch_dims
    # Sharded as the results are, so that every device makes the noise of its own coordinates here too.
    nothing = [jnp.zeros_like(call.over_clients(total)) for total in call.results[-call.layout.num_leaves :]]
    dtype = reference.accumulator_dtype(*dtypes)
    operands = {
        "updates": nothing,
        "weights": jnp.zeros((*batch, 1), dtype),
        "where": None,
        "keys": primals["keys"],
        "stddev": jnp.ones(batch, dtype),
        "blocks": None,
    }
    return call.bind(NOISY_WEIGHTED_SUM, operands, dtypes, clip=False, noise=True)


def _private(name: str) -> Operation:
    return Operation(
        name,
        operands=_operands,
        results=_results,
        definition=_definition,
        whole_axes=("leaves", "words"),
        partitioned=_partitioned,
        jvp=_jvp,
        workspace=_workspace if "clipped" in name else None,
    )


CLIPPED_WEIGHTED_SUM = _private("clipped_weighted_sum")


NOISY_WEIGHTED_SUM = _private("noisy_weighted_sum")


CLIPPED_NOISY_WEIGHTED_SUM = _private("clipped_noisy_weighted_sum")
