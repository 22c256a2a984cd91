"""Definition: one step of a point toward the clients."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax.reference.common import accumulator_dtype, pairwise_sum, presence, tree_accumulator_dtype
from fedfuse_jax.reference.linear import weighted_sum
from fedfuse_jax.reference.mixing import touched

PyTree = Any


def step_toward_clients(
    updates: PyTree, center: PyTree, weights: Array, *, where: Array | None = None
) -> tuple[PyTree, Array]:
    """``y = c + Σ wᵢ (xᵢ − c)``, and every client's distance ``‖xᵢ − y‖`` from there, over the whole tree.

    A client of weight 0 is measured but not touched. The distance of an absent client is 0, that of one that is not
    finite infinite.
    """
    dtype = tree_accumulator_dtype(updates)
    present = presence(where, weights.shape[0])

    def move_leaf(leaf: Array, start: Array) -> Array:
        start = start.astype(accumulator_dtype(leaf.dtype))
        steps = leaf.astype(start.dtype) - start[None]
        return start + weighted_sum(touched(steps, weights), weights, where=where)

    moved = jax.tree.map(move_leaf, updates, center)
    differences = jax.tree.leaves(jax.tree.map(lambda leaf, end: leaf.astype(end.dtype) - end[None], updates, moved))
    flat = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])).astype(dtype) for leaf in differences]
    # Relative to the largest difference no square overflows, and what it is relative to changes nothing.
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in flat])
    scale = lax.stop_gradient(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))[:, None]
    squares = functools.reduce(jnp.add, [pairwise_sum((leaf / scale) ** 2) for leaf in flat])
    distances = scale[:, 0] * jnp.sqrt(squares)
    distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
    return moved, jnp.where(present, distances, 0)
