"""The running sum and the stack as primitives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import reference
from fedfuse_jax._core import BoundCall, Operand, Operands, Operation


def _accumulate_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    out: list[Array | None] = []
    for leaf, total in enumerate(primals["total"]):
        terms = []
        if tangents["total"][leaf] is not None:
            terms.append(tangents["total"][leaf])
        if tangents["update"][leaf] is not None:
            weight = call.scalar(primals["weight"].astype(total.dtype), total.ndim)
            terms.append(weight * tangents["update"][leaf].astype(total.dtype))
        if tangents["weight"] is not None:
            slope = call.scalar(tangents["weight"].astype(total.dtype), total.ndim)
            terms.append(slope * primals["update"][leaf].astype(total.dtype))
        out.append(sum(terms[1:], terms[0]) if terms else None)
    assert call.results is not None
    return [
        None if tangent is None else jnp.broadcast_to(tangent, result.shape)
        for tangent, result in zip(out, call.results, strict=True)
    ]


ACCUMULATE_WEIGHTED = Operation(
    "accumulate_weighted",
    operands=(
        Operand("total", per_leaf=True),
        Operand("update", per_leaf=True),
        Operand("weight"),
    ),
    results=(Operand("total", per_leaf=True),),
    definition=lambda total, update, weight, out_dtypes: reference.accumulate_weighted(total, update, weight),
    jvp=_accumulate_jvp,
    aliased=("total",),
)


def _stack_definition(*, out_dtypes: Any, num_clients: int, **clients: Any) -> list[Array]:
    return reference.stack_clients([clients[f"client{i}"] for i in range(num_clients)])


def _stack_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    instantiated = {
        name: [jnp.zeros_like(x) if t is None else t for x, t in zip(primals[name], tangents[name], strict=True)]
        for name in primals
    }
    return list(call.bind(STACK_CLIENTS, instantiated, call.layout.out_dtypes, **dict(call.layout.attributes)))


def _stack_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    return {
        f"client{i}": [lax.index_in_dim(ct, i, call.batch_dims, keepdims=False) for ct in cotangents]
        for i in range(call.layout.attribute("num_clients"))
    }


STACK_CLIENTS = Operation(
    "stack_clients",
    operands=lambda num_clients: tuple(Operand(f"client{i}", per_leaf=True) for i in range(num_clients)),
    results=lambda num_clients: (Operand("stacked", ("clients",), per_leaf=True),),
    new_axes=lambda num_clients: {"clients": num_clients},
    definition=_stack_definition,
    jvp=_stack_jvp,
    transpose=_stack_transpose,
)
