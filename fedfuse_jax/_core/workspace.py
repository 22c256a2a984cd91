"""Sizes of the scratch memory that kernels which sum over coordinates ask for; see ffi/math/blocks.h."""

from __future__ import annotations

from typing import Any

from fedfuse_jax._core import coordinates_of_leaves


def num_blocks(sizes: Any, layout: Any) -> Any:
    """The blocks of coordinates that sums over coordinates are taken in, of all leaves; see ffi/contract."""
    block, blocks = 16384, 0
    for coordinates in coordinates_of_leaves(sizes, layout.num_leaves):
        blocks = blocks + (coordinates + block - 1) // block
    return blocks


def block_sums_workspace(sizes: Any, layout: Any) -> Any:
    """One float64 per client and block of coordinates."""
    bytes_per_partial = 8
    partials = num_blocks(sizes, layout) * sizes["clients"]
    for i in range(layout.batch_dims):
        partials = partials * sizes[f"batch{i}"]
    return partials * bytes_per_partial
