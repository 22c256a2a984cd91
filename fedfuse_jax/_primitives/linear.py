"""The weighted sum as a primitive, its transposes, and what each device adds where clients are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import reference
from fedfuse_jax._core import Axis, BoundCall, MeshAxes, Operand, Operands, Operation
from fedfuse_jax._core.derivatives import with_tangents
from fedfuse_jax._core.workspace import block_sums_workspace
from fedfuse_jax._jax_internals import ad


def _per_leaf(function: Any, updates: Sequence[Array], out_dtypes: Sequence[str]) -> list[Array]:
    return [function(leaf, dtype) for leaf, dtype in zip(updates, out_dtypes, strict=True)]


def _masked(weights: Array, where: Array | None) -> Array:
    return weights if where is None else jnp.where(where, weights, 0)


def _linear_definition(*, updates: Any, weights: Any, where: Any, out_dtypes: Any, divide: bool) -> list[Array]:
    define = reference.weighted_mean if divide else reference.weighted_sum
    # One call for the whole list, so that the total weight is summed in the tree's accumulator.
    results = define(updates, weights, where=where)
    return [result.astype(dtype) for result, dtype in zip(results, out_dtypes, strict=True)]


def _linear_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, divide = call.layout, call.layout.attribute("divide")
    weights, where = primals["weights"], primals["where"]
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = with_tangents(tangents["updates"])
    if leaves:
        operands = {"updates": [tangents["updates"][i] for i in leaves], "weights": weights, "where": where}
        dtypes = [layout.out_dtypes[i] for i in leaves]
        for leaf, value in zip(leaves, call.bind(call.operation, operands, dtypes, divide=divide), strict=True):
            out[leaf] = value
    if tangents["weights"] is not None:
        dtypes = [reference.accumulator_dtype(x.dtype).name for x in primals["updates"]]
        operands = {"updates": primals["updates"], "weights": tangents["weights"], "where": where}
        values = call.bind(WEIGHTED_SUM, operands, dtypes, divide=False)
        assert call.results is not None
        for leaf, (value, result) in enumerate(zip(values, call.results, strict=True)):
            if divide:
                total = _masked(weights, where).sum(-1).astype(value.dtype)
                slope = _masked(tangents["weights"], where).sum(-1).astype(value.dtype)
                drift = result.astype(value.dtype) * call.scalar(slope, value.ndim)
                value = (value - drift) / call.scalar(total, value.ndim)
            value, known = value.astype(result.dtype), out[leaf]
            out[leaf] = value if known is None else known + value
    return out


def _linear_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, where = operands["weights"], operands["where"]
    if ad.is_undefined_primal(weights):
        dots_of = {"updates": operands["updates"], "others": cotangents, "where": where}
        (dots,) = call.bind(CLIENT_DOTS, dots_of, (weights.aval.dtype.name,), shared=True)
        return {"weights": dots}
    scale = weights
    if call.layout.attribute("divide"):
        scale = weights / _masked(weights, where).sum(-1, keepdims=True)
    return {"updates": _spread(call, scale, where, cotangents, operands["updates"])}


def _spread(
    call: BoundCall, scale: Array, where: Array | None, cotangents: list[Array], leaves: list[Any]
) -> list[Array | None]:
    """``scaleᵢ · cotangent`` for every client of the leaves whose cotangent is asked for."""
    out: list[Array | None] = [None] * len(leaves)
    apart: list[int] = []
    for leaf, (cotangent, primal) in enumerate(zip(cotangents, leaves, strict=True)):
        if not ad.is_undefined_primal(primal):
            continue
        shape, batch = primal.aval.shape, range(call.batch_dims)
        summed = [i for i in batch if shape[i] == 1 and scale.shape[i] != 1 and cotangent.shape[i] != 1]
        if summed:
            out[leaf] = _contracted_product(call, scale, where, cotangent, summed, primal.aval.dtype)
        else:
            apart.append(leaf)
    if apart:
        operands = {"weights": scale, "cotangents": [cotangents[leaf] for leaf in apart], "where": where}
        dtypes = [leaves[leaf].aval.dtype.name for leaf in apart]
        for leaf, spread in zip(apart, call.bind(WEIGHTED_SPREAD, operands, dtypes), strict=True):
            out[leaf] = spread
    return out


def _contracted_product(
    call: BoundCall, scale: Array, where: Array | None, cotangent: Array, summed: list[int], dtype: Any
) -> Array:
    """The same for a leaf that batch axes share: contracting over them never makes the batch of products."""
    accumulator = reference.accumulator_dtype(dtype)
    scale = _masked(scale, where).astype(accumulator)
    batch, clients = range(call.batch_dims), call.batch_dims
    parameters = [clients + 1 + i for i in range(cotangent.ndim - clients)]
    product = jnp.einsum(
        scale,
        [*batch, clients],
        cotangent.astype(accumulator),
        [*batch, *parameters],
        [*(i for i in batch if i not in summed), clients, *parameters],
        precision=lax.Precision.HIGHEST,
    )
    product = jnp.expand_dims(product, summed)
    if where is not None:
        # Not even a NaN cotangent may reach a client that is absent from all of the batch.
        present = jnp.any(where, axis=[i for i in summed if where.shape[i] != 1], keepdims=True)
        product = jnp.where(call.per_client(present, product.ndim), product, 0)
    return product.astype(dtype)


def linear_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Sharded clients are summed where they are, in the accumulator's dtype, and all-reduced."""
    names = mesh_axes.get("clients", ())
    if not names:
        return call.run_local(operands)
    dtypes = tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in operands["updates"])
    # A mean of shards is the mean of sums: the division waits until the sums are whole.
    layout = call.layout._replace(out_dtypes=dtypes, attributes=(("divide", False),))
    sums = WEIGHTED_SUM.run_local(operands, layout)
    totals, total_weight = lax.psum((sums, _masked(operands["weights"], operands["where"]).sum(-1)), names)
    if call.layout.attribute("divide"):
        totals = [total / call.scalar(total_weight, total.ndim).astype(total.dtype) for total in totals]
    return [total.astype(dtype) for total, dtype in zip(totals, call.layout.out_dtypes, strict=True)]


def _linear(name: str) -> Operation:
    return Operation(
        name,
        operands=(
            Operand("updates", ("clients",), per_leaf=True),
            Operand("weights", ("clients",)),
            Operand("where", ("clients",), optional=True),
        ),
        results=(Operand("reduced", per_leaf=True),),
        definition=_linear_definition,
        partitioned=linear_partitioned,
        jvp=_linear_jvp,
        transpose=_linear_transpose,
    )


WEIGHTED_SUM = _linear("weighted_sum")


WEIGHTED_MEAN = _linear("weighted_mean")


def _spread_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, where = call.layout, primals["where"]
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = with_tangents(tangents["cotangents"])
    if leaves:
        chosen = [tangents["cotangents"][leaf] for leaf in leaves]
        operands = {"weights": primals["weights"], "cotangents": chosen, "where": where}
        dtypes = [layout.out_dtypes[leaf] for leaf in leaves]
        for leaf, value in zip(leaves, call.bind(WEIGHTED_SPREAD, operands, dtypes), strict=True):
            out[leaf] = value
    if tangents["weights"] is not None:
        operands = {"weights": tangents["weights"], "cotangents": primals["cotangents"], "where": where}
        values = call.bind(WEIGHTED_SPREAD, operands, layout.out_dtypes)
        out = [value if known is None else known + value for known, value in zip(out, values, strict=True)]
    return out


def _spread_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, where, inner = operands["weights"], operands["where"], operands["cotangents"]
    if ad.is_undefined_primal(weights):
        dots_of = {"updates": cotangents, "others": inner, "where": where}
        return {"weights": call.bind(CLIENT_DOTS, dots_of, (weights.aval.dtype.name,), shared=True)[0]}
    dtypes = [x.aval.dtype.name for x in inner]
    summed = {"updates": cotangents, "weights": weights, "where": where}
    return {"cotangents": call.bind(WEIGHTED_SUM, summed, dtypes, divide=False)}


def _spread_definition(*, weights: Any, cotangents: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return reference.weighted_spread(weights, cotangents, where=where, dtypes=out_dtypes)


WEIGHTED_SPREAD = Operation(
    "weighted_spread",
    operands=(
        Operand("weights", ("clients",)),
        Operand("cotangents", per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("spread", ("clients",), per_leaf=True),),
    definition=_spread_definition,
    jvp=_spread_jvp,
    transpose=_spread_transpose,
)


def _dots_definition(*, updates: Any, others: Any, where: Any, out_dtypes: Any, shared: bool) -> list[Array]:
    return [reference.client_dots(updates, others, shared=shared, where=where).astype(out_dtypes[0])]


def _dots_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    total: Array | None = None
    for varied, fixed in (("updates", "others"), ("others", "updates")):
        leaves = with_tangents(tangents[varied])
        if leaves:
            operands = {
                varied: [tangents[varied][i] for i in leaves],
                fixed: [primals[fixed][i] for i in leaves],
                "where": primals["where"],
            }
            dtypes = call.layout.out_dtypes
            (dots,) = call.bind(call.operation, operands, dtypes, shared=call.layout.attribute("shared"))
            total = dots if total is None else total + dots
    return [total]


def _dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    (cotangent,) = cotangents
    where, shared = operands["where"], call.layout.attribute("shared")
    updates, others = operands["updates"], operands["others"]
    if shared and any(map(ad.is_undefined_primal, others)):
        dtypes = [reference.accumulator_dtype(other.aval.dtype).name for other in others]
        summed = {"updates": updates, "weights": cotangent, "where": where}
        return {"others": call.bind(WEIGHTED_SUM, summed, dtypes, divide=False)}
    wanted, known = ("updates", others) if any(map(ad.is_undefined_primal, updates)) else ("others", updates)
    if where is not None:
        cotangent = jnp.where(where, cotangent, 0)
    products = []
    for leaf in known:
        factor = call.over_clients(leaf) if shared else leaf
        if where is not None:
            # Before anything is multiplied, so that an absent client's NaN makes no other.
            factor = jnp.where(call.per_client(where, factor.ndim), factor, 0)
        products.append(call.per_client(cotangent, factor.ndim) * factor.astype(cotangent.dtype))
    return {wanted: products}


def _dots_operands(shared: bool) -> tuple[Operand, ...]:
    return (
        Operand("updates", ("clients",), per_leaf=True),
        Operand("others", () if shared else ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    )


CLIENT_DOTS = Operation(
    "client_dots",
    operands=_dots_operands,
    results=lambda shared: (Operand("dots", ("clients",)),),
    definition=_dots_definition,
    reduce="sum",
    jvp=_dots_jvp,
    transpose=_dots_transpose,
    workspace=block_sums_workspace,
)
