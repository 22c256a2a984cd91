"""What the derivative rules of several families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from fedfuse_jax._core import BoundCall, Operands


def with_tangents(tangents: Sequence[Array | None]) -> list[int]:
    """The leaves that have a tangent: derivatives run over those alone."""
    return [leaf for leaf, tangent in enumerate(tangents) if tangent is not None]


def jvp_of_linear(*operands: str) -> Any:
    """The derivative of what is linear in each of ``operands`` alone: the operation itself on the tangents."""

    def jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
        total: Array | None = None
        attributes = dict(call.layout.attributes)
        for name in operands:
            if tangents[name] is None:
                continue
            varied = {**primals, name: tangents[name]}
            (term,) = call.bind(call.operation, varied, call.layout.out_dtypes, **attributes)
            total = term if total is None else total + term
        return [total]

    return jvp
