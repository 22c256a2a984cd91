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


def _ranks(leaf: Array, where: Array | None) -> Array:
    """Every client's rank in each coordinate: −inf < finite < +inf < NaN < absent; ties by client index."""
    absent = jnp.broadcast_to(_over_parameters(~_present(where, leaf.shape[0]), leaf), leaf.shape)
    client = lax.broadcasted_iota(jnp.int32, leaf.shape, 0)
    # lax.sort holds -0 and 0 for equal, and every NaN for equal and greatest: the order the contract asks for.
    # Ranks are constant almost everywhere, and the derivative of a sort is not free.
    keys = (absent, lax.stop_gradient(leaf), client)
    _, _, by_rank = lax.sort(keys, dimension=0, num_keys=2, is_stable=True)
    return jnp.argsort(by_rank, axis=0)


def _mean_of_kept(selected: Array, values: Array, num_kept: Array) -> Array:
    """The mean over the selected clients in each coordinate; NaN when there are none."""
    dtype = accumulator_dtype(values.dtype)
    total = jnp.sum(jnp.where(selected, values.astype(dtype), 0), axis=0)
    return jnp.where(num_kept > 0, total / jnp.maximum(num_kept, 1).astype(dtype), jnp.nan)


def _selected(leaf: Array, trim_count: Any, where: Array | None) -> tuple[Array, Array]:
    """Which clients a trimmed mean keeps in each coordinate, and how many those are (0 or less: nobody)."""
    num_present = jnp.sum(_present(where, leaf.shape[0]), dtype=jnp.int32)
    trim_count = jnp.asarray(trim_count, jnp.int32)
    ranks = _ranks(leaf, where)
    num_kept = jnp.where(trim_count < 0, 0, num_present - 2 * trim_count)
    return (ranks >= trim_count) & (ranks < trim_count + num_kept), num_kept


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
        mean = _mean_of_kept(selected, leaf, num_kept)
        # A sum may overflow where the mean does not; halving first then costs nothing but time.
        exponent = 2.0 ** -math.ceil(math.log2(n_clients + 1)) if isinstance(n_clients, int) else 2.0**-31
        scaled = _mean_of_kept(selected, leaf.astype(mean.dtype) * exponent, num_kept) / exponent
        return jnp.where(jnp.isfinite(mean), mean, scaled).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def coordinate_median(updates: PyTree, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """Per coordinate, the middle value, or the mean of the two middle values; NaN when nobody takes part."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    num_present = jnp.sum(_present(where, n_clients), dtype=jnp.int32)
    return trimmed_mean(updates, median_trim_count(num_present), where=where, out_dtype=out_dtype)


def selected_mean(
    updates: PyTree, values: PyTree, trim_count: Any, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """Per coordinate, the mean of ``values`` over the clients that the trimmed mean of ``updates`` keeps."""

    def reduce_leaf(leaf: Array, value: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where)
        return _mean_of_kept(selected, value, num_kept).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates, values)


def spread_to_selected(updates: PyTree, cotangents: PyTree, trim_count: Any, *, where: Array | None = None) -> PyTree:
    """The transpose of ``selected_mean``: a kept client gets its share of the cotangent, the others exactly 0."""

    def spread_leaf(leaf: Array, cotangent: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        selected, num_kept = _selected(leaf, trim_count, where)
        share = cotangent.astype(dtype) / jnp.maximum(num_kept, 1).astype(dtype)
        return jnp.where(selected, share[None], 0).astype(leaf.dtype)

    return jax.tree.map(spread_leaf, updates, cotangents)


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
    magnitude = lax.stop_gradient(jnp.where(jnp.isnan(flat), jnp.nan, jnp.abs(flat)))
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
    products = (levels - _over_blocks(zero_points.astype(vector.dtype), num_params, block_size)) * vector
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
    blocks = jnp.pad(vector, (0, -size % width), mode="edge").reshape(-1, width)
    least, greatest = jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)
    finite = jnp.isfinite(least) & jnp.isfinite(greatest)
    scales = greatest / top - least / top  # whose difference may overflow
    is_flat = scales == 0  # all values alike: one times (0 − (−value)) is the value itself
    safe = jnp.where(finite & ~is_flat, scales, 1)
    zero_points = jnp.where(finite, -least / safe, 0)
    # Halves, so that no difference overflows.
    positions = (blocks / 2 - least[:, None] / 2) / (safe[:, None] / 2)
    positions = jnp.where((finite & ~is_flat)[:, None], jnp.clip(positions, 0, top), 0).reshape(-1)[:size]
    if key is None:
        levels = jnp.round(positions)
    else:
        below = jnp.floor(positions)
        levels = below + (jax.random.uniform(key, (size,), dtype) < positions - below)
    scales = jnp.where(finite, safe, jnp.nan)
    codes = pack_codes(levels.astype(np.uint8), num_bits)
    return (codes, scales[0], zero_points[0]) if block_size is None else (codes, scales, zero_points)


def _hadamard_matrix(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def walsh_hadamard_transform(vector: Array) -> Array:
    """``H x / √d`` for ``d`` a power of two, in Sylvester's order: orthonormal, symmetric, its own inverse."""
    size, largest = vector.shape[0], 64
    factors: list[int] = []
    while math.prod(factors) < size:
        factors.append(min(largest, size // math.prod(factors)))
    # H is a Kronecker product of small ones: each acts along an axis of its own.
    cube = vector.reshape(factors)
    for axis, factor in enumerate(factors):
        matrix = jnp.asarray(_hadamard_matrix(factor), vector.dtype)
        cube = jnp.moveaxis(jnp.tensordot(cube, matrix, (axis, 0), precision=lax.Precision.HIGHEST), -1, axis)
    return cube.reshape(-1) / math.sqrt(size)


def _leaf_keys(key: Array, num_leaves: int) -> Any:
    return [key] if num_leaves == 1 else jax.random.split(key, num_leaves)


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

    rotated = [rotate(*pair) for pair in zip(leaves, _leaf_keys(key, len(leaves)), strict=True)]
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
    keys = _leaf_keys(key, len(leaves))
    back = [rotate_back(*parts) for parts in zip(leaves, keys, shapes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(rotated), back)
