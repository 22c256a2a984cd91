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


def or_nan(condition: Any, value: Array) -> Array:
    """``value`` where the condition holds, NaN elsewhere; where it holds everywhere, no NaN for ``jax_debug_nans``."""
    return jnp.where(condition, value, jnp.sqrt(jnp.where(condition, 1, -1).astype(value.dtype)))


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


def trim_counts(trim_fraction: Any, n_clients: int) -> np.ndarray:
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
    reached = (gained == jnp.inf) & (lost < jnp.inf) & ((a + b == jnp.inf) & (b == jnp.inf))[None]
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
        return lax.map(
            lambda row: _pairwise_sum((rows - row[0][None]) * (other_rows - row[1][None])), (rows, other_rows)
        )

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


# --- Private --------------------------------------------------------------------------------------------------


def power_of_two_near(largest: Array) -> Array:
    """A power of two to divide by, exactly, so that squares of what is no larger neither overflow nor vanish.

    Neither it nor its reciprocal, which XLA may multiply by instead, is subnormal. Infinities and NaNs have none, and
    go through the quotient.
    """
    info = jnp.finfo(largest.dtype)
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, int(info.minexp), int(info.maxexp) - 3)
    return lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))


def _norm_parts(updates: PyTree, where: Array | None) -> tuple[Array, Array]:
    """Each client's norm as ``scale · root``: squares of scaled coordinates neither overflow nor vanish."""
    dtype = _tree_accumulator_dtype(updates)

    def present(leaf: Array) -> Array:
        leaf = leaf.astype(dtype).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        return leaf if where is None else jnp.where(where[:, None], leaf, 0)

    leaves = [present(leaf) for leaf in jax.tree.leaves(updates)]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in leaves])
    scale = power_of_two_near(largest)
    total = functools.reduce(jnp.add, [_pairwise_sum((leaf / scale[:, None]) ** 2) for leaf in leaves])
    nothing = total == 0
    return scale, jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, total)))


def client_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖`` per client over the whole tree, also where the square would overflow; 0 for an absent client."""
    scale, root = _norm_parts(updates, where)
    return scale * root


def clipped_weighted_sum(
    updates: PyTree,
    weights: Array,
    max_norm: Array,
    *,
    where: Array | None = None,
    return_norms: bool = False,
    given_norms: Array | None = None,
) -> Any:
    """``Σ wᵢ min(1, C / ‖xᵢ‖) xᵢ``; a client whose norm is not finite contributes 0. NaN for a C below 0."""
    dtype = _tree_accumulator_dtype(updates)
    max_norm = jnp.asarray(max_norm, dtype)
    scale, root = (jnp.ones_like(given_norms), given_norms) if given_norms is not None else _norm_parts(updates, where)
    norms = scale * root
    clipped = norms > max_norm
    # wC / ‖x‖ may be too small a number: x is multiplied first by a power of two that has half of its exponent.
    weights = weights.astype(dtype)
    most = jnp.where(clipped, weights * jnp.where(clipped, max_norm, 0), 1)
    safe_root = jnp.where(clipped, root, 1)
    exponent = jnp.frexp(most)[1] - jnp.frexp(scale)[1] - jnp.frexp(safe_root)[1]
    least, quarter = jnp.finfo(dtype).minexp + 2, jnp.finfo(dtype).maxexp // 4
    half = jnp.where(jnp.isfinite(most) & (exponent < -3 * quarter), exponent // 2, 0)
    # Nor is ‖x‖ times that power to be too large a number, by which XLA may choose to divide.
    half = jnp.where(jnp.isfinite(norms) & (norms < 2.0 ** (2 * quarter)), half, jnp.minimum(half, -quarter))
    half = jnp.where(clipped, jnp.maximum(half, least), 0)
    shrink = lax.stop_gradient(jnp.ldexp(jnp.ones_like(root), half))
    coefficients = jnp.where(clipped, most / (scale * shrink) / safe_root, weights)
    coefficients = or_nan(max_norm >= 0, coefficients)
    kept = jnp.isfinite(norms) & _present(where, norms.shape[0])
    shrunk = jax.tree.map(lambda x: x.astype(dtype) * _over_parameters(shrink, x), updates)
    total = weighted_sum(shrunk, coefficients, where=kept)
    total = jax.tree.map(lambda y, x: y.astype(accumulator_dtype(x.dtype)), total, updates)
    return (total, norms) if return_norms else total


def leaf_keys(key: Array, num_leaves: int) -> list[Array]:
    """The key of each leaf's noise: the key itself for one leaf, the parts of a split for several."""
    return [key] if num_leaves == 1 else list(jax.random.split(key, num_leaves))


def add_noise(totals: PyTree, key: Array, stddev: Array) -> PyTree:
    """Adds ``stddev`` times float32 normals to each leaf, ``jax.random.normal``'s own."""
    leaves, structure = jax.tree.flatten(totals)
    keys = leaf_keys(key, len(leaves))
    noisy = [
        leaf + jnp.asarray(stddev, leaf.dtype) * jax.random.normal(k, leaf.shape, np.float32).astype(leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def noisy_weighted_sum(
    key: Array, updates: PyTree, weights: Array, stddev: Array, *, where: Array | None = None
) -> PyTree:
    """``Σ wᵢ xᵢ + stddev · z``, z standard normal."""
    return add_noise(weighted_sum(updates, weights, where=where), key, stddev)


def clipped_noisy_weighted_sum(
    key: Array,
    updates: PyTree,
    weights: Array,
    max_norm: Array,
    stddev: Array,
    *,
    where: Array | None = None,
    return_norms: bool = False,
) -> Any:
    """``Σ wᵢ min(1, C / ‖xᵢ‖) xᵢ + stddev · z``, z standard normal."""
    total, norms = clipped_weighted_sum(updates, weights, max_norm, where=where, return_norms=True)
    total = add_noise(total, key, stddev)
    return (total, norms) if return_norms else total


# Folded into a round's key for the noise on a count: the words "coun". jax.random.split gives leaf i of a tree what
# jax.random.fold_in(key, i) is, so a small number would be some leaf's key again.
COUNT_STREAM = 0x636F756E


def adaptive_clip_norm(
    clip_norm: Array,
    norms: Array,
    *,
    target_quantile: Any = 0.5,
    learning_rate: Any = 0.2,
    key: Array | None = None,
    count_stddev: Any = 0.0,
    where: Array | None = None,
) -> Array:
    """``C · exp(−η (b − γ))``, b the share of clients with ``‖xᵢ‖ ≤ C``, with noise on their count."""
    present = _present(where, norms.shape[0])
    count = jnp.sum((norms <= clip_norm) & present, dtype=clip_norm.dtype)
    if key is not None:
        # Of another key than a sum's, or whoever is given both for one key reads the noise off either.
        noise = jax.random.normal(jax.random.fold_in(key, COUNT_STREAM), (), np.float32)
        count = count + count_stddev * noise.astype(clip_norm.dtype)
    num_present = jnp.sum(present, dtype=clip_norm.dtype)
    share = or_nan(num_present > 0, count / jnp.maximum(num_present, 1))
    moved = clip_norm * jnp.exp(-learning_rate * (share - target_quantile))
    # Never silently without its noise. (XLA may lose a NaN that goes through exp, before JAX 0.12.)
    return moved if key is not None else or_nan(jnp.equal(count_stddev, 0), moved)


# --- Server optimizers ----------------------------------------------------------------------------------------

SERVER_RULES = ("avgm", "adagrad", "adam", "yogi")


def server_step(
    rule: str,
    param: Array,
    first: Array,
    second: Array,
    delta: Array,
    learning_rate: Array,
    b1: Array,
    b2: Array,
    tau: Array,
) -> tuple[Array, Array, Array]:
    """One leaf's step along ``delta``, in the dtype of its state: (parameters, first moment, second moment)."""
    square = delta * delta
    if rule == "avgm":
        first = b1 * first + delta
        step = learning_rate * first
    else:
        first = b1 * first + (1 - b1) * delta
        if rule == "adagrad":
            second = second + square
        elif rule == "adam":
            second = b2 * second + (1 - b2) * square
        else:
            second = second - (1 - b2) * square * jnp.sign(second - square)
        # Without anything to divide by, a coordinate stays where it is. (In both places the derivative is 0, not NaN.)
        nothing = second == 0
        divisor = jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, second))) + tau
        stays = divisor == 0
        step = jnp.where(stays, 0, learning_rate * first / jnp.where(stays, 1, divisor))
    return (param.astype(first.dtype) + step).astype(param.dtype), first, second


def server_update(
    rule: str,
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None,
    where: Array | None,
    learning_rate: Any,
    b1: Any = 0.0,
    b2: Any = 0.0,
    tau: Any = 0.0,
) -> tuple[PyTree, Any]:
    """Steps parameters and state along the weighted mean; nothing moves if anything new would not be finite."""
    delta = weighted_mean(updates, weights, where=where)
    someone = jnp.any(_present(where, jax.tree.leaves(updates)[0].shape[0]))

    def narrowed(leaf: Array, first: Array) -> Array:
        return leaf.astype(first.dtype)

    delta = jax.tree.map(narrowed, delta, state.first_moment)

    def step_leaf(param: Array, first: Array, second: Array, leaf: Array) -> tuple[Array, Array, Array]:
        scalars = [jnp.asarray(scalar, first.dtype) for scalar in (learning_rate, b1, b2, tau)]
        return server_step(rule, param, first, second, leaf, *scalars)

    leaves, structure = jax.tree.flatten(params)
    others = [jax.tree.leaves(tree) for tree in (state.first_moment, state.second_moment)]
    old = list(zip(leaves, *others, strict=True))
    stepped = [step_leaf(*each) for each in zip(leaves, *others, jax.tree.leaves(delta), strict=True)]
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(stepped)]
    good = functools.reduce(jnp.logical_and, finite, someone)
    kept = jax.tree.map(lambda y, x: jnp.where(good, y, x), stepped, old)
    trees = [jax.tree.unflatten(structure, part) for part in zip(*kept, strict=True)]
    return trees[0], type(state)(next_step(state.step, good), *trees[1:])


def next_step(step: Array, counts: Array) -> Array:
    """One more where the round counts; the greatest number there is stays."""
    return step + (counts & (step < jnp.iinfo(step.dtype).max)).astype(step.dtype)


def fedavgm_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    momentum: Any = 0.9,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β m + Δ``, ``x ← x + η m``."""
    return server_update("avgm", params, state, updates, weights, where, learning_rate, momentum)


def fedadagrad_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.0,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β₁ m + (1 − β₁) Δ``, ``v ← v + Δ²``, ``x ← x + η m / (√v + τ)``."""
    return server_update("adagrad", params, state, updates, weights, where, learning_rate, b1, tau=tau)


def fedadam_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β₁ m + (1 − β₁) Δ``, ``v ← β₂ v + (1 − β₂) Δ²``, ``x ← x + η m / (√v + τ)``."""
    return server_update("adam", params, state, updates, weights, where, learning_rate, b1, b2, tau)


def fedyogi_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """FedAdam but for ``v ← v − (1 − β₂) Δ² sign(v − Δ²)``."""
    return server_update("yogi", params, state, updates, weights, where, learning_rate, b1, b2, tau)


# --- Compressed -----------------------------------------------------------------------------------------------


def _heard(indices: Array, num_params: int, where: Array | None) -> Array:
    """Which entries of a sparse update count: those with an index in range, of a client that takes part."""
    inside = (indices >= 0) & (indices < num_params)
    return inside if where is None else inside & where[:, None]


def topk_sparse_weighted_sum(
    values: Array, indices: Array, weights: Array, num_params: int, *, where: Array | None = None
) -> Array:
    """``Σᵢ wᵢ xᵢ`` of sparse updates: entry j of client i adds ``wᵢ values[i, j]`` at ``indices[i, j]``."""
    dtype = accumulator_dtype(values.dtype)
    terms = values.astype(dtype) * _over_parameters(weights.astype(dtype), values)
    # One past the end is out of range; a negative index would count from the end.
    targets = jnp.where(_heard(indices, num_params, where), indices, num_params)
    return jnp.zeros(num_params, dtype).at[targets].add(terms, mode="drop")


def sparse_spread(
    indices: Array, weights: Array, vector: Array, *, where: Array | None = None, dtype: Any = None
) -> Array:
    """The transpose of ``topk_sparse_weighted_sum``: ``wᵢ vector[indices[i, j]]``, 0 where an entry does not count."""
    heard = _heard(indices, vector.shape[0], where)
    found = vector.at[jnp.where(heard, indices, vector.shape[0])].get(mode="fill", fill_value=0)
    spread = jnp.where(heard, _over_parameters(weights, indices) * found, 0)
    return spread.astype(vector.dtype if dtype is None else dtype)


def sparse_dots(values: Array, indices: Array, vector: Array, *, where: Array | None = None) -> Array:
    """``Σⱼ values[i, j] vector[indices[i, j]]`` per client, over the entries that count."""
    heard = _heard(indices, vector.shape[0], where)
    found = vector.at[jnp.where(heard, indices, vector.shape[0])].get(mode="fill", fill_value=0)
    return _pairwise_sum(jnp.where(heard, values.astype(vector.dtype) * found, 0))


def topk_sparsify(update: PyTree, k: int, residual: PyTree | None = None) -> tuple[Array, Array, PyTree]:
    """The k entries of greatest magnitude of ``update + residual``, by index, and what is left over."""
    sums = jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), update)
    if residual is not None:
        sums = jax.tree.map(jnp.add, sums, residual)
    flat, unravel = _as_vector(sums)
    # To top_k, a NaN without a sign is the greatest of all; at a tie, it gives the lower index.
    magnitude = lax.stop_gradient(jnp.abs(or_nan(~jnp.isnan(flat), flat)))
    _, chosen = lax.top_k(magnitude, k)
    chosen = jnp.sort(chosen)
    return flat[chosen], chosen, unravel(flat.at[chosen].set(0))


def _as_vector(tree: PyTree) -> tuple[Array, Any]:
    """The leaves one after the other as one vector, and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    dtype = accumulator_dtype(*(leaf.dtype for leaf in leaves))
    vectors = [leaf.reshape(-1).astype(dtype) for leaf in leaves]
    vector = vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors)

    def unravel(vector: Array) -> PyTree:
        back, first = [], 0
        for leaf in leaves:
            back.append(vector[first : first + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            first += leaf.size
        return jax.tree.unflatten(structure, back)

    return vector, unravel


def unpack_codes(codes: Array, num_bits: int) -> Array:
    """One code an element: of 4-bit codes, two a byte, the low half comes first. Halves of int8 have a sign."""
    if num_bits == 8:
        return codes
    if codes.dtype == np.int8:
        halves = [lax.shift_right_arithmetic(lax.shift_left(codes, np.int8(4)), np.int8(4)), codes >> 4]
    else:
        halves = [codes & 15, codes >> 4]
    return jnp.stack(halves, axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def pack_codes(codes: Array, num_bits: int) -> Array:
    """uint8 codes as they travel: 4-bit codes two a byte, the low half first; the last half may be empty (0)."""
    if num_bits == 8:
        return codes
    pairs = jnp.pad(codes, (0, codes.shape[0] % 2)).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _over_blocks(per_block: Array, num_params: Any, block_size: int | None) -> Array:
    """``(n, n_blocks)`` numbers, or ``(n,)``, so that they broadcast against ``(n, num_params)``."""
    if block_size is None:
        return per_block[:, None]
    return jnp.take(per_block, jnp.arange(num_params) // block_size, axis=1)


def quantized_weighted_sum(
    codes: Array,
    scales: Array,
    zero_points: Array,
    weights: Array,
    *,
    num_bits: int = 8,
    num_params: int | None = None,
    block_size: int | None = None,
    where: Array | None = None,
) -> Array:
    """``Σ wᵢ sᵢ (qᵢ − zᵢ)``, with a scale and a zero point for each client, or for each block of each client."""
    dtype = accumulator_dtype(scales.dtype, zero_points.dtype)
    levels = unpack_codes(codes, num_bits)[:, :num_params].astype(dtype)
    slopes = weights.astype(dtype).reshape((-1,) + (1,) * (scales.ndim - 1)) * scales.astype(dtype)
    size = levels.shape[1]
    terms = _over_blocks(slopes, size, block_size) * (
        levels - _over_blocks(zero_points.astype(dtype), size, block_size)
    )
    return jnp.sum(terms if where is None else jnp.where(where[:, None], terms, 0), axis=0)


def quantized_dots(
    codes: Array,
    zero_points: Array,
    vector: Array,
    *,
    num_bits: int = 8,
    block_size: int | None = None,
    where: Array | None = None,
) -> Array:
    """``Σⱼ (qᵢⱼ − zᵢ) vⱼ`` per client, or per block of each client: what the sum's derivatives are made of."""
    num_params = vector.shape[0]
    levels = unpack_codes(codes, num_bits)[:, :num_params].astype(vector.dtype)
    products = (levels - _over_blocks(zero_points.astype(vector.dtype), num_params, block_size)) * vector[None]
    if where is not None:
        products = jnp.where(where[:, None], products, 0)
    if block_size is None:
        return _pairwise_sum(products)
    num_blocks = zero_points.shape[1]
    padded = jnp.pad(products, ((0, 0), (0, num_blocks * block_size - num_params)))
    return _pairwise_sum(padded.reshape(-1, num_blocks, block_size))


def quantize(
    update: PyTree, *, num_bits: int = 8, block_size: int | None = None, key: Array | None = None
) -> tuple[Array, Array, Array]:
    """Codes from 0 to 2ᵇ − 1 between the least and the greatest value of each block; stochastic with a ``key``."""
    vector = _as_vector(jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), update))[0]
    dtype, size, top = vector.dtype, vector.shape[0], 2**num_bits - 1
    if size == 0:
        shape = () if block_size is None else (0,)
        return jnp.zeros(0, np.uint8), jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
    width = size if block_size is None else block_size
    # The last block may be short: its last value again changes neither its least nor its greatest.
    num_blocks = 1 if block_size is None else (size + width - 1) // width
    blocks = jnp.pad(vector, (0, num_blocks * width - size), mode="edge").reshape(num_blocks, width)
    least, greatest = jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)
    finite = jnp.isfinite(least) & jnp.isfinite(greatest)
    # Halves, whose difference does not overflow, and is 0 exactly, however it is compiled, where all values are alike.
    scales = (greatest / 2 - least / 2) / (top / 2)
    is_flat = scales == 0  # one times (0 − (−value)) is the value itself
    safe = jnp.where(finite & ~is_flat, scales, 1)
    zero_points = jnp.where(finite, -least / safe, 0)
    positions = (blocks / 2 - least[:, None] / 2) / (safe[:, None] / 2)
    positions = jnp.where((finite & ~is_flat)[:, None], jnp.clip(positions, 0, top), 0).reshape(-1)[:size]
    if key is None:
        levels = jnp.round(positions)
    else:
        below = jnp.floor(positions)
        levels = below + (jax.random.uniform(key, (size,), dtype) < positions - below).astype(dtype)
    scales = or_nan(finite, safe)
    codes = pack_codes(levels.astype(np.uint8), num_bits)
    return (codes, scales[0], zero_points[0]) if block_size is None else (codes, scales, zero_points)


def walsh_hadamard_transform(vector: Array) -> Array:
    """``H x / √d`` for ``d`` a power of two, in Sylvester's order: orthonormal, symmetric, its own inverse."""
    size, distance = vector.shape[0], 1
    result = vector
    while distance < size:
        # Two levels of butterflies in one pass over memory; three are no faster.
        radix = min(4, size // distance)
        blocks = result.reshape(-1, radix, distance)
        parts = [blocks[:, i] for i in range(radix)]
        for half in (1, 2)[: radix // 2]:
            parts = [parts[i - half] - parts[i] if i & half else parts[i] + parts[i + half] for i in range(radix)]
        result = jnp.stack(parts, axis=1).reshape(-1)
        distance *= radix
    return result / math.sqrt(size)


def padded_size(size: int) -> int:
    """The next power of two."""
    return 0 if size == 0 else 1 << (size - 1).bit_length()


def hadamard_rotation(update: PyTree, key: Array) -> PyTree:
    """``H D x / √d`` of each leaf, padded with zeros to a power of two: D holds random signs, H is Hadamard's."""
    leaves = jax.tree.leaves(update)

    def rotate(leaf: Array, key: Array) -> Array:
        flat = leaf.astype(accumulator_dtype(leaf.dtype)).reshape(-1)
        size = padded_size(leaf.size)
        signs = jax.random.rademacher(key, (size,), flat.dtype)
        return walsh_hadamard_transform(jnp.pad(flat, (0, size - leaf.size)) * signs) if size else flat

    rotated = [rotate(*pair) for pair in zip(leaves, leaf_keys(key, len(leaves)), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(update), rotated)


def inverse_hadamard_rotation(rotated: PyTree, key: Array, like: PyTree) -> PyTree:
    """The inverse of ``hadamard_rotation``: leaves of the shapes that ``like`` has."""
    leaves = jax.tree.leaves(rotated)

    def rotate_back(leaf: Array, key: Array, shape: tuple[int, ...]) -> Array:
        flat = leaf.astype(accumulator_dtype(leaf.dtype))
        if leaf.size:
            flat = walsh_hadamard_transform(flat) * jax.random.rademacher(key, leaf.shape, flat.dtype)
        return flat[: math.prod(shape)].reshape(shape)

    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(like)]
    keys = leaf_keys(key, len(leaves))
    back = [rotate_back(*parts) for parts in zip(leaves, keys, shapes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(rotated), back)
