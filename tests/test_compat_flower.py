"""`fedfuse_jax.compat.flower` against the installed `flwr`, on hundreds of random cases a rule."""

from __future__ import annotations

import logging
import types

import jax
import numpy as np
import pytest
from compat_cases import (
    SHAPES,
    assert_near,
    clear_coordinates,
    draw,
    far_instead,
    is_clear,
    krum_scores,
    lowest,
    nan_is_greatest,
    squared_distances,
)

from fedfuse_jax.compat import _selection
from fedfuse_jax.compat import flower as ours

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy import aggregate as legacy
from flwr.serverapp import strategy as theirs

logging.getLogger("flwr").setLevel(logging.ERROR)

every_shape = pytest.mark.parametrize(("n", "d"), SHAPES, ids=str)


def bounds(n: int, most: int | None = None) -> list[int]:
    most = (n - 1) // 2 if most is None else most
    return sorted({most, most // 2})


def examples(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(1, 200, n)


def many(rule, cases):
    """Ours, compiled once for all cases, on a tree of two leaves."""
    n = cases.matrices.shape[1]
    results = jax.jit(jax.vmap(lambda tree: rule(tree, examples(n))))(as_trees(cases.matrices))
    return np.concatenate([np.asarray(results["a"]), np.asarray(results["b"])], axis=-1)


def as_trees(matrices):
    cut = matrices.shape[-1] // 3
    return {"a": matrices[..., :cut], "b": matrices[..., cut:]}


def replies(x):
    """What clients send to Flower: two arrays each, and their number of examples."""
    contents = []
    for row, count in zip(x, examples(len(x)), strict=True):
        arrays = ArrayRecord({name: Array(array) for name, array in as_trees(row).items()})
        contents.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": int(count)})}))
    return contents


def aggregate(strategy, x):
    """Theirs, through the strategy itself; what it knows of messages is put aside."""
    messages = [types.SimpleNamespace(content=content) for content in replies(x)]
    strategy._check_and_log_replies = lambda replies, is_train: (messages, [])
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)  # which Bulyan does once a client
        arrays, _ = strategy.aggregate_train(1, messages)
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


def results_of(x):
    """The clients as Flower's legacy functions have them."""
    return [([row[: len(row) // 3], row[len(row) // 3 :]], int(w)) for row, w in zip(x, examples(len(x)), strict=True)]


# --- Coordinate by coordinate -----------------------------------------------------------------------------------


@every_shape
def test_median(n, d):
    for f in bounds(n):
        cases = draw(n, d, f, seed=21, rounds=2)
        for got, x in zip(many(ours.FedMedian(), cases), cases.matrices, strict=True):
            expected = aggregate(theirs.FedMedian(), nan_is_greatest(x.astype(np.float64)))
            assert_near(got, expected, x)


@every_shape
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.29, 0.4999])
def test_trimmed_mean(n, d, beta):
    cases = draw(n, d, int(beta * n), seed=22, rounds=1)
    for got, x in zip(many(ours.FedTrimmedAvg(beta), cases), cases.matrices, strict=True):
        assert_near(got, aggregate(theirs.FedTrimmedAvg(beta=beta), x.astype(np.float64)), x)


# --- Krum -------------------------------------------------------------------------------------------------------


def selected_by(rule, cases, count):
    def selected(tree):
        return _selection.lowest(ours._scores(rule, tree), count)

    return np.asarray(jax.jit(jax.vmap(selected))(as_trees(cases.matrices)))


@every_shape
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_krum(n, d, share):
    compared = total = 0
    for f in bounds(n):
        count = max(1, int(share * (n - f)))
        rule = ours.MultiKrum(f, count) if share else ours.Krum(f)
        flowers = theirs.MultiKrum(num_malicious_nodes=f, num_nodes_to_select=count)
        if not share:
            flowers = theirs.Krum(num_malicious_nodes=f)
        cases = draw(n, d, f, seed=23, rounds=2)
        chosen_by_us = selected_by(rule, cases, count)
        for index, got in enumerate(many(rule, cases)):
            kind, x = cases.kinds[index], cases.matrices[index].astype(np.float64)
            distances = squared_distances(far_instead(x, cases.bad[index]))
            chosen, clear = lowest(krum_scores(distances, max(1, n - f - 2)), count)
            total += 1
            if clear:
                compared += 1
                assert set(np.flatnonzero(chosen_by_us[index]).tolist()) == chosen, kind
                assert_near(got, aggregate(flowers, x), x, kind)  # NaN included: Flower bears it
    assert compared > total / 2 or n < 5  # two that are nearest each other, and have no other neighbour, always tie


@every_shape
def test_krum_selects_whom_flower_selects(n, d):
    f = (n - 1) // 2
    cases = draw(n, d, f, seed=24, rounds=2)
    chosen_by_us = selected_by(ours.MultiKrum(f, n - f), cases, n - f)
    for index, matrix in enumerate(cases.matrices):
        x = matrix.astype(np.float64)
        contents = replies(x)
        with np.errstate(all="ignore"):
            picked = theirs.multikrum.select_multikrum(contents, f, n - f)
        picked = {position for content in picked for position in range(n) if contents[position] is content}
        distances = squared_distances(far_instead(x, cases.bad[index]))
        if lowest(krum_scores(distances, max(1, n - f - 2)), n - f)[1]:
            assert set(np.flatnonzero(chosen_by_us[index]).tolist()) == picked, cases.kinds[index]


def test_legacy_krum_lets_a_nan_client_win():
    """The difference that the docstrings speak of."""
    x = np.array([[1.0, 2.0, 0.0], [1.5, 2.0, 0.0], [1.0, 2.5, 0.0], [np.nan, 0.0, 0.0]])
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.concatenate(legacy.aggregate_krum(results_of(x), 1, 0))).any()
    np.testing.assert_array_equal(np.concatenate(ours.Krum(1)([weights for weights, _ in results_of(x)])), [1, 2, 0])


# --- Bulyan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(3, 4), (7, 100), (11, 1000), (20, 333), (64, 100)], ids=str)
def test_bulyan(n, d):
    compared = total = 0
    for f in bounds(n, (n - 3) // 4):
        cases = draw(n, d, f, seed=25)
        for index, got in enumerate(many(ours.Bulyan(f), cases)):
            x = cases.matrices[index].astype(np.float64)
            scores = krum_scores(squared_distances(far_instead(x, cases.bad[index])), max(1, n - f - 2))
            chosen, clear = lowest(scores, n - 2 * f)
            total += 1
            if clear:
                expected = aggregate(theirs.Bulyan(num_malicious_nodes=f), x)
                sure = clear_coordinates(x[sorted(chosen)], n - 4 * f)
                assert_near(got[sure], expected[sure], x, cases.kinds[index])
                compared += sure.mean()
    assert compared > total / 2


@pytest.mark.parametrize(("n", "d"), [(3, 4), (7, 100), (11, 1000), (20, 333)], ids=str)
def test_legacy_bulyan(n, d):
    compared = total = 0
    for f in bounds(n, (n - 3) // 4):
        cases = draw(n, d, f, seed=26)
        for index, got in enumerate(many(ours.LegacyBulyan(f), cases)):
            # There, a client with NaN would be picked first.
            x = far_instead(cases.matrices[index].astype(np.float64), cases.bad[index])
            picks, clear = picks_one_by_one(squared_distances(x), f)
            total += 1
            if clear:
                expected = np.concatenate(legacy.aggregate_bulyan(results_of(x), f, legacy.aggregate_krum, to_keep=0))
                sure = clear_coordinates(x[picks], n - 4 * f)
                assert_near(got[sure], expected[sure], cases.matrices[index], cases.kinds[index])
                compared += sure.mean()
    assert compared > total / 3


def picks_one_by_one(distances, f):
    left, picks, clear = list(range(len(distances))), [], True
    for _ in range(len(distances) - 2 * f):
        num_neighbors = max(1, len(left) - f - 2)
        scores = krum_scores(distances[np.ix_(left, left)], num_neighbors)
        # Two that are nearest each other, and have no other neighbour, tie exactly: the lower index is taken.
        ties = np.sum(scores == scores.min()) if num_neighbors == 1 else 1
        clear = clear and is_clear(np.sort(scores), ties)
        picks.append(left.pop(np.argmin(scores)))
    return picks, clear


def test_the_two_bulyans_differ():
    cases = draw(11, 5, 2, seed=27, rounds=10)
    one, other = many(ours.Bulyan(2), cases), many(ours.LegacyBulyan(2), cases)
    plain = [index for index, kind in enumerate(cases.kinds) if kind == "plain"]
    assert np.mean([not np.allclose(one[index], other[index]) for index in plain]) > 0.5
