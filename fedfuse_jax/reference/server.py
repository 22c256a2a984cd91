"""Definitions: the server optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedfuse_jax.reference.common import presence
from fedfuse_jax.reference.linear import weighted_mean

PyTree = Any

SERVER_RULES = ("avgm", "adagrad", "adam", "yogi")


def server_step(
    rule: str,
    param: Array,
    first: Array,
    second: Array,
    delta: Array,
    learning_rate: Array,
    b1: Array,
    b2: Array,
    tau: Array,
) -> tuple[Array, Array, Array]:
    """One leaf's step along ``delta``, in the dtype of its state: (parameters, first moment, second moment)."""
    square = delta * delta
    if rule == "avgm":
        first = b1 * first + delta
        step = learning_rate * first
    else:
        first = b1 * first + (1 - b1) * delta
        if rule == "adagrad":
            second = second + square
        elif rule == "adam":
            second = b2 * second + (1 - b2) * square
        else:
            second = second - (1 - b2) * square * jnp.sign(second - square)
        # Without anything to divide by, a coordinate stays where it is. (In both places the derivative is 0, not NaN.)
        nothing = second == 0
        divisor = jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, second))) + tau
        stays = divisor == 0
        step = jnp.where(stays, 0, learning_rate * first / jnp.where(stays, 1, divisor))
    return (param.astype(first.dtype) + step).astype(param.dtype), first, second


def server_update(
    rule: str,
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None,
    where: Array | None,
    learning_rate: Any,
    b1: Any = 0.0,
    b2: Any = 0.0,
    tau: Any = 0.0,
) -> tuple[PyTree, Any]:
    """Steps parameters and state along the weighted mean; nothing moves if anything new would not be finite."""
    delta = weighted_mean(updates, weights, where=where)
    someone = jnp.any(presence(where, jax.tree.leaves(updates)[0].shape[0]))

    def narrowed(leaf: Array, first: Array) -> Array:
        return leaf.astype(first.dtype)

    delta = jax.tree.map(narrowed, delta, state.first_moment)

    def step_leaf(param: Array, first: Array, second: Array, leaf: Array) -> tuple[Array, Array, Array]:
        scalars = [jnp.asarray(scalar, first.dtype) for scalar in (learning_rate, b1, b2, tau)]
        return server_step(rule, param, first, second, leaf, *scalars)

    leaves, structure = jax.tree.flatten(params)
    others = [jax.tree.leaves(tree) for tree in (state.first_moment, state.second_moment)]
    old = list(zip(leaves, *others, strict=True))
    stepped = [step_leaf(*each) for each in zip(leaves, *others, jax.tree.leaves(delta), strict=True)]
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(stepped)]
    good = functools.reduce(jnp.logical_and, finite, someone)
    kept = jax.tree.map(lambda y, x: jnp.where(good, y, x), stepped, old)
    trees = [jax.tree.unflatten(structure, part) for part in zip(*kept, strict=True)]
    return trees[0], type(state)(next_step(state.step, good), *trees[1:])


def next_step(step: Array, counts: Array) -> Array:
    """One more where the round counts; the greatest number there is stays."""
    return step + (counts & (step < jnp.iinfo(step.dtype).max)).astype(step.dtype)


def fedavgm_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    momentum: Any = 0.9,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β m + Δ``, ``x ← x + η m``."""
    return server_update("avgm", params, state, updates, weights, where, learning_rate, momentum)


def fedadagrad_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.0,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β₁ m + (1 − β₁) Δ``, ``v ← v + Δ²``, ``x ← x + η m / (√v + τ)``."""
    return server_update("adagrad", params, state, updates, weights, where, learning_rate, b1, tau=tau)


def fedadam_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← β₁ m + (1 − β₁) Δ``, ``v ← β₂ v + (1 − β₂) Δ²``, ``x ← x + η m / (√v + τ)``."""
    return server_update("adam", params, state, updates, weights, where, learning_rate, b1, b2, tau)


def fedyogi_weighted_update(
    params: PyTree,
    state: Any,
    updates: PyTree,
    weights: Array | None = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """FedAdam but for ``v ← v − (1 − β₂) Δ² sign(v − Δ²)``."""
    return server_update("yogi", params, state, updates, weights, where, learning_rate, b1, b2, tau)
