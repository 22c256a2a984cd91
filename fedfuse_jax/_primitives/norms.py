"""Norms, squared norms and finiteness as primitives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from fedfuse_jax import reference
from fedfuse_jax._core import BoundCall, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import with_tangents
from fedfuse_jax._core.workspace import block_sums_workspace
from fedfuse_jax._primitives.linear import CLIENT_DOTS


def _norms_definition(*, updates: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.squared_norms(updates, where=where).astype(out_dtypes[0])]


def _norms_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    leaves = with_tangents(tangents["updates"])
    operands = {
        "updates": [primals["updates"][i] for i in leaves],
        "others": [tangents["updates"][i] for i in leaves],
        "where": primals["where"],
    }
    (dots,) = call.bind(CLIENT_DOTS, operands, call.layout.out_dtypes, shared=False)
    return [2 * dots]


SQUARED_NORMS = Operation(
    "squared_norms",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("norms", ("clients",)),),
    definition=_norms_definition,
    reduce="sum",
    jvp=_norms_jvp,
    workspace=block_sums_workspace,
)


FINITE_CLIENTS = Operation(
    "finite_clients",
    operands=(Operand("updates", ("clients",), per_leaf=True),),
    results=(Operand("finite", ("clients",)),),
    definition=lambda updates, out_dtypes: [reference.finite_clients(updates)],
    reduce="all",
)


def norms_workspace(sizes: Any, layout: Any) -> Any:
    """A sum and an exponent, float64, per client and block of coordinates; see ffi/contract/private.h."""
    return 2 * block_sums_workspace(sizes, layout)


def _client_norms_definition(*, updates: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.client_norms(updates, where=where).astype(out_dtypes[0])]


def norm_slopes(call: BoundCall, updates: Any, tangents: Any, norms: Array, where: Array | None) -> Array | None:
    """The norms' tangents: ``⟨xᵢ, ẋᵢ⟩ / ‖xᵢ‖``, and 0 for who is absent, not finite, or nothing."""
    leaves = [leaf for leaf, tangent in enumerate(tangents) if tangent is not None]
    if not leaves:
        return None
    counts = jnp.isfinite(norms) & (norms > 0)
    counts = counts if where is None else counts & where
    operands = {
        "updates": [updates[leaf] for leaf in leaves],
        "others": [tangents[leaf] for leaf in leaves],
        "where": counts,
    }
    (dots,) = call.bind(CLIENT_DOTS, operands, (norms.dtype.name,), shared=False)
    return dots / jnp.where(counts, norms, 1)


def _client_norms_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    assert call.results is not None
    (norms,) = call.results
    return [norm_slopes(call, primals["updates"], tangents["updates"], norms, primals["where"])]


CLIENT_NORMS = Operation(
    "client_norms",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("norms", ("clients",)),),
    definition=_client_norms_definition,
    reduce="norm",
    jvp=_client_norms_jvp,
    workspace=norms_workspace,
)
