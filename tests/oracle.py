"""What every operation must return: NumPy, float64, loops over leaves, written from the contract and nothing else.

Every function takes the public operation's arguments and gives a tree of :class:`Expected` leaves, which know how far
a correct implementation in lower precision may be off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

NAN = float("nan")

# Overflow and inf - inf are what the tests are about, not something to warn of.
quiet = np.errstate(all="ignore")


class Expected(NamedTuple):
    """One result: its exact value, and what rounding may do to it.

    A result is summed in the accumulator's dtype: each of at most ``roundings`` roundings moves it by half an ulp of
    ``magnitude``, the sum of the terms' absolute values. The last rounding, to ``dtype``, comes on top. With no
    roundings the value is rounded to ``dtype`` once, or not at all.
    """

    value: np.ndarray
    magnitude: np.ndarray
    roundings: float
    accumulator: Any
    dtype: Any


def is_expected(x: Any) -> bool:
    return isinstance(x, Expected)


def accumulator_of(*arrays: Any) -> type:
    return np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32


@quiet
def widened(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def leaves_of(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def only_present(array: Any, where: Any) -> np.ndarray:
    """The rows of the clients that take part: an absent client is dropped, so that nothing of it can matter."""
    rows = widened(array)
    return rows if where is None else rows[np.asarray(where)]


def _finish(tree: Any, results: list[tuple], out_dtype: Any = None) -> Any:
    """A tree of expected leaves from each leaf's (value, magnitude, roundings)."""
    finished = []
    for leaf, (value, magnitude, roundings) in zip(leaves_of(tree), results, strict=True):
        accumulator = accumulator_of(leaf)
        finished.append(Expected(value, magnitude, roundings, accumulator, out_dtype or accumulator))
    return jax.tree.unflatten(jax.tree.structure(tree), finished)


# --- Linear operations ----------------------------------------------------------------------------------------


def _weighted_terms(leaf: Any, weights: Any, where: Any) -> np.ndarray:
    rows, present_weights = only_present(leaf, where), only_present(weights, where)
    return present_weights.reshape((-1,) + (1,) * (rows.ndim - 1)) * rows


@quiet
def weighted_sum(updates: Any, weights: Any, where: Any = None, out_dtype: Any = None) -> Any:
    results = []
    for leaf in leaves_of(updates):
        terms = _weighted_terms(leaf, weights, where)
        # One rounding for each weight, product and addition.
        results.append((terms.sum(0), np.abs(terms).sum(0), len(terms) + 2))
    return _finish(updates, results, out_dtype)


@quiet
def weighted_mean(updates: Any, weights: Any = None, where: Any = None, out_dtype: Any = None) -> Any:
    if weights is None:
        weights = np.ones(len(leaves_of(updates)[0]))
    present_weights = only_present(weights, where)
    total, total_magnitude = present_weights.sum(), np.abs(present_weights).sum()
    results = []
    for leaf in leaves_of(updates):
        terms = _weighted_terms(leaf, weights, where)
        value = terms.sum(0) / total
        # Rounding errors of the numerator, and those of the denominator, which scale the value.
        magnitude = (np.abs(terms).sum(0) + np.abs(value) * total_magnitude) / np.abs(total)
        results.append((value, magnitude, len(terms) + 3))
    return _finish(updates, results, out_dtype)


@quiet
def weighted_spread(weights: Any, cotangents: Any, where: Any = None) -> Any:
    spread = []
    for leaf in leaves_of(cotangents):
        value = np.multiply.outer(widened(weights), widened(leaf))
        if where is not None:
            value[~np.asarray(where)] = 0  # whatever the cotangent
        spread.append((value, np.abs(value), 2))
    return _finish(cotangents, spread)


@quiet
def accumulate_weighted(total: Any, update: Any, weight: Any) -> Any:
    results = []
    for old, new in zip(leaves_of(total), leaves_of(update), strict=True):
        step = widened(weight) * widened(new)
        results.append((widened(old) + step, np.abs(widened(old)) + np.abs(step), 3))
    return _finish(total, results)


def stack_clients(updates: list[Any]) -> Any:
    stacked = []
    for same_leaf in zip(*map(leaves_of, updates), strict=True):
        value = np.stack([widened(leaf) for leaf in same_leaf])
        stacked.append(Expected(value, np.abs(value), 0, np.float32, same_leaf[0].dtype))
    return jax.tree.unflatten(jax.tree.structure(updates[0]), stacked)


# --- Norms ----------------------------------------------------------------------------------------------------


def _pairwise_roundings(num_terms: int) -> int:
    """How many roundings a term meets in a sum over blocks of blocks of 512: the `jax.numpy` definition's."""
    roundings = 2
    while num_terms > 512:
        roundings += 512
        num_terms = -(-num_terms // 512) + num_terms % 512
    return roundings + num_terms


@quiet
def client_dots(updates: Any, others: Any, where: Any = None, shared: bool = False, kernel: bool = False) -> Any:
    all_leaves = leaves_of(updates) + leaves_of(others)
    n_clients = len(leaves_of(updates)[0])
    value, magnitude, num_terms = np.zeros(n_clients), np.zeros(n_clients), 0
    for leaf, other in zip(leaves_of(updates), leaves_of(others), strict=True):
        products = widened(leaf) * (widened(other)[None] if shared else widened(other))
        products = products.reshape(n_clients, -1) if products.size else np.zeros((n_clients, 0))
        value, magnitude = value + products.sum(1), magnitude + np.abs(products).sum(1)
        num_terms += products.shape[1]
    if where is not None:
        value, magnitude = np.where(where, value, 0), np.where(where, magnitude, 0)
    dtype = accumulator_of(*all_leaves)
    # A kernel sums in float64: what is left is the last rounding, and for sharded parameters a few partial sums.
    return Expected(value, magnitude, 4 if kernel else _pairwise_roundings(num_terms), dtype, dtype)


def squared_norms(updates: Any, where: Any = None, kernel: bool = False) -> Any:
    return client_dots(updates, updates, where, kernel=kernel)


def finite_clients(updates: Any) -> Any:
    finite = np.ones(len(leaves_of(updates)[0]), bool)
    for leaf in leaves_of(updates):
        for client, row in enumerate(widened(leaf)):
            finite[client] &= bool(np.isfinite(row).all())
    return Expected(finite, finite, 0, np.float32, bool)


# --- Order statistics -----------------------------------------------------------------------------------------


def rank_order(rows: np.ndarray) -> np.ndarray:
    """The clients of every coordinate by rank: −inf < finite < +inf < NaN (of either sign); ties by client."""
    order = np.empty(rows.shape, int)
    for coordinate in np.ndindex(rows.shape[1:]):
        column = rows[(slice(None), *coordinate)]
        keys = [(bool(np.isnan(x)), 0.0 if np.isnan(x) else float(x), client) for client, x in enumerate(column)]
        order[(slice(None), *coordinate)] = [client for _, _, client in sorted(keys)]
    return order


def kept_clients(rows: np.ndarray, trim_count: int) -> np.ndarray:
    """The clients (by rank) that a trimmed mean keeps in every coordinate; none if the count makes no sense."""
    first, beyond = trim_count, len(rows) - trim_count
    if trim_count < 0 or beyond <= first:
        return np.empty((0, *rows.shape[1:]), int)
    return rank_order(rows)[first:beyond]


@quiet
def _mean_of(kept: np.ndarray, accumulator: Any) -> tuple:
    """The mean of what was kept. One value is exact, two are rounded once, by the sum: known to the bit."""
    count = len(kept)
    if count == 0:
        nothing = np.full(kept.shape[1:], NAN)
        return nothing, nothing, 0
    value, magnitude = (kept / count).sum(0), (np.abs(kept) / count).sum(0)
    # Each kept value meets at most count - 1 additions, and divisions before or after them.
    return (widened(value.astype(accumulator)), magnitude, 0) if count <= 2 else (value, magnitude, count + 1)


def trim_count_of(trim_count: Any, trim_fraction: float, num_present: int) -> int:
    return int(trim_fraction * num_present) if trim_count is None else int(trim_count)


def trimmed_mean(
    updates: Any, trim_count: Any = None, trim_fraction: float = 0.2, where: Any = None, out_dtype: Any = None
) -> Any:
    results = []
    for leaf in leaves_of(updates):
        rows = only_present(leaf, where)
        kept = kept_clients(rows, trim_count_of(trim_count, trim_fraction, len(rows)))
        results.append(_mean_of(np.take_along_axis(rows, kept, 0), accumulator_of(leaf)))
    return _finish(updates, results, out_dtype)


def coordinate_median(updates: Any, where: Any = None, out_dtype: Any = None) -> Any:
    num_present = len(only_present(leaves_of(updates)[0], where))
    return trimmed_mean(updates, (num_present - 1) // 2, where=where, out_dtype=out_dtype)


def selected_mean(updates: Any, values: Any, trim_count: Any, where: Any = None) -> Any:
    results = []
    for leaf, value in zip(leaves_of(updates), leaves_of(values), strict=True):
        rows = only_present(leaf, where)
        kept = kept_clients(rows, int(trim_count))
        results.append(_mean_of(np.take_along_axis(only_present(value, where), kept, 0), accumulator_of(leaf)))
    return _finish(updates, results)


@quiet
def spread_to_selected(updates: Any, cotangents: Any, trim_count: Any, where: Any = None) -> Any:
    spread = []
    for leaf, cotangent in zip(leaves_of(updates), leaves_of(cotangents), strict=True):
        value = np.zeros(leaf.shape)
        present = np.arange(len(leaf)) if where is None else np.flatnonzero(where)
        kept = kept_clients(widened(leaf)[present], int(trim_count))
        if len(kept):
            np.put_along_axis(value, present[kept], widened(cotangent)[None] / len(kept), 0)
        # The share is rounded once in the accumulator, and then to the leaf's dtype.
        spread.append(Expected(value, np.abs(value), 1, accumulator_of(leaf), leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(updates), spread)


# --- Compressed updates -----------------------------------------------------------------------------------------


def _entries(indices: Any, num_params: int, where: Any) -> list[tuple[int, int, int]]:
    """(client, position, index) of every entry that counts, in order."""
    counted = (np.asarray(indices) >= 0) & (np.asarray(indices) < num_params)
    if where is not None:
        counted &= np.asarray(where)[:, None]
    return [(i, j, int(indices[i, j])) for i, j in np.argwhere(counted)]


@quiet
def topk_sparse_weighted_sum(values: Any, indices: Any, weights: Any, num_params: int, where: Any = None) -> Any:
    wide, factors = widened(values), widened(weights)
    value, magnitude, count = np.zeros(num_params), np.zeros(num_params), np.zeros(num_params)
    for client, position, index in _entries(np.asarray(indices), num_params, where):
        term = factors[client] * wide[client, position]
        value[index] += term
        magnitude[index] += abs(term)
        count[index] += 1
    dtype = accumulator_of(values)
    return Expected(value, magnitude, float(count.max(initial=0)) + 2, dtype, dtype)


@quiet
def sparse_spread(indices: Any, weights: Any, vector: Any, where: Any = None) -> Any:
    value = np.zeros(indices.shape)
    for client, position, index in _entries(np.asarray(indices), len(vector), where):
        value[client, position] = widened(weights)[client] * widened(vector)[index]
    dtype = accumulator_of(vector)
    return Expected(value, np.abs(value), 2, dtype, dtype)


@quiet
def sparse_dots(values: Any, indices: Any, vector: Any, where: Any = None) -> Any:
    products = np.zeros(values.shape)
    wide, factors = widened(values), widened(vector)
    for client, position, index in _entries(np.asarray(indices), len(vector), where):
        products[client, position] = wide[client, position] * factors[index]
    dtype = accumulator_of(vector)
    return Expected(products.sum(1), np.abs(products).sum(1), _pairwise_roundings(values.shape[1]), dtype, dtype)


def unpacked(codes: Any, num_bits: int = 8, num_params: int | None = None) -> np.ndarray:
    """The codes of every client, one an element, from bytes that hold one or two."""
    rows = []
    for row in np.asarray(codes):
        levels = []
        for byte in row.tolist():
            halves = [byte] if num_bits == 8 else [byte & 15, byte >> 4 & 15]
            if num_bits == 4 and codes.dtype == np.int8:
                halves = [half - 16 if half > 7 else half for half in halves]
            levels += halves
        rows.append(levels)
    return np.array(rows, float).reshape(len(rows), -1)[:, :num_params]


def _each_coordinate_s(per_block: Any, size: int, block_size: int | None) -> np.ndarray:
    """The number of a coordinate's block, for every client and coordinate."""
    wide = widened(per_block)
    if block_size is None:
        return np.broadcast_to(wide[:, None], (len(wide), size))
    return np.array([[row[p // block_size] for p in range(size)] for row in wide]).reshape(len(wide), size)


@quiet
def quantized_weighted_sum(
    codes: Any,
    scales: Any,
    zero_points: Any,
    weights: Any,
    num_bits: int = 8,
    num_params: int | None = None,
    block_size: int | None = None,
    where: Any = None,
) -> Any:
    levels = unpacked(codes, num_bits, num_params)
    size = levels.shape[1]
    zeros = _each_coordinate_s(zero_points, size, block_size)
    factors = widened(weights)[:, None] * _each_coordinate_s(scales, size, block_size)
    terms = only_present(factors * (levels - zeros), where)
    # A zero point that is no integer rounds the difference; what it rounds may be far larger than what is left.
    magnitude = only_present(np.abs(factors) * (np.abs(levels) + np.abs(zeros)), where)
    dtype = accumulator_of(scales, zero_points)
    return Expected(terms.sum(0), magnitude.sum(0), len(terms) + 4, dtype, dtype)


@quiet
def quantized_dots(codes: Any, zero_points: Any, vector: Any, where: Any = None) -> Any:
    zeros = widened(zero_points)[:, None]
    products = (widened(codes) - zeros) * widened(vector)
    magnitude = ((widened(codes) + np.abs(zeros)) * np.abs(widened(vector))).sum(1)
    value = products.sum(1)
    if where is not None:
        value, magnitude = np.where(where, value, 0), np.where(where, magnitude, 0)
    dtype = accumulator_of(vector)
    return Expected(value, magnitude, _pairwise_roundings(codes.shape[1]) + 1, dtype, dtype)


# --- Comparison -----------------------------------------------------------------------------------------------


def unit_roundoff(dtype: Any) -> float:
    return float(jax.numpy.finfo(dtype).eps) / 2


def smallest(dtype: Any) -> float:
    return float(jax.numpy.finfo(dtype).smallest_subnormal)


@quiet
def assert_leaf_matches(got: Any, expected: Expected, name: str = "") -> None:
    got = np.asarray(got)
    assert got.dtype == np.dtype(expected.dtype), f"{name}: dtype {got.dtype}, not {np.dtype(expected.dtype)}"
    assert got.shape == expected.value.shape, f"{name}: shape {got.shape}, not {expected.value.shape}"
    if got.dtype == bool:
        np.testing.assert_array_equal(got, expected.value, name)
        return
    rounded = widened(expected.value.astype(got.dtype))  # beyond the dtype's range: inf
    got = widened(got)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite], f"{name}: not finite")
    slack = unit_roundoff(expected.accumulator) * expected.roundings * expected.magnitude[finite]
    if expected.roundings:  # a sum that is a little off may be rounded to the other neighbour at the end
        slack += 2 * unit_roundoff(expected.dtype) * np.abs(rounded[finite]) + smallest(expected.dtype)
    # XLA on CPU flushes subnormal numbers of the accumulator to zero.
    slack = slack + float(jax.numpy.finfo(expected.accumulator).tiny)
    if expected.accumulator is np.float64:
        slack = 2 * slack  # the oracle rounds as much as what it judges
    error = np.abs(got[finite] - rounded[finite])
    if (error <= slack).all():
        return
    worst = np.argmax(error - slack)
    raise AssertionError(
        f"{name}: got {got[finite][worst]!r}, not {rounded[finite][worst]!r}: off by {error[worst]:.3g}, "
        f"{slack[worst]:.3g} allowed, in {(~(error <= slack)).sum()} of {error.size} places"
    )


def assert_matches(got: Any, expected: Any, name: str = "") -> None:
    """Compares a result, leaf by leaf, with what the oracle expects."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(expected, is_leaf=is_expected)
    assert jax.tree.structure(got) == structure, f"{name}: {jax.tree.structure(got)}, not {structure}"
    for leaf, (path, leaf_expected) in zip(jax.tree.leaves(got), with_paths, strict=True):
        assert_leaf_matches(leaf, leaf_expected, name + jax.tree_util.keystr(path))
