"""Definition: the randomised Hadamard rotation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax.reference.common import accumulator_dtype
from fedfuse_jax.reference.private import leaf_keys

PyTree = Any


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
