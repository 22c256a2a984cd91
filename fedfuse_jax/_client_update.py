"""One client's own update, as what compresses it takes it."""

from __future__ import annotations

from typing import Any

from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals

PyTree = Any


def whole_leaves(leaves: checks.Leaves) -> list[Array]:
    """The leaves of one client's update, gathered where types say that they are sharded."""
    return [internals.replicated(array) for array in leaves.arrays]


def leaves_of_client(operation: str, argument: str, tree: PyTree) -> checks.Leaves:
    """The tree's leaves, none of them offloaded to the host's memory: `jax.numpy` computes with them."""
    leaves = checks.float_leaves(operation, argument, tree)
    return leaves._replace(arrays=[internals.in_device_memory(array) for array in leaves.arrays])
