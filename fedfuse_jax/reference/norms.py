"""Definitions: norms and finiteness."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax.reference.common import pairwise_sum, tree_accumulator_dtype
from fedfuse_jax.reference.linear import client_dots

PyTree = Any


def squared_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖²`` per client over the whole tree; 0 for an absent client."""
    return client_dots(updates, updates, where=where)


def finite_clients(updates: PyTree) -> Array:
    """Whether all of a client's coordinates, over the whole tree, are finite."""
    finite = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(updates)]
    return jnp.all(jnp.stack(finite), axis=0)


def power_of_two_near(largest: Array) -> Array:
    """A power of two to divide by, exactly, so that squares of what is no larger neither overflow nor vanish.

    Neither it nor its reciprocal, which XLA may multiply by instead, is subnormal. Infinities and NaNs have none, and
    go through the quotient.
    """
    info = jnp.finfo(largest.dtype)
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, int(info.minexp), int(info.maxexp) - 3)
    return lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))


def norm_parts(updates: PyTree, where: Array | None) -> tuple[Array, Array]:
    """Each client's norm as ``scale · root``: squares of scaled coordinates neither overflow nor vanish."""
    dtype = tree_accumulator_dtype(updates)

    def present(leaf: Array) -> Array:
        leaf = leaf.astype(dtype).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        return leaf if where is None else jnp.where(where[:, None], leaf, 0)

    leaves = [present(leaf) for leaf in jax.tree.leaves(updates)]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in leaves])
    scale = power_of_two_near(largest)
    total = functools.reduce(jnp.add, [pairwise_sum((leaf / scale[:, None]) ** 2) for leaf in leaves])
    nothing = total == 0
    return scale, jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, total)))


def client_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖`` per client over the whole tree, also where the square would overflow; 0 for an absent client."""
    scale, root = norm_parts(updates, where)
    return scale * root
