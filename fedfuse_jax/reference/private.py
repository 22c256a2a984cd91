"""Definitions: clipping, noise, and the adaptive clip norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax.reference.common import accumulator_dtype, or_nan, over_parameters, presence, tree_accumulator_dtype
from fedfuse_jax.reference.linear import weighted_sum
from fedfuse_jax.reference.norms import norm_parts

PyTree = Any


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
    dtype = tree_accumulator_dtype(updates)
    max_norm = jnp.asarray(max_norm, dtype)
    scale, root = (jnp.ones_like(given_norms), given_norms) if given_norms is not None else norm_parts(updates, where)
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
    kept = jnp.isfinite(norms) & presence(where, norms.shape[0])
    shrunk = jax.tree.map(lambda x: x.astype(dtype) * over_parameters(shrink, x), updates)
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
    present = presence(where, norms.shape[0])
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
