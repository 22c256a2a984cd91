"""What every operation must return: NumPy, float64, loops over leaves, written from the contract and nothing else.

Every function takes the public operation's arguments and gives a tree of :class:`Expected` leaves, which know how far
a correct implementation in lower precision may be off.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

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
def nearest_median(rows: np.ndarray, num_byzantine: int) -> np.ndarray:
    """The clients whose values are nearest the median in every coordinate, in order of rank; of two as near, the one of
    the smaller value."""
    num_kept = len(rows) - num_byzantine
    kept = np.empty((max(num_kept, 0), *rows.shape[1:]), int)
    if num_kept <= 0:
        return kept
    ranks = rank_order(rows)
    for coordinate in np.ndindex(rows.shape[1:]):
        column, order = rows[(slice(None), *coordinate)].astype(np.longdouble), ranks[(slice(None), *coordinate)]
        median = (column[order[(len(order) - 1) // 2]] + column[order[len(order) // 2]]) / 2
        away = np.where(column == median, 0, np.abs(column - median))
        below = column < median

        def nearness(rank: int, order: Any = order, away: Any = away, below: Any = below) -> tuple:
            """NaN is farther than infinity, and all are as far from a NaN median; equals from the middle out."""
            client = order[rank]
            return (*_farness(away[client]), not below[client], -rank if below[client] else rank)

        chosen = sorted(sorted(range(len(order)), key=nearness)[:num_kept])
        kept[(slice(None), *coordinate)] = order[chosen]
    return kept


def _farness(distance: Any) -> tuple:
    return (bool(np.isnan(distance)), 0.0 if np.isnan(distance) else distance)


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


def mean_around_median(updates: Any, num_byzantine: int, where: Any = None, out_dtype: Any = None) -> Any:
    results = []
    for leaf in leaves_of(updates):
        rows = only_present(leaf, where)
        kept = nearest_median(rows, num_byzantine)
        results.append(_mean_of(np.take_along_axis(rows, kept, 0), accumulator_of(leaf)))
    return _finish(updates, results, out_dtype)


def selected_mean(updates: Any, values: Any, trim_count: Any, where: Any = None, choose: Any = kept_clients) -> Any:
    results = []
    for leaf, value in zip(leaves_of(updates), leaves_of(values), strict=True):
        rows = only_present(leaf, where)
        kept = choose(rows, int(trim_count))
        results.append(_mean_of(np.take_along_axis(only_present(value, where), kept, 0), accumulator_of(leaf)))
    return _finish(updates, results)


@quiet
def spread_to_selected(
    updates: Any, cotangents: Any, trim_count: Any, where: Any = None, choose: Any = kept_clients
) -> Any:
    spread = []
    for leaf, cotangent in zip(leaves_of(updates), leaves_of(cotangents), strict=True):
        value = np.zeros(leaf.shape)
        present = np.arange(len(leaf)) if where is None else np.flatnonzero(where)
        kept = choose(widened(leaf)[present], int(trim_count))
        if len(kept):
            np.put_along_axis(value, present[kept], widened(cotangent)[None] / len(kept), 0)
        # The share is rounded once in the accumulator, and then to the leaf's dtype.
        spread.append(Expected(value, np.abs(value), 1, accumulator_of(leaf), leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(updates), spread)


# --- Distances, mixtures and steps ----------------------------------------------------------------------------


@quiet
def _difference_dots(updates: Any, others: Any, kernel: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """The products of all pairs' differences, their magnitudes, and how many roundings a term meets."""
    n_clients, num_terms = len(leaves_of(updates)[0]), 0
    value, magnitude = np.zeros((2, n_clients, n_clients))
    for leaf, other in zip(leaves_of(updates), leaves_of(others), strict=True):
        rows, other_rows = (widened(x).reshape(n_clients, math.prod(x.shape[1:])) for x in (leaf, other))
        for client in range(n_clients):
            products = (rows - rows[client]) * (other_rows - other_rows[client])
            value[client], magnitude[client] = value[client] + products.sum(1), magnitude[client] + abs(products).sum(1)
        num_terms += rows.shape[1]
    # A kernel adds a few dozen products in the accumulator's dtype, and the rest in float64.
    return value, magnitude, 36 if kernel else 3 + _pairwise_roundings(num_terms)


def difference_dots(updates: Any, others: Any, where: Any = None, kernel: bool = False) -> Any:
    value, magnitude, roundings = _difference_dots(updates, others, kernel)
    present = np.ones(len(value), bool) if where is None else np.asarray(where)
    pairs = np.outer(present, present) & ~np.eye(len(value), dtype=bool)
    dtype = accumulator_of(*leaves_of(updates))
    # A difference of small numbers may lose what the products of large ones do not: a rounding of each factor.
    return Expected(np.where(pairs, value, 0), np.where(pairs, magnitude, 0), roundings, dtype, dtype)


def pairwise_squared_distances(updates: Any, where: Any = None, kernel: bool = False) -> Any:
    value, _, roundings = _difference_dots(updates, updates, kernel)
    value[np.isnan(value)] = np.inf
    np.fill_diagonal(value, 0)
    if where is not None:
        value[~np.asarray(where)] = value[:, ~np.asarray(where)] = np.inf
    dtype = accumulator_of(*leaves_of(updates))
    return Expected(value, value, roundings, dtype, dtype)


@quiet
def mix_clients(updates: Any, mixing: Any) -> Any:
    results, coefficients = [], widened(mixing)
    for leaf in leaves_of(updates):
        value, magnitude = np.zeros((2, len(coefficients), *leaf.shape[1:]))
        for row, client in zip(*np.nonzero(coefficients), strict=True):  # 0 times NaN does not happen
            term = coefficients[row, client] * widened(leaf)[client]
            value[row], magnitude[row] = value[row] + term, magnitude[row] + abs(term)
        results.append((value, magnitude, len(leaf) + 2))
    return _finish(updates, results)


@quiet
def step_toward_clients(updates: Any, center: Any, weights: Any, where: Any = None, kernel: bool = False) -> Any:
    present = np.ones(len(weights), bool) if where is None else np.asarray(where)
    taken = np.flatnonzero(present & (widened(weights) != 0))
    results, squares, slack, num_terms = [], np.zeros(len(weights)), np.zeros(len(weights)), 0
    for leaf, start in zip(leaves_of(updates), leaves_of(center), strict=True):
        rows, start = widened(leaf), widened(start)
        terms = widened(weights)[taken].reshape((-1,) + (1,) * start.ndim) * (rows[taken] - start)
        end, magnitude = start + terms.sum(0), abs(start) + (abs(terms)).sum(0)
        results.append((end, magnitude, len(terms) + 4))
        differences = (rows - end).reshape(len(rows), math.prod(end.shape))
        squares, num_terms = squares + (differences**2).sum(1), num_terms + differences.shape[1]
        # The end is only known to so many roundings, and the distance from it therefore too.
        slack = slack + (len(terms) + 5) * np.broadcast_to(magnitude, start.shape).sum()
    distances = np.sqrt(squares)
    distances[~np.isfinite(distances)] = np.inf
    distances, slack = np.where(present, distances, 0), np.where(present & np.isfinite(distances), slack, 0)
    roundings = 8 if kernel else 4 + _pairwise_roundings(num_terms)
    dtype = accumulator_of(*leaves_of(updates))
    expected = Expected(distances, distances + slack / roundings, roundings, dtype, dtype)
    return _finish(updates, results), expected


# --- Private --------------------------------------------------------------------------------------------------


@quiet
def client_norms(updates: Any, where: Any = None, kernel: bool = False) -> Any:
    leaves = leaves_of(updates)
    num_terms = sum(leaf[0].size for leaf in leaves)
    squares = [np.square(widened(leaf)).reshape(len(leaf), leaf[0].size).sum(1) for leaf in leaves]
    norms = np.sqrt(np.sum(squares, axis=0))
    norms = norms if where is None else np.where(where, norms, 0)
    # Devices that share the parameters round their parts of a norm.
    return Expected(norms, norms, 8 if kernel else _pairwise_roundings(num_terms), *[accumulator_of(*leaves)] * 2)


@quiet
def clipped_weighted_sum(
    updates: Any,
    weights: Any,
    max_norm: Any,
    where: Any = None,
    return_norms: bool = False,
    kernel: bool = False,
) -> Any:
    norms = client_norms(updates, where, kernel)
    # A norm beyond its dtype is returned as infinity, and is one.
    with np.errstate(over="ignore"):
        kept = np.isfinite(norms.value.astype(accumulator_of(*leaves_of(updates))))
    kept = kept if where is None else kept & where
    bound = float(max_norm)
    factors = np.array([min(1.0, bound / norm) if norm > 0 else 1.0 for norm in norms.value])
    shares = widened(weights) * factors
    results = []
    for leaf in leaves_of(updates):
        terms = _weighted_terms(leaf, shares, kept)
        results.append((terms.sum(0), np.abs(terms).sum(0), len(terms) + 6 + norms.roundings))
    total = _finish(updates, results)
    return (total, norms) if return_norms else total


def threefry(key: Any, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): the two words that a key has for each 64-bit counter."""
    key0, key1 = (int(word) for word in key)
    schedule = np.array([key0, key1, key0 ^ key1 ^ 0x1BD11BDA], np.uint32)
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    x0, x1 = (counters >> np.uint64(32)).astype(np.uint32), counters.astype(np.uint32)
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in rotations[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def leaf_keys(key: Any, num_leaves: int) -> list[tuple]:
    return [key] if num_leaves == 1 else list(zip(*threefry(key, np.arange(num_leaves, dtype=np.uint64)), strict=True))


def normals(key: Any, shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    """What `jax.random.normal` means to give, in float64: it rounds a uniform number and its square to float32."""
    counters = np.uint64(first) + np.arange(int(np.prod(shape)), dtype=np.uint64)
    x0, x1 = threefry(key, counters)
    fraction = (((x0 ^ x1) >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.maximum(least, fraction * (np.float32(1) - least) + least)
    rounded = np.sign(uniform) * np.sqrt((uniform * uniform).astype(np.float64))
    return np.sqrt(2) * scipy.special.erfinv(rounded).reshape(shape)


# A normal is off by some ten ulp at most: the polynomial's error, and that of a logarithm near 0.
NORMAL_ROUNDINGS = 20


def _with_noise(total: Any, key: Any, stddev: Any) -> Any:
    leaves, structure = jax.tree.flatten(total, is_leaf=is_expected)
    noisy = []
    for expected, leaf_key in zip(leaves, leaf_keys(key, len(leaves)), strict=True):
        noise = float(stddev) * normals(leaf_key, expected.value.shape)
        # Float32 noise, whatever the accumulator.
        scale = unit_roundoff(np.float32) / unit_roundoff(expected.accumulator)
        magnitude = np.nan_to_num(expected.magnitude, nan=0, posinf=0) + NORMAL_ROUNDINGS * scale * np.abs(noise)
        noisy.append(
            expected._replace(
                value=expected.value + noise, magnitude=magnitude, roundings=max(expected.roundings, 1) + 2
            )
        )
    return jax.tree.unflatten(structure, noisy)


def noisy_weighted_sum(key: Any, updates: Any, weights: Any, stddev: Any, where: Any = None) -> Any:
    return _with_noise(weighted_sum(updates, weights, where), key, stddev)


def clipped_noisy_weighted_sum(
    key: Any,
    updates: Any,
    weights: Any,
    max_norm: Any,
    stddev: Any,
    where: Any = None,
    kernel: bool = False,
) -> Any:
    return _with_noise(clipped_weighted_sum(updates, weights, max_norm, where, kernel=kernel), key, stddev)


# --- Server optimizers ----------------------------------------------------------------------------------------


@quiet
def _server_update(rule: Any, params: Any, state: Any, updates: Any, weights: Any, where: Any) -> Any:
    """`rule(m, v, Δ)` gives the moments, the step, and how errors of Δ grow into errors of the three."""
    deltas = leaves_of_expected(weighted_mean(updates, weights, where))
    someone = where is None or bool(np.any(where))
    good = someone and all(np.isfinite(delta.value).all() for delta in deltas)
    olds, news = [], []
    moments = zip(leaves_of(state.first_moment), leaves_of(state.second_moment), strict=True)
    for param, (first, second), delta in zip(leaves_of(params), moments, deltas, strict=True):
        accumulator = accumulator_of(param)
        old = [widened(x) for x in (param, first, second)]
        (m, m_error), (v, v_error), (step, step_error) = rule(old[1], old[2], delta.value, delta.magnitude)
        new = [(old[0] + step, np.abs(old[0]) + step_error), (m, m_error), (v, v_error)]
        dtypes = (param.dtype, first.dtype, second.dtype)
        good = good and all(np.isfinite(value.astype(d)).all() for (value, _), d in zip(new, dtypes, strict=True))
        olds.append([Expected(x, np.abs(x), 0, accumulator, d) for x, d in zip(old, dtypes, strict=True)])
        news.append(
            [
                Expected(value, np.abs(magnitude), delta.roundings + 8, accumulator, d)
                for (value, magnitude), d in zip(new, dtypes, strict=True)
            ]
        )
    columns = list(zip(*(news if good else olds), strict=True))
    structure = jax.tree.structure(params)
    step_count = np.asarray(min(int(state.step) + int(good), np.iinfo(np.int32).max), np.int32)
    trees = [jax.tree.unflatten(structure, column) for column in columns]
    return trees[0], type(state)(Expected(step_count, step_count, 0, np.float32, np.int32), *trees[1:])


def leaves_of_expected(tree: Any) -> list[Expected]:
    return jax.tree.leaves(tree, is_leaf=is_expected)


def fedavgm_weighted_update(
    params: Any, state: Any, updates: Any, learning_rate: Any, momentum: Any, weights: Any = None, where: Any = None
) -> Any:
    eta, beta = float(learning_rate), float(momentum)

    def rule(m: Any, v: Any, delta: Any, error: Any) -> Any:
        m, m_error = beta * m + delta, np.abs(beta * m) + error
        return (m, m_error), (v, v), (eta * m, eta * m_error)

    return _server_update(rule, params, state, updates, weights, where)


def _adaptive(eta: float, b1: float, tau: float, new_second: Any) -> Any:
    def rule(m: Any, v: Any, delta: Any, error: Any) -> Any:
        m, m_error = b1 * m + (1 - b1) * delta, np.abs(b1 * m) + (1 - b1) * error
        v, v_error = new_second(v, delta, 2 * np.abs(delta) * error + delta**2)
        root = np.sqrt(v)
        # d(√v) = dv / 2√v.
        step_error = m_error / (root + tau) + np.abs(m) / (root + tau) ** 2 * (v_error / (2 * root) + root + tau)
        stays = root + tau == 0
        step, step_error = np.where(stays, 0, eta * m / (root + tau)), np.where(stays, 0, eta * step_error)
        return (m, m_error), (v, v_error), (step, step_error)

    return rule


def fedadagrad_weighted_update(
    params: Any, state: Any, updates: Any, learning_rate: Any, b1: Any, tau: Any, weights: Any = None, where: Any = None
) -> Any:
    rule = _adaptive(float(learning_rate), float(b1), float(tau), lambda v, delta, error: (v + delta**2, v + error))
    return _server_update(rule, params, state, updates, weights, where)


def fedadam_weighted_update(
    params: Any, state: Any, updates: Any, learning_rate: Any, b1: Any, b2: Any, tau: Any,
    weights: Any = None, where: Any = None,
) -> Any:  # fmt: skip
    def new_second(v: Any, delta: Any, error: Any) -> Any:
        return float(b2) * v + (1 - float(b2)) * delta**2, float(b2) * v + (1 - float(b2)) * error

    rule = _adaptive(float(learning_rate), float(b1), float(tau), new_second)
    return _server_update(rule, params, state, updates, weights, where)


def fedyogi_weighted_update(
    params: Any, state: Any, updates: Any, learning_rate: Any, b1: Any, b2: Any, tau: Any,
    weights: Any = None, where: Any = None,
) -> Any:  # fmt: skip
    def new_second(v: Any, delta: Any, error: Any) -> Any:
        step = (1 - float(b2)) * delta**2 * np.sign(v - delta**2)
        return v - step, v + (1 - float(b2)) * error

    rule = _adaptive(float(learning_rate), float(b1), float(tau), new_second)
    return _server_update(rule, params, state, updates, weights, where)


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
    if not jax.numpy.issubdtype(got.dtype, np.floating):
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
