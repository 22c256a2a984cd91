"""Definitions: pairwise squared distances and products of differences."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax.reference.common import pairwise_sum, presence, tree_accumulator_dtype

PyTree = Any


def difference_dots(updates: PyTree, others: PyTree, *, where: Array | None = None) -> Array:
    """``⟨xᵢ − xⱼ, yᵢ − yⱼ⟩`` over the whole tree for every pair of clients; 0 for an absent one and on the diagonal."""
    dtype = tree_accumulator_dtype(updates)

    def dots_leaf(leaf: Array, other: Array) -> Array:
        shape = (leaf.shape[0], math.prod(leaf.shape[1:]))
        rows, other_rows = leaf.reshape(shape).astype(dtype), other.reshape(shape).astype(dtype)
        return lax.map(
            lambda row: pairwise_sum((rows - row[0][None]) * (other_rows - row[1][None])), (rows, other_rows)
        )

    dots = functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dots_leaf, updates, others)))
    return jnp.where(_pairs(where, dots.shape[0]), dots, 0)


def _pairs(where: Array | None, n_clients: int) -> Array:
    """The pairs of two clients that both take part."""
    present = presence(where, n_clients)
    return present[:, None] & present[None] & ~jnp.eye(n_clients, dtype=bool)


def pairwise_squared_distances(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ − xⱼ‖²`` over the whole tree, by differences: nothing cancels.

    A client that is not finite is infinitely far from everyone else; all of an absent one's distances are infinite.
    """
    squares = difference_dots(updates, updates)
    squares = jnp.where(jnp.isnan(squares), jnp.inf, squares)
    present = presence(where, squares.shape[0])
    return jnp.where(present[:, None] & present[None], squares, jnp.inf)
