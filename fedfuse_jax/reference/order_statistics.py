"""Definitions: order statistics, and the clients that they select."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax.reference.common import accumulator_dtype, over_parameters, presence, result_dtype

PyTree = Any


def trim_counts(trim_fraction: Any, n_clients: int) -> np.ndarray:
    """``int(trim_fraction · m)`` for every number m of participating clients, 0 … n, in Python's arithmetic."""
    return np.array([int(trim_fraction * m) for m in range(n_clients + 1)], np.int32)


def median_trim_count(num_present: Any) -> Any:
    """The trim count that makes the trimmed mean of ``num_present`` clients their median."""
    return (num_present - 1) // 2


def _by_rank(leaf: Array, where: Array | None) -> tuple[Array, Array]:
    """Each coordinate's values in order, −inf < finite < +inf < NaN < absent, and whose they are; ties by index."""
    absent = jnp.broadcast_to(over_parameters(~presence(where, leaf.shape[0]), leaf), leaf.shape)
    client = lax.broadcasted_iota(jnp.int32, leaf.shape, 0)
    # lax.sort holds -0 and 0 for equal, and every NaN for equal and greatest: the order the contract asks for.
    # Ranks are constant almost everywhere, and the derivative of a sort is not free.
    keys = (absent, lax.stop_gradient(leaf), client)
    _, values, clients = lax.sort(keys, dimension=0, num_keys=2, is_stable=True)
    return values, clients


def _mean_of_kept(selected: Array, values: Array, num_kept: Array) -> Array:
    """The mean over the selected clients in each coordinate; NaN when there are none."""
    dtype = accumulator_dtype(values.dtype)
    total = jnp.sum(jnp.where(selected, values.astype(dtype), 0), axis=0)
    return jnp.where(num_kept > 0, total / jnp.maximum(num_kept, 1).astype(dtype), jnp.nan)


def _mean_without_overflow(selected: Array, leaf: Array, num_kept: Array) -> Array:
    """The same, finite wherever the mean is: a sum may overflow where the mean does not."""
    n_clients = leaf.shape[0]
    mean = _mean_of_kept(selected, leaf, num_kept)
    # Halving first costs nothing but time.
    exponent = 2.0 ** -math.ceil(math.log2(n_clients + 1)) if isinstance(n_clients, int) else 2.0**-31
    scaled = _mean_of_kept(selected, leaf.astype(mean.dtype) * exponent, num_kept) / exponent
    return jnp.where(jnp.isfinite(mean), mean, scaled)


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b`` as a rounded sum and what rounding lost (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    rounded = total - a
    return total, (a - (total - rounded)) + (b - rounded)


def _sum_is_less(a: Array, b: Array, c: Array, d: Array) -> Array:
    """Whether ``a + b < c + d``, exactly; False where either sum is NaN."""
    # Where a sum overflows, its halves are exact.
    scale = jnp.where(jnp.isfinite(a + b) & jnp.isfinite(c + d), 1, 0.5).astype(a.dtype)
    (left, left_rest), (right, right_rest) = _exact_sum(a * scale, b * scale), _exact_sum(c * scale, d * scale)
    return (left < right) | ((left == right) & (left_rest < right_rest))


def _first_around_median(values: Array, num_byzantine: int, num_present: Array) -> Array:
    """The lowest rank of the ``num_present − num_byzantine`` values nearest the median; ``values`` are in order.

    Values nearest a point are neighbours in rank. Their window slides up from rank 0 while the value it would gain is
    nearer the median than the one it would lose: ``median − lost > gained − median``, which for the two middle values
    a and b is ``lost + gained < a + b``.
    """
    dtype = accumulator_dtype(values.dtype)
    n_clients = values.shape[0]

    def of_rank(rank: Array) -> Array:
        value = lax.dynamic_index_in_dim(values, jnp.clip(rank, 0, n_clients - 1), keepdims=False)
        return value.astype(dtype)

    a, b = of_rank((num_present - 1) // 2), of_rank(num_present // 2)
    lost = values[:num_byzantine].astype(dtype)
    first_gained = jnp.maximum(num_present - num_byzantine, 0)
    gained = lax.dynamic_slice_in_dim(values, first_gained, num_byzantine).astype(dtype)
    # An infinite median is at no distance from itself, and infinitely far from all else.
    reached = (gained == jnp.inf) & (lost < jnp.inf) & ((a + b == jnp.inf) & (b == jnp.inf))[None]
    slides = _sum_is_less(lost, gained, a[None], b[None]) | reached
    return jnp.sum(slides, axis=0, dtype=jnp.int32)


def _selected(leaf: Array, trim_count: Any, where: Array | None, around_median: bool = False) -> tuple[Array, Array]:
    """Which clients are kept in each coordinate, and how many those are (0 or less: nobody).

    A trimmed mean keeps all but the ``trim_count`` smallest and greatest; ``around_median``, all but the ``trim_count``
    farthest from the median.
    """
    num_present = jnp.sum(presence(where, leaf.shape[0]), dtype=jnp.int32)
    trim_count = jnp.asarray(trim_count, jnp.int32) if not around_median else trim_count
    values, clients = _by_rank(leaf, where)
    ranks = jnp.argsort(clients, axis=0).astype(jnp.int32)
    if around_median:
        num_kept = num_present - trim_count
        first = _first_around_median(values, trim_count, num_present)[None]
    else:
        num_kept = jnp.where(trim_count < 0, 0, num_present - 2 * trim_count)
        first = trim_count
    return (ranks >= first) & (ranks < first + num_kept), num_kept


def trimmed_mean(
    updates: PyTree,
    trim_count: Any = None,
    *,
    trim_fraction: float = 0.2,
    where: Array | None = None,
    out_dtype: Any = None,
) -> PyTree:
    """Per coordinate, the mean of the values left without the k smallest and the k largest; NaN if none is."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    if trim_count is None:
        num_present = jnp.sum(presence(where, n_clients))
        trim_count = jnp.asarray(trim_counts(trim_fraction, n_clients))[num_present]

    def reduce_leaf(leaf: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where)
        return _mean_without_overflow(selected, leaf, num_kept).astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def coordinate_median(updates: PyTree, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """Per coordinate, the middle value, or the mean of the two middle values; NaN when nobody takes part."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    num_present = jnp.sum(presence(where, n_clients), dtype=jnp.int32)
    return trimmed_mean(updates, median_trim_count(num_present), where=where, out_dtype=out_dtype)


def mean_around_median(
    updates: PyTree, num_byzantine: int, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """Per coordinate, the mean without the ``num_byzantine`` values farthest from the median; NaN if none is left."""

    def reduce_leaf(leaf: Array) -> Array:
        selected, num_kept = _selected(leaf, num_byzantine, where, around_median=True)
        return _mean_without_overflow(selected, leaf, num_kept).astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def selected_mean(
    updates: PyTree,
    values: PyTree,
    trim_count: Any,
    *,
    around_median: bool = False,
    where: Array | None = None,
    out_dtype: Any = None,
) -> PyTree:
    """Per coordinate, the mean of ``values`` over the clients that the trimmed mean of ``updates`` keeps.

    With ``around_median``, over those that ``mean_around_median`` with ``num_byzantine = trim_count`` keeps.
    """

    def reduce_leaf(leaf: Array, value: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where, around_median)
        return _mean_of_kept(selected, value, num_kept).astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates, values)


def spread_to_selected(
    updates: PyTree, cotangents: PyTree, trim_count: Any, *, around_median: bool = False, where: Array | None = None
) -> PyTree:
    """The transpose of ``selected_mean``: a kept client gets its share of the cotangent, the others exactly 0."""

    def spread_leaf(leaf: Array, cotangent: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        selected, num_kept = _selected(leaf, trim_count, where, around_median)
        share = cotangent.astype(dtype) / jnp.maximum(num_kept, 1).astype(dtype)
        return jnp.where(selected, share[None], 0).astype(leaf.dtype)

    return jax.tree.map(spread_leaf, updates, cotangents)
