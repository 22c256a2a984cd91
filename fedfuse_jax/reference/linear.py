"""Definitions: weighted sums, means, and their transposes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedfuse_jax.reference.common import (
    accumulator_dtype,
    over_parameters,
    pairwise_sum,
    result_dtype,
    tree_accumulator_dtype,
)

PyTree = Any


def weighted_sum(updates: PyTree, weights: Array, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """``Σ wᵢ xᵢ`` over the clients that take part; 0 when nobody does."""

    def reduce_leaf(leaf: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        terms = leaf.astype(dtype) * over_parameters(weights.astype(dtype), leaf)
        if where is not None:
            terms = jnp.where(over_parameters(where, leaf), terms, 0)
        return jnp.sum(terms, axis=0).astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def weighted_spread(
    weights: Array, cotangents: list[Array], *, where: Array | None = None, dtypes: Sequence[Any]
) -> list[Array]:
    """The transpose of ``weighted_sum``: ``wᵢ`` times the cotangent for every client, exactly 0 for an absent one."""

    def spread_leaf(cotangent: Array, dtype: Any) -> Array:
        accumulator = accumulator_dtype(dtype)
        stacked = cotangent.astype(accumulator)[None]
        products = over_parameters(weights.astype(accumulator), stacked) * stacked
        if where is not None:
            products = jnp.where(over_parameters(where, stacked), products, 0)
        return products.astype(dtype)

    return [spread_leaf(cotangent, dtype) for cotangent, dtype in zip(cotangents, dtypes, strict=True)]


def weighted_mean(
    updates: PyTree, weights: Array | None = None, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """``Σ wᵢ xᵢ / Σ wᵢ`` over the clients that take part; NaN when nobody does."""
    if weights is None:
        weights = jnp.ones(jax.tree.leaves(updates)[0].shape[0], tree_accumulator_dtype(updates))
    weights = weights.astype(tree_accumulator_dtype(updates))
    total_weight = jnp.sum(weights if where is None else jnp.where(where, weights, 0))

    def reduce_leaf(leaf: Array) -> Array:
        total = weighted_sum(leaf, weights, where=where)
        return (total / total_weight.astype(total.dtype)).astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def client_dots(updates: PyTree, others: PyTree, *, shared: bool = False, where: Array | None = None) -> Array:
    """``⟨xᵢ, yᵢ⟩`` per client over the whole tree; with ``shared``, the same ``y`` (no client axis) for all."""
    dtype = accumulator_dtype(tree_accumulator_dtype(updates), tree_accumulator_dtype(others))

    def dot_leaf(leaf: Array, other: Array) -> Array:
        other = other.astype(dtype)[None] if shared else other.astype(dtype)
        products = leaf.astype(dtype) * other
        return pairwise_sum(products.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))

    dots = functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot_leaf, updates, others)))
    return dots if where is None else jnp.where(where, dots, 0)
