"""Definitions: sparse sums and top-k."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax.reference.common import accumulator_dtype, or_nan, over_parameters, pairwise_sum
from fedfuse_jax.reference.quantized import as_vector

PyTree = Any


def _heard(indices: Array, num_params: int, where: Array | None) -> Array:
    """Which entries of a sparse update count: those with an index in range, of a client that takes part."""
    inside = (indices >= 0) & (indices < num_params)
    return inside if where is None else inside & where[:, None]


def topk_sparse_weighted_sum(
    values: Array, indices: Array, weights: Array, num_params: int, *, where: Array | None = None
) -> Array:
    """``Σᵢ wᵢ xᵢ`` of sparse updates: entry j of client i adds ``wᵢ values[i, j]`` at ``indices[i, j]``."""
    dtype = accumulator_dtype(values.dtype)
    terms = values.astype(dtype) * over_parameters(weights.astype(dtype), values)
    # One past the end is out of range; a negative index would count from the end.
    targets = jnp.where(_heard(indices, num_params, where), indices, num_params)
    return jnp.zeros(num_params, dtype).at[targets].add(terms, mode="drop")


def sparse_spread(
    indices: Array, weights: Array, vector: Array, *, where: Array | None = None, dtype: Any = None
) -> Array:
    """The transpose of ``topk_sparse_weighted_sum``: ``wᵢ vector[indices[i, j]]``, 0 where an entry does not count."""
    heard = _heard(indices, vector.shape[0], where)
    found = vector.at[jnp.where(heard, indices, vector.shape[0])].get(mode="fill", fill_value=0)
    spread = jnp.where(heard, over_parameters(weights, indices) * found, 0)
    return spread.astype(vector.dtype if dtype is None else dtype)


def sparse_dots(values: Array, indices: Array, vector: Array, *, where: Array | None = None) -> Array:
    """``Σⱼ values[i, j] vector[indices[i, j]]`` per client, over the entries that count."""
    heard = _heard(indices, vector.shape[0], where)
    found = vector.at[jnp.where(heard, indices, vector.shape[0])].get(mode="fill", fill_value=0)
    return pairwise_sum(jnp.where(heard, values.astype(vector.dtype) * found, 0))


def topk_sparsify(update: PyTree, k: int, residual: PyTree | None = None) -> tuple[Array, Array, PyTree]:
    """The k entries of greatest magnitude of ``update + residual``, by index, and what is left over."""
    sums = jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), update)
    if residual is not None:
        sums = jax.tree.map(jnp.add, sums, residual)
    flat, unravel = as_vector(sums)
    # To top_k, a NaN without a sign is the greatest of all; at a tie, it gives the lower index.
    magnitude = lax.stop_gradient(jnp.abs(or_nan(~jnp.isnan(flat), flat)))
    _, chosen = lax.top_k(magnitude, k)
    chosen = jnp.sort(chosen)
    return flat[chosen], chosen, unravel(flat.at[chosen].set(0))
