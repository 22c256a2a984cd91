"""The sparse sum as a primitive, with its transposes."""

from __future__ import annotations

from typing import Any

from jax import Array

from fedfuse_jax import reference
from fedfuse_jax._core import BoundCall, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import jvp_of_linear
from fedfuse_jax._jax_internals import ad


def _sparse_sum_definition(
    *, values: Any, indices: Any, weights: Any, where: Any, out_dtypes: Any, num_params: int
) -> list[Array]:
    return [reference.topk_sparse_weighted_sum(values, indices, weights, num_params, where=where)]


def _sparse_sum_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    values, weights = operands["values"], operands["weights"]
    if ad.is_undefined_primal(weights):
        dots_of = {**operands, "vector": cotangents[0]}
        return {"weights": call.bind(SPARSE_DOTS, dots_of, (weights.aval.dtype.name,))[0]}
    spread_of = {**operands, "vector": cotangents[0]}
    return {"values": call.bind(SPARSE_SPREAD, spread_of, (values.aval.dtype.name,))[0]}


def _sparse_workspace(sizes: Any, layout: Any) -> Any:
    """Whether a client's indices are sorted, a byte each; see ffi/contract/compressed.h."""
    rows = sizes["clients"]
    for i in range(layout.batch_dims):
        rows = rows * sizes[f"batch{i}"]
    return rows


TOPK_SPARSE_WEIGHTED_SUM = Operation(
    "topk_sparse_weighted_sum",
    operands=lambda num_params: (
        Operand("values", ("clients", "k")),
        Operand("indices", ("clients", "k")),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda num_params: (Operand("total", ("params",)),),
    new_axes=lambda num_params: {"params": num_params},
    definition=_sparse_sum_definition,
    reduce="sum",
    jvp=jvp_of_linear("values", "weights"),
    transpose=_sparse_sum_transpose,
    workspace=_sparse_workspace,
)


def _sparse_spread_definition(*, indices: Any, weights: Any, vector: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.sparse_spread(indices, weights, vector, where=where, dtype=out_dtypes[0])]


def _sparse_spread_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, vector = operands["weights"], operands["vector"]
    back = {**operands, "values": cotangents[0]}
    if ad.is_undefined_primal(weights):
        return {"weights": call.bind(SPARSE_DOTS, back, (weights.aval.dtype.name,))[0]}
    (total,) = call.bind(TOPK_SPARSE_WEIGHTED_SUM, back, (vector.aval.dtype.name,), num_params=vector.aval.shape[-1])
    return {"vector": total}


SPARSE_SPREAD = Operation(
    "sparse_spread",
    operands=(
        Operand("indices", ("clients", "k")),
        Operand("weights", ("clients",)),
        Operand("vector", ("params",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("spread", ("clients", "k")),),
    definition=_sparse_spread_definition,
    whole_axes=("params",),
    jvp=jvp_of_linear("weights", "vector"),
    transpose=_sparse_spread_transpose,
)


def _sparse_dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    values, vector = operands["values"], operands["vector"]
    back = {**operands, "weights": cotangents[0]}
    if ad.is_undefined_primal(values):
        return {"values": call.bind(SPARSE_SPREAD, back, (values.aval.dtype.name,))[0]}
    (total,) = call.bind(TOPK_SPARSE_WEIGHTED_SUM, back, (vector.aval.dtype.name,), num_params=vector.aval.shape[-1])
    return {"vector": total}


SPARSE_DOTS = Operation(
    "sparse_dots",
    operands=(
        Operand("values", ("clients", "k")),
        Operand("indices", ("clients", "k")),
        Operand("vector", ("params",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("dots", ("clients",)),),
    definition=lambda values, indices, vector, where, out_dtypes: [
        reference.sparse_dots(values, indices, vector, where=where)
    ],
    whole_axes=("params",),
    reduce="sum",
    jvp=jvp_of_linear("values", "vector"),
    transpose=_sparse_dots_transpose,
)
