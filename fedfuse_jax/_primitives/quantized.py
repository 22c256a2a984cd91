"""The sum of codes as a primitive, with its transposes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from fedfuse_jax import reference
from fedfuse_jax._core import Axis, BoundCall, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import jvp_of_linear
from fedfuse_jax._jax_internals import ad


def code_layout(num_bytes: Any, num_params: Any, num_bits: int, block_size: int | None) -> dict[str, Any]:
    """The attributes that say how codes lie.

    ``block_size``: of irregular blocks; 0 where all are alike, as shapes show. ``num_params``: of an odd number of
    4-bit codes; −1 where there are as many as bytes have room for.
    """
    is_odd = num_bits == 4 and isinstance(num_params, int) and num_params != 2 * num_bytes
    irregular = block_size is not None and not (
        isinstance(num_params, int)
        and num_params > 0
        and num_params % block_size == 0
        and (num_bits == 8 or block_size % 2 == 0)
    )
    return {
        "num_bits": num_bits,
        "num_params": num_params if is_odd else -1,
        "block_size": block_size if irregular else 0,
    }


def is_regular(*, num_bits: int, num_params: int, block_size: int) -> bool:
    """Whether all blocks have the same size."""
    return block_size == 0 and num_params < 0


def _blocks_axis(**layout: int) -> Axis:
    return "blocks" if is_regular(**layout) else "irregular_blocks"


def _coordinate_axes(**layout: int) -> tuple[Axis, ...]:
    """The axes of one number per coordinate."""
    if layout["num_params"] >= 0:
        return ("params",)
    halves = ("half",) if layout["num_bits"] == 4 else ()
    return ("blocks", "within", *halves) if is_regular(**layout) else ("bytes", *halves)


def _code_axes(**layout: int) -> tuple[Axis, ...]:
    return ("clients", "blocks", "within") if is_regular(**layout) else ("clients", "bytes")


def _new_coordinate_axes(**layout: int) -> dict[Axis, int]:
    if layout["num_params"] >= 0:
        return {"params": layout["num_params"]}
    return {"half": 2} if layout["num_bits"] == 4 else {}


_WHOLE_COORDINATE_AXES = ("bytes", "half", "irregular_blocks", "params")


def _flat_options(codes: Array, blocks: int, layout: dict[str, int]) -> tuple[Array, dict[str, Any]]:
    """Unbatched codes and options as the definitions take them."""
    flat = codes.reshape(codes.shape[0], math.prod(codes.shape[1:]))
    block_size: Any = layout["block_size"]
    if block_size == 0:
        size = layout["num_params"] if layout["num_params"] >= 0 else flat.shape[1] * 8 // layout["num_bits"]
        block_size = size // blocks if isinstance(size, int) and blocks != 1 else None
    options = {"num_bits": layout["num_bits"], "block_size": block_size}
    return flat, options


def _per_block_arrays(block_size: int | None, *arrays: Array) -> list[Array]:
    return [x[:, 0] for x in arrays] if block_size is None else list(arrays)


def _quantized_sum_definition(
    *, codes: Any, scales: Any, zero_points: Any, weights: Any, where: Any, out_dtypes: Any, **layout: int
) -> list[Array]:
    flat, options = _flat_options(codes, scales.shape[1], layout)
    scales, zero_points = _per_block_arrays(options["block_size"], scales, zero_points)
    num_params = layout["num_params"] if layout["num_params"] >= 0 else None
    total = reference.quantized_weighted_sum(
        flat, scales, zero_points, weights, num_params=num_params, where=where, **options
    )
    if num_params is not None:
        return [total]
    return [total.reshape(codes.shape[1:] + ((2,) if layout["num_bits"] == 4 else ()))]


def _over_coordinates(per_block: Array, model: Any, call: BoundCall) -> Array:
    """``(*batch, n_blocks)`` numbers, one for each coordinate, in the shape of ``model``'s coordinates."""
    coordinates = model.shape[call.batch_dims :]
    block_size = call.layout.attribute("block_size")
    if block_size == 0:
        spread = per_block.reshape(per_block.shape + (1,) * (len(coordinates) - 1))
    else:
        block = jnp.arange(math.prod(coordinates)) // block_size
        spread = jnp.take(per_block, block, axis=-1)
        spread = spread.reshape(*spread.shape[:-1], *coordinates)
    return jnp.broadcast_to(spread, model.shape)


def _sum_over_coordinates(vector: Array, num_blocks: int, call: BoundCall) -> Array:
    """One number per coordinate, summed over each block: ``(*batch, n_blocks)``."""
    batch, block_size = vector.shape[: call.batch_dims], call.layout.attribute("block_size")
    if block_size == 0:
        first = call.batch_dims + (1 if is_regular(**dict(call.layout.attributes)) else 0)
        total = vector.sum(tuple(range(first, vector.ndim)))
        return total if first > call.batch_dims else total[..., None]
    size = math.prod(vector.shape[call.batch_dims :])
    flat = vector.reshape(*batch, size)
    padded = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, num_blocks * block_size - size)])
    return padded.reshape(*batch, num_blocks, block_size).sum(-1)


def _product_of_present(where: Array | None, *factors: Array) -> Array:
    """A product of ``(*batch, clients, blocks)`` numbers, 0 for the absent; and so in derivatives, NaN or not."""

    def present(x: Array) -> Array:
        return x if where is None else jnp.where(where[..., None], x, 0)

    return present(functools.reduce(jnp.multiply, map(present, factors)))


def _quantized_sum_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    (total,) = jvp_of_linear("scales", "weights")(call, primals, tangents)
    if tangents["zero_points"] is not None:
        assert call.results is not None
        slopes = _product_of_present(primals["where"], primals["scales"], primals["weights"][..., None])
        drifts = _product_of_present(primals["where"], slopes, tangents["zero_points"])
        drift = _over_coordinates(-drifts.sum(-2), call.results[0], call)
        total = drift if total is None else total + drift
    return [total]


def _quantized_sum_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    scales, weights = operands["scales"], operands["weights"]
    known = weights if ad.is_undefined_primal(scales) else scales
    (dots,) = call.bind(
        QUANTIZED_DOTS, {**operands, "vector": cotangents[0]}, (known.dtype.name,), **dict(call.layout.attributes)
    )
    if ad.is_undefined_primal(weights):
        return {"weights": _product_of_present(operands["where"], scales, dots).sum(-1)}
    return {"scales": _product_of_present(operands["where"], weights[..., None], dots)}


QUANTIZED_WEIGHTED_SUM = Operation(
    "quantized_weighted_sum",
    operands=lambda **layout: (
        Operand("codes", _code_axes(**layout)),
        Operand("scales", ("clients", _blocks_axis(**layout))),
        Operand("zero_points", ("clients", _blocks_axis(**layout))),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda **layout: (Operand("total", _coordinate_axes(**layout)),),
    new_axes=_new_coordinate_axes,
    definition=_quantized_sum_definition,
    whole_axes=_WHOLE_COORDINATE_AXES,
    reduce="sum",
    jvp=_quantized_sum_jvp,
    transpose=_quantized_sum_transpose,
)


def _quantized_dots_definition(
    *, codes: Any, zero_points: Any, vector: Any, where: Any, out_dtypes: Any, **layout: int
) -> list[Array]:
    num_blocks = zero_points.shape[1]
    flat, options = _flat_options(codes, num_blocks, layout)
    (zero_points,) = _per_block_arrays(options["block_size"], zero_points)
    vector = vector.reshape(math.prod(vector.shape))
    dots = reference.quantized_dots(flat, zero_points, vector, where=where, **options)
    return [dots.reshape(flat.shape[0], num_blocks).astype(out_dtypes[0])]


def _quantized_dots_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    dots: Array | None = None
    if tangents["vector"] is not None:
        # Linear in the vector alone: the zero points stay.
        (dots,) = jvp_of_linear("vector")(call, primals, tangents)
    if tangents["zero_points"] is not None:
        sums = _sum_over_coordinates(primals["vector"], primals["zero_points"].shape[-1], call)
        assert call.results is not None
        drift = -_product_of_present(primals["where"], tangents["zero_points"], sums[..., None, :])
        drift = jnp.broadcast_to(drift, call.results[0].shape)
        dots = drift if dots is None else dots + drift
    return [dots]


def _quantized_dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    (cotangent,) = cotangents
    ones = jnp.ones(cotangent.shape[:-1], cotangent.dtype)
    back = {**operands, "scales": cotangent, "weights": ones}
    dtypes = (operands["vector"].aval.dtype.name,)
    return {"vector": call.bind(QUANTIZED_WEIGHTED_SUM, back, dtypes, **dict(call.layout.attributes))[0]}


QUANTIZED_DOTS = Operation(
    "quantized_dots",
    operands=lambda **layout: (
        Operand("codes", _code_axes(**layout)),
        Operand("zero_points", ("clients", _blocks_axis(**layout))),
        Operand("vector", _coordinate_axes(**layout)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda **layout: (Operand("dots", ("clients", _blocks_axis(**layout))),),
    definition=_quantized_dots_definition,
    whole_axes=_WHOLE_COORDINATE_AXES,
    reduce="sum",
    jvp=_quantized_dots_jvp,
    transpose=_quantized_dots_transpose,
)
