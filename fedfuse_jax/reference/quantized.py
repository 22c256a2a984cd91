"""Definitions: codes, and their sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax.reference.common import accumulator_dtype, or_nan, pairwise_sum

PyTree = Any


def as_vector(tree: PyTree) -> tuple[Array, Any]:
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
        return pairwise_sum(products)
    num_blocks = zero_points.shape[1]
    padded = jnp.pad(products, ((0, 0), (0, num_blocks * block_size - num_params)))
    return pairwise_sum(padded.reshape(-1, num_blocks, block_size))


def quantize(
    update: PyTree, *, num_bits: int = 8, block_size: int | None = None, key: Array | None = None
) -> tuple[Array, Array, Array]:
    """Codes from 0 to 2ᵇ − 1 between the least and the greatest value of each block; stochastic with a ``key``."""
    vector = as_vector(jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), update))[0]
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
