"""Combinations of clients, one for each row of a matrix, as a primitive."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import reference
from fedfuse_jax._core import Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import with_tangents
from fedfuse_jax._jax_internals import ad
from fedfuse_jax._primitives.linear import CLIENT_DOTS


def _mix_definition(*, updates: Any, mixing: Any, out_dtypes: Any) -> list[Array]:
    return [
        reference.mix_clients(leaf, mixing, out_dtype=dtype) for leaf, dtype in zip(updates, out_dtypes, strict=True)
    ]


def _mix_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout = call.layout
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = with_tangents(tangents["updates"])
    if leaves:
        operands = {"updates": [tangents["updates"][leaf] for leaf in leaves], "mixing": primals["mixing"]}
        values = call.bind(MIX_CLIENTS, operands, [layout.out_dtypes[leaf] for leaf in leaves])
        for leaf, value in zip(leaves, values, strict=True):
            out[leaf] = value
    if tangents["mixing"] is not None:
        operands = {"updates": primals["updates"], "mixing": tangents["mixing"]}
        values = call.bind(MIX_CLIENTS, operands, layout.out_dtypes)
        out = [value if known is None else known + value for known, value in zip(out, values, strict=True)]
    return out


def _mix_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    updates, mixing = operands["updates"], operands["mixing"]
    if not ad.is_undefined_primal(mixing):
        dtypes = [leaf.aval.dtype.name for leaf in updates]
        transposed = {"updates": cotangents, "mixing": jnp.swapaxes(mixing, -1, -2)}
        return {"updates": call.bind(MIX_CLIENTS, transposed, dtypes)}
    # The rows' products with all clients: as a batch of dot products that shares the updates.
    batch = call.batch_dims
    dots_of = {"updates": [jnp.expand_dims(leaf, batch) for leaf in updates], "others": cotangents, "where": None}
    return {"mixing": CLIENT_DOTS.bind_batched(dots_of, (mixing.aval.dtype.name,), batch + 1, (("shared", True),))[0]}


def _mix_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Sharded clients are summed where they are, in the accumulator's dtype, and all-reduced."""
    names = mesh_axes.get("clients", ())
    if not names:
        return call.run_local(operands)
    dtypes = tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in operands["updates"])
    totals = lax.psum(call.run_local(operands, out_dtypes=dtypes), names)
    return [total.astype(dtype) for total, dtype in zip(totals, call.layout.out_dtypes, strict=True)]


# Combinations of the clients, one a row of the matrix. Whoever's coefficient is 0 is not touched, NaN or not.
MIX_CLIENTS = Operation(
    "mix_clients",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("mixing", ("rows", "clients")),
    ),
    results=(Operand("mixed", ("rows",), per_leaf=True),),
    definition=_mix_definition,
    whole_axes=("rows",),
    partitioned=_mix_partitioned,
    jvp=_mix_jvp,
    transpose=_mix_transpose,
)
