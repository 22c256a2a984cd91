"""How partial results of several devices become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import reference


class Reduction(NamedTuple):
    """How partial results become one by a sum over devices: what is summed, and what the sum means."""

    summand: Callable[[Array], Array]
    result: Callable[[Array], Array]


def _norm_summand(norms: Array) -> Array:
    """The squares of large, middling and small norms apart, each scaled so that no square leaves the range."""
    bound, scale = _norm_scales(norms.dtype)
    large, small = norms > bound, norms < 1 / bound
    middling = ~(large | small)  # and NaN
    return jnp.stack(
        [
            jnp.where(large, norms / scale, 0) ** 2,
            jnp.where(middling, norms, 0) ** 2,
            jnp.where(small, norms * scale, 0) ** 2,
        ]
    )


def _norm_result(squares: Array) -> Array:
    """The square root of the sum of what :func:`_norm_summand` took apart.

    The three become norms first, and are added relative to the largest: no two constants meet, of which a compiler
    could make one beyond the range.
    """
    _, scale = _norm_scales(squares.dtype)
    units = jnp.array([scale, 1, 1 / scale], squares.dtype).reshape(-1, *[1] * (squares.ndim - 1))
    # No square root of 0, of which there is no derivative.
    nothing = squares == 0
    norms = jnp.where(nothing, 0, units * jnp.sqrt(jnp.where(nothing, 1, squares)))
    largest = jnp.max(norms, axis=0)
    is_measured = jnp.isfinite(largest) & (largest > 0)
    unit = reference.power_of_two_near(jnp.where(is_measured, largest, 1))
    total = jnp.where(is_measured, jnp.sum((norms / unit) ** 2, axis=0), 1)
    # Infinities and NaNs, which have no unit, are added as they are.
    return jnp.where(is_measured, unit * jnp.sqrt(total), jnp.sum(norms, axis=0))


def _norm_scales(dtype: Any) -> tuple[float, float]:
    range_exponent = int(jnp.finfo(dtype).maxexp)
    return 2.0 ** (7 * range_exponent // 16), 2.0 ** (9 * range_exponent // 16)


REDUCTIONS = {
    "sum": Reduction(lambda x: x, lambda total: total),
    "all": Reduction(lambda x: (~x).astype(jnp.int32), lambda total: total == 0),
    "norm": Reduction(_norm_summand, _norm_result),
}


def all_reduce(kind: str, value: Array, axis_name: Any) -> Array:
    """Makes one result of every device's own, inside a ``shard_map``."""
    reduction = REDUCTIONS[kind]
    return reduction.result(lax.psum(reduction.summand(value), axis_name))
