"""What several definitions share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PyTree = Any


def accumulator_dtype(*dtypes: Any) -> np.dtype:
    """The dtype sums are kept in: float64 if any of ``dtypes`` is, float32 otherwise."""
    return np.dtype(np.float64 if any(np.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)


def tree_accumulator_dtype(tree: PyTree) -> np.dtype:
    """The dtype that sums over a whole tree are kept in."""
    return accumulator_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


def result_dtype(leaf: Array, out_dtype: Any) -> np.dtype:
    """The dtype of a leaf's result."""
    return accumulator_dtype(leaf.dtype) if out_dtype is None else np.dtype(out_dtype)


def over_parameters(per_client: Array, leaf: Array) -> Array:
    """Reshapes ``(n_clients,)`` so that it broadcasts against a client-stacked leaf."""
    return per_client.reshape(per_client.shape + (1,) * (leaf.ndim - 1))


def presence(where: Array | None, n_clients: int) -> Array:
    """``where``, or everybody."""
    return jnp.ones(n_clients, bool) if where is None else where


def or_nan(condition: Any, value: Array) -> Array:
    """``value`` where the condition holds, NaN elsewhere; where it holds everywhere, no NaN for ``jax_debug_nans``."""
    return jnp.where(condition, value, jnp.sqrt(jnp.where(condition, 1, -1).astype(value.dtype)))


def pairwise_sum(values: Array) -> Array:
    """Sums over the last axis in blocks of blocks, so that the error grows with log(size), not with size."""
    block = 512
    while isinstance(values.shape[-1], int) and values.shape[-1] > block:
        whole = values.shape[-1] // block * block
        blocks = values[..., :whole].reshape(*values.shape[:-1], whole // block, block)
        values = jnp.concatenate([jnp.sum(blocks, axis=-1), values[..., whole:]], axis=-1)
    return jnp.sum(values, axis=-1)
