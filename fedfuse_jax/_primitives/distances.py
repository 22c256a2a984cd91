"""Pairwise squared distances as a primitive; its derivative is a product of differences."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._core import BoundCall, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import with_tangents
from fedfuse_jax._core.workspace import num_blocks
from fedfuse_jax._jax_internals import ad
from fedfuse_jax._primitives.mixing import MIX_CLIENTS

_WHERE = Operand("where", ("clients",), optional=True)


def _pairs_definition(*, updates: Any, others: Any, where: Any, out_dtypes: Any) -> list[Array]:
    if others is not None:
        return [reference.difference_dots(updates, others, where=where).astype(out_dtypes[0])]
    distances = reference.pairwise_squared_distances(updates, where=where)
    not_finite = jnp.diag(~reference.finite_clients(updates)) & jnp.isfinite(distances)
    return [jnp.where(not_finite, jnp.nan, distances).astype(out_dtypes[0])]


def _pairs_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    where, dtypes = primals["where"], call.layout.out_dtypes
    given = primals["others"] is not None
    total: Array | None = None
    # A distance is the product of a difference with itself, and twice its derivative in one factor.
    for varied, fixed in (("updates", "others"), ("others", "updates")) if given else (("updates", "updates"),):
        leaves = with_tangents(tangents[varied])
        if leaves:
            operands = {
                "updates": [primals[fixed][i] for i in leaves],
                "others": [tangents[varied][i] for i in leaves],
                "where": where,
            }
            (dots,) = call.bind(PAIRWISE_SQUARED_DISTANCES, operands, dtypes)
            total = dots if total is None else total + dots
    if not given and total is not None:
        assert call.results is not None
        total = jnp.where(jnp.isfinite(call.results[0]), 2 * total, 0)
    return [total]


def _pairs_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    """A combination of clients: the coefficients of every row sum to 0."""
    (cotangent,) = cotangents
    wanted, known = "others", operands["updates"]
    if any(map(ad.is_undefined_primal, operands["updates"])):
        wanted, known = "updates", operands["others"]
    n_clients = cotangent.shape[-1]
    pairs = ~jnp.eye(n_clients, dtype=bool)
    if (where := operands["where"]) is not None:
        where = internals.replicated(where)
        pairs = pairs & where[..., :, None] & where[..., None, :]
    cotangent = jnp.where(pairs, cotangent + jnp.swapaxes(cotangent, -1, -2), 0)
    diagonal = jnp.sum(cotangent, axis=-1, keepdims=True) * jnp.eye(n_clients, dtype=cotangent.dtype)
    dtypes = [x.aval.dtype.name for x in operands[wanted]]
    mixed = call.bind(MIX_CLIENTS, {"updates": known, "mixing": diagonal - cotangent}, dtypes)
    return {wanted: mixed}


def _pairs_workspace(sizes: Any, layout: Any) -> Any:
    """One float64 per pair of clients and segment of the coordinates; see ffi/contract/distances.h."""
    most_sums, bytes_per_partial = 2**20, 8
    pairs = sizes["clients"] * sizes["clients"]
    blocks = num_blocks(sizes, layout)
    if isinstance(pairs, int) and isinstance(blocks, int):
        sums = pairs * max(1, min(blocks, most_sums // pairs))
    else:
        sums = pairs + most_sums
    for i in range(layout.batch_dims):
        sums = sums * sizes[f"batch{i}"]
    return sums * bytes_per_partial


# Of a client that is not finite the distance from itself is NaN. With `others`, the dot products of the differences of
# the updates with those of the others instead: linear in both, and 0 on the diagonal and for absent clients.
PAIRWISE_SQUARED_DISTANCES = Operation(
    "pairwise_squared_distances",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("others", ("clients",), per_leaf=True, optional=True),
        _WHERE,
    ),
    results=(Operand("distances", ("rows", "columns")),),
    # Not the clients' own axis: the result is whole on every device.
    new_axes=lambda: {"rows": "clients", "columns": "clients"},
    definition=_pairs_definition,
    whole_axes=("clients",),
    reduce="sum",
    jvp=_pairs_jvp,
    transpose=_pairs_transpose,
    workspace=_pairs_workspace,
)
