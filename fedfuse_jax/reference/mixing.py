"""Definition: combinations of clients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax.reference.common import over_parameters, result_dtype
from fedfuse_jax.reference.linear import weighted_sum

PyTree = Any


def touched(leaf: Array, weights: Array) -> Array:
    """The leaf, without what would make NaN of a weight of 0; where it makes 0, the weight has a derivative."""
    return jnp.where(over_parameters(weights != 0, leaf) | jnp.isfinite(leaf), leaf, 0)


def mix_clients(updates: PyTree, mixing: Array, *, out_dtype: Any = None) -> PyTree:
    """``Σᵢ Mᵣᵢ xᵢ`` for every row r of the matrix; whoever's coefficient is 0 is not touched, NaN or not."""

    def mix_leaf(leaf: Array) -> Array:
        rows = lax.map(lambda row: weighted_sum(touched(leaf, row), row), mixing)
        return rows.astype(result_dtype(leaf, out_dtype))

    return jax.tree.map(mix_leaf, updates)
