"""Order statistics as primitives, with the linear maps that their derivatives are."""

from __future__ import annotations

from typing import Any

from jax import Array

from fedfuse_jax import reference
from fedfuse_jax._core import BoundCall, Operand, Operands, Operation


def _known_trim(trim_count: Array | None, trim: int) -> Any:
    """The trim count is an operand where it is traced, an attribute where it is a Python number."""
    return trim if trim_count is None else trim_count


def _order_definition(
    *, updates: Any, where: Any, trim_count: Any, out_dtypes: Any, trim: int, around_median: bool = False
) -> list[Array]:
    define = reference.mean_around_median if around_median else reference.trimmed_mean
    count = _known_trim(trim_count, trim)
    return [define(leaf, count, where=where, out_dtype=dtype) for leaf, dtype in zip(updates, out_dtypes, strict=True)]


def _order_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    """The tangent of what is kept: which clients those are changes on a set of measure zero."""
    return _bind_for_leaves(call, SELECTED_MEAN, primals, "values", tangents["updates"], call.layout.out_dtypes)


def _bind_for_leaves(
    call: BoundCall, operation: Operation, operands: Operands, argument: str, given: Any, out_dtypes: Any
) -> list[Array | None]:
    """Binds ``operation`` with ``given`` as ``argument``, over the leaves that have one."""
    out: list[Array | None] = [None] * len(given)
    leaves = [leaf for leaf, value in enumerate(given) if value is not None]
    if leaves:
        chosen = {
            "updates": [operands["updates"][leaf] for leaf in leaves],
            argument: [given[leaf] for leaf in leaves],
            "where": operands["where"],
            "trim_count": operands["trim_count"],
        }
        dtypes = [out_dtypes[leaf] for leaf in leaves]
        # Without the attribute, the call is a trimmed mean.
        attributes = {"around_median": False, **dict(call.layout.attributes)}
        results = call.bind(operation, chosen, dtypes, **attributes)
        for leaf, result in zip(leaves, results, strict=True):
            out[leaf] = result
    return out


_UPDATES = Operand("updates", ("clients",), per_leaf=True)


_CHOICE = (Operand("where", ("clients",), optional=True), Operand("trim_count", optional=True))


def _order_statistic(name: str) -> Operation:
    return Operation(
        name,
        operands=(_UPDATES, *_CHOICE),
        results=(Operand("reduced", per_leaf=True),),
        definition=_order_definition,
        whole_axes=("clients",),
        jvp=_order_jvp,
    )


COORDINATE_MEDIAN = _order_statistic("coordinate_median")


TRIMMED_MEAN = _order_statistic("trimmed_mean")


MEAN_AROUND_MEDIAN = _order_statistic("mean_around_median")


def _selected_mean_definition(
    *, updates: Any, values: Any, where: Any, trim_count: Any, out_dtypes: Any, trim: int, around_median: bool
) -> list[Array]:
    count = _known_trim(trim_count, trim)
    return [
        reference.selected_mean(leaf, value, count, around_median=around_median, where=where, out_dtype=dtype)
        for leaf, value, dtype in zip(updates, values, out_dtypes, strict=True)
    ]


def _selected_mean_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    return _bind_for_leaves(call, SELECTED_MEAN, primals, "values", tangents["values"], call.layout.out_dtypes)


def _selected_mean_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    dtypes = [leaf.dtype.name for leaf in operands["updates"]]
    return {"values": _bind_for_leaves(call, SPREAD_TO_SELECTED, operands, "cotangents", cotangents, dtypes)}


SELECTED_MEAN = Operation(
    "selected_mean",
    operands=(_UPDATES, Operand("values", ("clients",), per_leaf=True), *_CHOICE),
    results=(Operand("reduced", per_leaf=True),),
    definition=_selected_mean_definition,
    whole_axes=("clients",),
    jvp=_selected_mean_jvp,
    transpose=_selected_mean_transpose,
)


def _spread_definition(
    *, updates: Any, cotangents: Any, where: Any, trim_count: Any, out_dtypes: Any, trim: int, around_median: bool
) -> list[Array]:
    count = _known_trim(trim_count, trim)
    return reference.spread_to_selected(updates, cotangents, count, around_median=around_median, where=where)


def _spread_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    given, dtypes = tangents["cotangents"], call.layout.out_dtypes
    return _bind_for_leaves(call, SPREAD_TO_SELECTED, primals, "cotangents", given, dtypes)


def _spread_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    dtypes = [x.aval.dtype.name for x in operands["cotangents"]]
    return {"cotangents": _bind_for_leaves(call, SELECTED_MEAN, operands, "values", cotangents, dtypes)}


SPREAD_TO_SELECTED = Operation(
    "spread_to_selected",
    operands=(_UPDATES, Operand("cotangents", per_leaf=True), *_CHOICE),
    results=(Operand("spread", ("clients",), per_leaf=True),),
    definition=_spread_definition,
    whole_axes=("clients",),
    jvp=_spread_jvp,
    transpose=_spread_transpose,
)
