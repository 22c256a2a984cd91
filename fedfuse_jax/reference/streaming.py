"""Definitions: the running sum and the stack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


def accumulate_weighted(total: PyTree, update: PyTree, weight: Array) -> PyTree:
    """``total + weight · update`` for one client's tree."""
    return jax.tree.map(lambda leaf, new: leaf + weight.astype(leaf.dtype) * new.astype(leaf.dtype), total, update)


def stack_clients(updates: list[PyTree]) -> PyTree:
    """A list of n trees as one client-stacked tree."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)
