"""One step of a point toward the clients as a primitive."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import reference
from fedfuse_jax._core import REDUCTIONS, Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax._core.sharding import shards_of_leaves
from fedfuse_jax._core.workspace import block_sums_workspace
from fedfuse_jax._primitives.linear import CLIENT_DOTS, WEIGHTED_SUM


def norms_of_parts(parts: Sequence[Array], axis_names: Any) -> Array:
    """Norms from those of parts, some of them on other devices, without overflow and by one all-reduce."""
    norm = REDUCTIONS["norm"]
    total = functools.reduce(jnp.add, map(norm.summand, parts))
    return norm.result(lax.psum(total, axis_names) if axis_names else total)


def _step_definition(*, updates: Any, center: Any, weights: Any, where: Any, out_dtypes: Any) -> list[Array]:
    moved, distances = reference.step_toward_clients(updates, center, weights, where=where)
    return [leaf.astype(dtype) for leaf, dtype in zip((*moved, distances), out_dtypes, strict=True)]


def _step_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    """By products with whole vectors, each of which is a call: nothing as large as the updates is made on the way."""
    assert call.results is not None
    updates, center, weights = primals["updates"], primals["center"], primals["weights"]
    *moved, distances = call.results
    # Whoever is not finite or is absent does not pull, and stays as far away as it is.
    counts = jnp.isfinite(distances)
    if primals["where"] is not None:
        counts = counts & primals["where"]
    step_dtypes = [leaf.dtype.name for leaf in moved]

    def total_of(numbers: Array, ndim: int) -> Array:
        return call.scalar(jnp.where(counts, numbers, 0).sum(-1), ndim)

    def dots(leaves: list[Array], others: list[Array], shared: bool) -> Array:
        operands = {"updates": leaves, "others": others, "where": counts}
        return call.bind(CLIENT_DOTS, operands, (distances.dtype.name,), shared=shared)[0]

    # Where the step arrives: c + Σ wᵢ (xᵢ − c).
    shifts = [jnp.zeros_like(leaf) for leaf in moved]
    for leaf, tangent in enumerate(tangents["center"]):
        if tangent is not None:
            shifts[leaf] += tangent * (1 - total_of(weights.astype(tangent.dtype), tangent.ndim))
    if (slope := tangents["weights"]) is not None:
        sums = call.bind(
            WEIGHTED_SUM, {"updates": updates, "weights": slope, "where": counts}, step_dtypes, divide=False
        )
        for leaf, (total, start) in enumerate(zip(sums, center, strict=True)):
            shifts[leaf] += total - start * total_of(slope.astype(start.dtype), start.ndim)
    own = [leaf for leaf, tangent in enumerate(tangents["updates"]) if tangent is not None]
    own_tangents = [tangents["updates"][leaf] for leaf in own]
    if own:
        operands = {"updates": own_tangents, "weights": weights, "where": counts}
        sums = call.bind(WEIGHTED_SUM, operands, [step_dtypes[leaf] for leaf in own], divide=False)
        for leaf, total in zip(own, sums, strict=True):
            shifts[leaf] += total

    # How far it is from there: ⟨xᵢ − y, xᵢ' − y'⟩ / ‖xᵢ − y‖.
    of_end = [
        jnp.sum(end * shift, axis=tuple(range(call.batch_dims, end.ndim)))
        for end, shift in zip(moved, shifts, strict=True)
    ]
    of_tree = functools.reduce(jnp.add, [product.astype(distances.dtype) for product in of_end])
    products = of_tree[..., None] - dots(updates, shifts, shared=True)
    if own:
        products += dots(own_tangents, [updates[leaf] for leaf in own], shared=False)
        products -= dots(own_tangents, [moved[leaf] for leaf in own], shared=True)
    is_away = counts & (distances > 0)
    return [*shifts, jnp.where(is_away, products / jnp.where(is_away, distances, 1), 0)]


def _step_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Every device steps in its own coordinates; the norms are put together by one all-reduce."""
    layout = call.layout
    shards = shards_of_leaves(call.operation, layout, operands, mesh_axes)
    moved: dict[int, Array] = {}
    parts = []
    for leaves, counts in shards.groups:
        dtypes = (*(layout.out_dtypes[leaf] for leaf in leaves), layout.out_dtypes[-1])
        *steps, distances = call.run_local(call.restrict(operands, leaves), num_leaves=len(leaves), out_dtypes=dtypes)
        moved.update(zip(leaves, steps, strict=True))
        parts.append(jnp.where(counts(), distances, 0))
    distances = parts[0] if len(parts) == 1 and not shards.names else norms_of_parts(parts, shards.names)
    return [*(moved[leaf] for leaf in range(layout.num_leaves)), distances]


# center + Σ weightᵢ · (clientᵢ − center), and every client's distance from there.
STEP_TOWARD_CLIENTS = Operation(
    "step_toward_clients",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("center", per_leaf=True),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("moved", per_leaf=True), Operand("distances", ("clients",))),
    definition=_step_definition,
    whole_axes=("clients",),
    partitioned=_step_partitioned,
    jvp=_step_jvp,
    workspace=block_sums_workspace,
)
