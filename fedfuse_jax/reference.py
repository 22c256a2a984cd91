"""What each operation means, in ``jax.numpy``.

These functions are the specification of the compiled kernels, the code that runs where no kernel exists, and
the first thing to read about an operation. They take the same arguments as the public operations, trust them
to be valid, and favour the obvious over the fast.

Conventions, in every function: the leading axis of a leaf is the client axis; low-precision leaves are
widened before anything is added; an absent client (``where`` is ``False``) is selected away, never multiplied
by zero, so its NaNs go nowhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PyTree = Any


def accumulator_dtype(*dtypes: Any) -> np.dtype:
    """The dtype sums are kept in: float64 if any of ``dtypes`` is, float32 otherwise."""
    return np.dtype(np.float64 if any(np.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)


def _tree_accumulator_dtype(tree: PyTree) -> np.dtype:
    return accumulator_dtype(*(leaf.dtype for leaf in jax.tree.leaves(tree)))


def _result_dtype(leaf: Array, out_dtype: Any) -> np.dtype:
    return accumulator_dtype(leaf.dtype) if out_dtype is None else np.dtype(out_dtype)


def _over_parameters(per_client: Array, leaf: Array) -> Array:
    """Reshapes ``(n_clients,)`` so that it broadcasts against a client-stacked leaf."""
    return per_client.reshape(per_client.shape + (1,) * (leaf.ndim - 1))


def _present(where: Array | None, n_clients: int) -> Array:
    return jnp.ones(n_clients, bool) if where is None else where


# --- Reduce ---------------------------------------------------------------------------------------------------


def weighted_sum(updates: PyTree, weights: Array, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """``Σ wᵢ xᵢ`` over the clients that take part; 0 when nobody does."""

    def reduce_leaf(leaf: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        terms = leaf.astype(dtype) * _over_parameters(weights.astype(dtype), leaf)
        if where is not None:
            terms = jnp.where(_over_parameters(where, leaf), terms, 0)
        return jnp.sum(terms, axis=0).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def weighted_spread(
    weights: Array, cotangents: list[Array], *, where: Array | None = None, dtypes: Sequence[Any]
) -> list[Array]:
    """The transpose of ``weighted_sum``: ``wᵢ`` times the cotangent for every client, exactly 0 for an absent one."""

    def spread_leaf(cotangent: Array, dtype: Any) -> Array:
        accumulator = accumulator_dtype(dtype)
        stacked = cotangent.astype(accumulator)[None]
        products = _over_parameters(weights.astype(accumulator), stacked) * stacked
        if where is not None:
            products = jnp.where(_over_parameters(where, stacked), products, 0)
        return products.astype(dtype)

    return [spread_leaf(cotangent, dtype) for cotangent, dtype in zip(cotangents, dtypes, strict=True)]


def weighted_mean(
    updates: PyTree, weights: Array | None = None, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """``Σ wᵢ xᵢ / Σ wᵢ`` over the clients that take part; NaN when nobody does."""
    if weights is None:
        weights = jnp.ones(jax.tree.leaves(updates)[0].shape[0], _tree_accumulator_dtype(updates))
    weights = weights.astype(_tree_accumulator_dtype(updates))
    total_weight = jnp.sum(weights if where is None else jnp.where(where, weights, 0))

    def reduce_leaf(leaf: Array) -> Array:
        total = weighted_sum(leaf, weights, where=where)
        return (total / total_weight.astype(total.dtype)).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def _pairwise_sum(values: Array) -> Array:
    """Sums over the last axis in blocks of blocks, so that the error grows with log(size), not with size."""
    block = 512
    while isinstance(values.shape[-1], int) and values.shape[-1] > block:
        whole = values.shape[-1] // block * block
        blocks = values[..., :whole].reshape(*values.shape[:-1], whole // block, block)
        values = jnp.concatenate([jnp.sum(blocks, axis=-1), values[..., whole:]], axis=-1)
    return jnp.sum(values, axis=-1)


def client_dots(updates: PyTree, others: PyTree, *, shared: bool = False, where: Array | None = None) -> Array:
    """``⟨xᵢ, yᵢ⟩`` per client over the whole tree; with ``shared``, the same ``y`` (no client axis) for all."""
    dtype = accumulator_dtype(_tree_accumulator_dtype(updates), _tree_accumulator_dtype(others))

    def dot_leaf(leaf: Array, other: Array) -> Array:
        other = other.astype(dtype)[None] if shared else other.astype(dtype)
        products = leaf.astype(dtype) * other
        return _pairwise_sum(products.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))

    dots = functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot_leaf, updates, others)))
    return dots if where is None else jnp.where(where, dots, 0)


def squared_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖²`` per client over the whole tree; 0 for an absent client."""
    return client_dots(updates, updates, where=where)


def finite_clients(updates: PyTree) -> Array:
    """Whether all of a client's coordinates, over the whole tree, are finite."""
    finite = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(updates)]
    return jnp.all(jnp.stack(finite), axis=0)


def accumulate_weighted(total: PyTree, update: PyTree, weight: Array) -> PyTree:
    """``total + weight · update`` for one client's tree."""
    return jax.tree.map(lambda leaf, new: leaf + weight.astype(leaf.dtype) * new.astype(leaf.dtype), total, update)


def stack_clients(updates: list[PyTree]) -> PyTree:
    """A list of n trees as one client-stacked tree."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)


# --- Robust ---------------------------------------------------------------------------------------------------


def trim_counts(trim_fraction: float, n_clients: int) -> np.ndarray:
    """``int(trim_fraction · m)`` for every number m of participating clients, 0 … n, in Python's arithmetic."""
    return np.array([int(trim_fraction * m) for m in range(n_clients + 1)], np.int32)


def median_trim_count(num_present: Any) -> Any:
    """The trim count that makes the trimmed mean of ``num_present`` clients their median."""
    return (num_present - 1) // 2


def _ranks(leaf: Array, where: Array | None) -> Array:
    """Every client's rank in each coordinate: −inf < finite < +inf < NaN < absent; ties by client index."""
    absent = jnp.broadcast_to(_over_parameters(~_present(where, leaf.shape[0]), leaf), leaf.shape)
    client = lax.broadcasted_iota(jnp.int32, leaf.shape, 0)
    # lax.sort holds -0 and 0 for equal, and every NaN for equal and greatest: the order the contract asks for.
    # Ranks are constant almost everywhere, and the derivative of a sort is not free.
    keys = (absent, lax.stop_gradient(leaf), client)
    _, _, by_rank = lax.sort(keys, dimension=0, num_keys=2, is_stable=True)
    return jnp.argsort(by_rank, axis=0)


def _mean_of_kept(selected: Array, values: Array, num_kept: Array) -> Array:
    """The mean over the selected clients in each coordinate; NaN when there are none."""
    dtype = accumulator_dtype(values.dtype)
    total = jnp.sum(jnp.where(selected, values.astype(dtype), 0), axis=0)
    return jnp.where(num_kept > 0, total / jnp.maximum(num_kept, 1).astype(dtype), jnp.nan)


def _selected(leaf: Array, trim_count: Any, where: Array | None) -> tuple[Array, Array]:
    """Which clients a trimmed mean keeps in each coordinate, and how many those are (0 or less: nobody)."""
    num_present = jnp.sum(_present(where, leaf.shape[0]), dtype=jnp.int32)
    trim_count = jnp.asarray(trim_count, jnp.int32)
    ranks = _ranks(leaf, where)
    num_kept = jnp.where(trim_count < 0, 0, num_present - 2 * trim_count)
    return (ranks >= trim_count) & (ranks < trim_count + num_kept), num_kept


def trimmed_mean(
    updates: PyTree,
    trim_count: Any = None,
    *,
    trim_fraction: float = 0.2,
    where: Array | None = None,
    out_dtype: Any = None,
) -> PyTree:
    """Per coordinate, the mean of the values left without the k smallest and the k largest; NaN if none is."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    if trim_count is None:
        num_present = jnp.sum(_present(where, n_clients))
        trim_count = jnp.asarray(trim_counts(trim_fraction, n_clients))[num_present]

    def reduce_leaf(leaf: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where)
        mean = _mean_of_kept(selected, leaf, num_kept)
        # A sum may overflow where the mean does not; halving first then costs nothing but time.
        exponent = 2.0 ** -math.ceil(math.log2(n_clients + 1)) if isinstance(n_clients, int) else 2.0**-31
        scaled = _mean_of_kept(selected, leaf.astype(mean.dtype) * exponent, num_kept) / exponent
        return jnp.where(jnp.isfinite(mean), mean, scaled).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates)


def coordinate_median(updates: PyTree, *, where: Array | None = None, out_dtype: Any = None) -> PyTree:
    """Per coordinate, the middle value, or the mean of the two middle values; NaN when nobody takes part."""
    n_clients = jax.tree.leaves(updates)[0].shape[0]
    num_present = jnp.sum(_present(where, n_clients), dtype=jnp.int32)
    return trimmed_mean(updates, median_trim_count(num_present), where=where, out_dtype=out_dtype)


def selected_mean(
    updates: PyTree, values: PyTree, trim_count: Any, *, where: Array | None = None, out_dtype: Any = None
) -> PyTree:
    """Per coordinate, the mean of ``values`` over the clients that the trimmed mean of ``updates`` keeps."""

    def reduce_leaf(leaf: Array, value: Array) -> Array:
        selected, num_kept = _selected(leaf, trim_count, where)
        return _mean_of_kept(selected, value, num_kept).astype(_result_dtype(leaf, out_dtype))

    return jax.tree.map(reduce_leaf, updates, values)


def spread_to_selected(updates: PyTree, cotangents: PyTree, trim_count: Any, *, where: Array | None = None) -> PyTree:
    """The transpose of ``selected_mean``: a kept client gets its share of the cotangent, the others exactly 0."""

    def spread_leaf(leaf: Array, cotangent: Array) -> Array:
        dtype = accumulator_dtype(leaf.dtype)
        selected, num_kept = _selected(leaf, trim_count, where)
        share = cotangent.astype(dtype) / jnp.maximum(num_kept, 1).astype(dtype)
        return jnp.where(selected, share[None], 0).astype(leaf.dtype)

    return jax.tree.map(spread_leaf, updates, cotangents)


# --- Private --------------------------------------------------------------------------------------------------


def _norm_parts(updates: PyTree, where: Array | None) -> tuple[Array, Array]:
    """Each client's norm as ``scale · root``: squares of scaled coordinates neither overflow nor vanish."""
    dtype = _tree_accumulator_dtype(updates)

    def present(leaf: Array) -> Array:
        leaf = leaf.astype(dtype).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        return leaf if where is None else jnp.where(where[:, None], leaf, 0)

    leaves = [present(leaf) for leaf in jax.tree.leaves(updates)]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in leaves])
    # A power of two, for which the quotients are exact, and whose reciprocal is not subnormal, since XLA may multiply
    # by that. Infinities and NaNs have none, and go through.
    exponent = jnp.minimum(jnp.frexp(largest)[1] - 1, int(jnp.finfo(dtype).maxexp) - 3)
    scale = lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))
    total = functools.reduce(jnp.add, [_pairwise_sum((leaf / scale[:, None]) ** 2) for leaf in leaves])
    nothing = total == 0
    return scale, jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, total)))


def client_norms(updates: PyTree, *, where: Array | None = None) -> Array:
    """``‖xᵢ‖`` per client over the whole tree, also where the square would overflow; 0 for an absent client."""
    scale, root = _norm_parts(updates, where)
    return scale * root


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
    dtype = _tree_accumulator_dtype(updates)
    max_norm = jnp.asarray(max_norm, dtype)
    scale, root = (jnp.ones_like(given_norms), given_norms) if given_norms is not None else _norm_parts(updates, where)
    norms = scale * root
    clipped = norms > max_norm
    # Of a huge client, C / ‖x‖ would be too small a number: shrink x first, by a power of two.
    half_range = 2.0 ** (jnp.finfo(dtype).maxexp // 2)
    shrink = jnp.where(clipped & (scale * jnp.minimum(root, half_range) > half_range), 1 / half_range, 1).astype(dtype)
    factor = jnp.where(clipped, max_norm / (scale * shrink) / jnp.where(clipped, root, 1), 1)
    factor = jnp.where(max_norm >= 0, factor, jnp.nan)
    kept = jnp.isfinite(root) & _present(where, root.shape[0])
    shrunk = jax.tree.map(lambda x: x.astype(dtype) * _over_parameters(shrink, x), updates)
    total = weighted_sum(shrunk, weights.astype(dtype) * factor, where=kept)
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
    present = _present(where, norms.shape[0])
    count = jnp.sum((norms <= clip_norm) & present, dtype=clip_norm.dtype)
    if key is not None:
        count = count + count_stddev * jax.random.normal(key, (), np.float32).astype(clip_norm.dtype)
    num_present = jnp.sum(present, dtype=clip_norm.dtype)
    share = jnp.where(num_present > 0, count / num_present, jnp.nan)
    return clip_norm * jnp.exp(-learning_rate * (share - target_quantile))


# --- Server optimizers ----------------------------------------------------------------------------------------

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
        first = delta if rule == "adagrad" else b1 * first + (1 - b1) * delta
        if rule == "adagrad":
            second = second + square
        elif rule == "adam":
            second = b2 * second + (1 - b2) * square
        else:
            second = second - (1 - b2) * square * jnp.sign(second - square)
        step = learning_rate * first / (jnp.sqrt(second) + tau)
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
    """Steps parameters and state along the weighted mean; neither moves where that is not finite."""
    delta = weighted_mean(updates, weights, where=where)
    someone = jnp.any(_present(where, jax.tree.leaves(updates)[0].shape[0]))

    def narrowed(leaf: Array, first: Array) -> Array:
        return leaf.astype(first.dtype)

    delta = jax.tree.map(narrowed, delta, state.first_moment)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(delta)]
    good = functools.reduce(jnp.logical_and, finite, someone)

    def step_leaf(param: Array, first: Array, second: Array, leaf: Array) -> tuple[Array, Array, Array]:
        scalars = [jnp.asarray(scalar, first.dtype) for scalar in (learning_rate, b1, b2, tau)]
        new = server_step(rule, param, first, second, jnp.where(good, leaf, 0), *scalars)
        return tuple(jnp.where(good, y, x) for y, x in zip(new, (param, first, second), strict=True))  # type: ignore

    leaves, structure = jax.tree.flatten(params)
    others = [jax.tree.leaves(tree) for tree in (state.first_moment, state.second_moment, delta)]
    stepped = [step_leaf(*each) for each in zip(leaves, *others, strict=True)]
    trees = [jax.tree.unflatten(structure, part) for part in zip(*stepped, strict=True)]
    return trees[0], type(state)(state.step + good.astype(state.step.dtype), *trees[1:])


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
    tau: Any = 1e-3,
    where: Array | None = None,
) -> tuple[PyTree, Any]:
    """``m ← Δ``, ``v ← v + Δ²``, ``x ← x + η m / (√v + τ)``."""
    return server_update("adagrad", params, state, updates, weights, where, learning_rate, tau=tau)


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
