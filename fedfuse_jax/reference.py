"""What each operation means, in ``jax.numpy``.

These functions are the specification of the compiled kernels, the code that runs where no kernel exists, and
the first thing to read about an operation. They take the same arguments as the public operations, trust them
to be valid, and favour the obvious over the fast.

Conventions, in every function: the leading axis of a leaf is the client axis; low-precision leaves are
widened before anything is added; an absent client (``where`` is ``False``) is selected away, never multiplied
by zero, so its NaNs go nowhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PyTree = Any


def accumulator_dtype(*dtypes: Any) -> np.dtype:
    """The dtype sums are kept in: float64 if any of ``dtypes`` is, float32 otherwise."""
    return np.dtype(np.float64 if any(np.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)


def _tree_accumulator_dtype(tree: PyTree) -> np.dtype:
    return accumulator_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


def _result_dtype(leaf: Array, out_dtype: Any) -> np.dtype:
    return accumulator_dtype(leaf.dtype) if out_dtype is None else np.dtype(out_dtype)


def _over_parameters(per_client: Array, leaf: Array) -> Array:
    """Reshapes ``(n_clients,)`` so that it broadcasts against a client-stacked leaf."""
    return per_client.reshape(per_client.shape + (1,) * (leaf.ndim - 1))


def _present(where: Array | None, n_clients: int) -> Array:
    return jnp.ones(n_clients, bool) if where is None else where


# --- Reduce ---------------------------------------------------------------------------------------------------


def weighted_sum(updates: PyTree, weights: Array, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """``Σ wᵢ xᵢ`` over the clients that take part; 0 when nobody does."""

    def reduce_leaf(leaf: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        terms = leaf.astype(dtype) * _over_parameters(weights.astype(dtype), leaf)
        if where is not None:
            terms = jnp.where(_over_parameters(where, leaf), terms, 0)
        return jnp.sum(terms, axis=0).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def weighted_spread(
    weights: Array, cotangents: list[Array], *, where: Array | None = None, dtypes: Sequence[Any]
) -> list[Array]:
    """The transpose of ``weighted_sum``: ``wᵢ`` times the cotangent for every client, exactly 0 for an absent one."""

    def spread_leaf(cotangent: Array, dtype: Any) -> Array:
        accumulator = accumulator_dtype(dtype)
        stacked = cotangent.astype(accumulator)[None]
        products = _over_parameters(weights.astype(accumulator), stacked) * stacked
        if where is not None:
            products = jnp.where(_over_parameters(where, stacked), products, 0)
        return products.astype(dtype)

    return [spread_leaf(cotangent, dtype) for cotangent, dtype in zip(cotangents, dtypes, strict=True)]


def weighted_mean(
    updates: PyTree, weights: Array | None = None, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """``Σ wᵢ xᵢ / Σ wᵢ`` over the clients that take part; NaN when nobody does."""
    if weights is None:
        weights = jnp.ones(jax.tree.leaves(updates)[0].shape[0], _tree_accumulator_dtype(updates))
    weights = weights.astype(_tree_accumulator_dtype(updates))
    total_weight = jnp.sum(weights if where is None else jnp.where(where, weights, 0))

    def reduce_leaf(leaf: Array) -> Array:
        total = weighted_sum(leaf, weights, where=where)
        return (total / total_weight.astype(total.dtype)).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def _pairwise_sum(values: Array) -> Array:
    """Sums over the last axis in blocks of blocks, so that the error grows with log(size), not with size."""
    block = 512
    while isinstance(values.shape[-1], int) and values.shape[-1] > block:
        whole = values.shape[-1] // block * block
        blocks = values[..., :whole].reshape(*values.shape[:-1], whole // block, block)
        values = jnp.concatenate([jnp.sum(blocks, axis=-1), values[..., whole:]], axis=-1)
    return jnp.sum(values, axis=-1)


def client_dots(updates: PyTree, others: PyTree, *, shared: bool = False, where: Array | None = None) -> Array:
    """``⟨xᵢ, yᵢ⟩`` per client over the whole tree; with ``shared``, the same ``y`` (no client axis) for all."""
    dtype = accumulator_dtype(_tree_accumulator_dtype(updates), _tree_accumulator_dtype(others))

    def dot_leaf(leaf: Array, other: Array) -> Array:
        other = other.astype(dtype)[None] if shared else other.astype(dtype)
        products = leaf.astype(dtype) * other
        return _pairwise_sum(products.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))

    dots = functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot_leaf, updates, others)))
    return dots if where is None else jnp.where(where, dots, 0)


def squared_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖²`` per client over the whole tree; 0 for an absent client."""
    return client_dots(updates, updates, where=where)


def finite_clients(updates: PyTree) -> Array:
    """Whether all of a client's coordinates, over the whole tree, are finite."""
    finite = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(updates)]
    return jnp.all(jnp.stack(finite), axis=0)


def accumulate_weighted(total: PyTree, update: PyTree, weight: Array) -> PyTree:
    """``total + weight · update`` for one client's tree."""
    return jax.tree.map(lambda leaf, new: leaf + weight.astype(leaf.dtype) * new.astype(leaf.dtype), total, update)


def stack_clients(updates: list[PyTree]) -> PyTree:
    """A list of n trees as one client-stacked tree."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)


# --- Robust ---------------------------------------------------------------------------------------------------


def trim_counts(trim_fraction: float, n_clients: int) -> np.ndarray:
    """``int(trim_fraction · m)`` for every number m of participating clients, 0 … n, in Python's arithmetic."""
    return np.array([int(trim_fraction * m) for m in range(n_clients + 1)], np.int32)


def median_trim_count(num_present: Any) -> Any:
    """The trim count that makes the trimmed mean of ``num_present`` clients their median."""
    return (num_present - 1) // 2


def _by_rank(leaf: Array, where: Array | None) -> tuple[Array, Array]:
    """Each coordinate's values in order, −inf < finite < +inf < NaN < absent, and whose they are; ties by index."""
    absent = jnp.broadcast_to(_over_parameters(~_present(where, leaf.shape[0]), leaf), leaf.shape)
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
    reached = (gained == jnp.inf) & (lost < jnp.inf) & (a + b == jnp.inf) & (b == jnp.inf)
    slides = _sum_is_less(lost, gained, a[None], b[None]) | reached
    return jnp.sum(slides, axis=0, dtype=jnp.int32)


def _selected(leaf: Array, trim_count: Any, where: Array | None, around_median: bool = False) -> tuple[Array, Array]:
    """Which clients are kept in each coordinate, and how many those are (0 or less: nobody).

    A trimmed mean keeps all but the ``trim_count`` smallest and greatest; ``around_median``, all but the ``trim_count``
    farthest from the median.
    """
    num_present = jnp.sum(_present(where, leaf.shape[0]), dtype=jnp.int32)
    trim_count = jnp.asarray(trim_count, jnp.int32) if not around_median else trim_count
    values, clients = _by_rank(leaf, where)
    ranks = jnp.argsort(clients, axis=0)
    if around_median:
        num_kept = num_present - trim_count
        first = _first_around_median(values, trim_count, num_present)
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
        num_present = jnp.sum(_present(where, n_clients))
        trim_count = jnp.asarray(trim_counts(trim_fraction, n_clients))[num_present]

    def reduce_leaf(leaf: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where)
        return _mean_without_overflow(selected, leaf, num_kept).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def coordinate_median(updates: PyTree, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """Per coordinate, the middle value, or the mean of the two middle values; NaN when nobody takes part."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    num_present = jnp.sum(_present(where, n_clients), dtype=jnp.int32)
    return trimmed_mean(updates, median_trim_count(num_present), where=where, out_dtype=out_dtype)


def mean_around_median(
    updates: PyTree, num_byzantine: int, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """Per coordinate, the mean without the ``num_byzantine`` values farthest from the median; NaN if none is left."""

    def reduce_leaf(leaf: Array) -> Array:
        selected, num_kept = _selected(leaf, num_byzantine, where, around_median=True)
        return _mean_without_overflow(selected, leaf, num_kept).astype(_result_dtype(leaf, out_dtype))

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
        return _mean_of_kept(selected, value, num_kept).astype(_result_dtype(leaf, out_dtype))

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


# --- Distances between clients ----------------------------------------------------------------------------------


def difference_dots(updates: PyTree, others: PyTree, *, where: Array | None = None) -> Array:
    """``⟨xᵢ − xⱼ, yᵢ − yⱼ⟩`` over the whole tree for every pair of clients; 0 for an absent one and on the diagonal."""
    dtype = _tree_accumulator_dtype(updates)

    def dots_leaf(leaf: Array, other: Array) -> Array:
        shape = (leaf.shape[0], math.prod(leaf.shape[1:]))
        rows, other_rows = leaf.reshape(shape).astype(dtype), other.reshape(shape).astype(dtype)
        return lax.map(lambda row: _pairwise_sum((rows - row[0]) * (other_rows - row[1])), (rows, other_rows))

    dots = functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dots_leaf, updates, others)))
    return jnp.where(_pairs(where, dots.shape[0]), dots, 0)


def _pairs(where: Array | None, n_clients: int) -> Array:
    """The pairs of two clients that both take part."""
    present = _present(where, n_clients)
    return present[:, None] & present[None] & ~jnp.eye(n_clients, dtype=bool)


def pairwise_squared_distances(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ − xⱼ‖²`` over the whole tree, by differences: nothing cancels.

    A client that is not finite is infinitely far from everyone else; all of an absent one's distances are infinite.
    """
    squares = difference_dots(updates, updates)
    squares = jnp.where(jnp.isnan(squares), jnp.inf, squares)
    present = _present(where, squares.shape[0])
    return jnp.where(present[:, None] & present[None], squares, jnp.inf)


def _touched(leaf: Array, weights: Array) -> Array:
    """The leaf, without what would make NaN of a weight of 0; where it makes 0, the weight has a derivative."""
    return jnp.where(_over_parameters(weights != 0, leaf) | jnp.isfinite(leaf), leaf, 0)


def mix_clients(updates: PyTree, mixing: Array, *, out_dtype: Any = None) -> PyTree:
    """``Σᵢ Mᵣᵢ xᵢ`` for every row r of the matrix; whoever's coefficient is 0 is not touched, NaN or not."""

    def mix_leaf(leaf: Array) -> Array:
        rows = lax.map(lambda row: weighted_sum(_touched(leaf, row), row), mixing)
        return rows.astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(mix_leaf, updates)


# --- A point among the clients ----------------------------------------------------------------------------------


def step_toward_clients(
    updates: PyTree, center: PyTree, weights: Array, *, where: Array | None = None
) -> tuple[PyTree, Array]:
    """``y = c + Σ wᵢ (xᵢ − c)``, and every client's distance ``‖xᵢ − y‖`` from there, over the whole tree.

    A client of weight 0 is measured but not touched. The distance of an absent client is 0, that of one that is not
    finite infinite.
    """
    dtype = _tree_accumulator_dtype(updates)
    present = _present(where, weights.shape[0])

    def move_leaf(leaf: Array, start: Array) -> Array:
        start = start.astype(accumulator_dtype(leaf.dtype))
        steps = leaf.astype(start.dtype) - start[None]
        return start + weighted_sum(_touched(steps, weights), weights, where=where)

    moved = jax.tree.map(move_leaf, updates, center)
    differences = jax.tree.leaves(jax.tree.map(lambda leaf, end: leaf.astype(end.dtype) - end[None], updates, moved))
    flat = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])).astype(dtype) for leaf in differences]
    # Relative to the largest difference no square overflows, and what it is relative to changes nothing.
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in flat])
    scale = lax.stop_gradient(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))[:, None]
    squares = functools.reduce(jnp.add, [_pairwise_sum((leaf / scale) ** 2) for leaf in flat])
    distances = scale[:, 0] * jnp.sqrt(squares)
    distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
    return moved, jnp.where(present, distances, 0)
