"""`fedfuse_jax.compat.byzfl` against the installed `byzfl`, on hundreds of random cases a rule.

Needs `byzfl` and SciPy; `pip install --no-deps byzfl` is enough.
"""

from __future__ import annotations

import importlib.util

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

from benchmarks.systems import load_byzfl
from fedfuse_jax.compat import _selection
from fedfuse_jax.compat import byzfl as ours

pytest.importorskip("scipy")
if importlib.util.find_spec("byzfl") is None:
    pytest.skip("byzfl is not installed", allow_module_level=True)

theirs = load_byzfl()

every_shape = pytest.mark.parametrize(("n", "d"), SHAPES, ids=str)


def bounds(n: int) -> list[int]:
    """Numbers of bad clients: the most that ByzFL allows, and about half as many."""
    return sorted({(n - 1) // 2, (n - 1) // 4})


def many(rule, matrices):
    """Ours, compiled once for all cases."""
    return np.asarray(jax.jit(jax.vmap(rule))(matrices))


def each(name, arguments, cases, prepare=lambda x, bad: x):
    """Theirs, case after case, in float64."""
    rule = getattr(theirs, name)(*arguments)
    with np.errstate(all="ignore"):
        return [
            rule(prepare(x.astype(np.float64), bad).copy()) for x, bad in zip(cases.matrices, cases.bad, strict=True)
        ]


# --- Coordinate by coordinate -----------------------------------------------------------------------------------


@every_shape
def test_average(n, d):
    cases = draw(n, d, 0, seed=1, rounds=5)
    expected = each("Average", (), cases)
    for got, value, x in zip(many(ours.Average(), cases.matrices), expected, cases.matrices, strict=True):
        assert_near(got, value, x)


@every_shape
def test_median(n, d):
    for f in bounds(n):
        cases = draw(n, d, f, seed=2)
        expected = each("Median", (), cases, lambda x, bad: nan_is_greatest(x))
        for got, value, x in zip(many(ours.Median(), cases.matrices), expected, cases.matrices, strict=True):
            assert_near(got, value, x)


@every_shape
def test_trimmed_mean(n, d):
    for f in bounds(n):
        cases = draw(n, d, f, seed=3)
        expected = each("TrMean", (f,), cases)
        for got, value, x in zip(many(ours.TrMean(f), cases.matrices), expected, cases.matrices, strict=True):
            assert_near(got, value, x)


@every_shape
def test_mean_around_median(n, d):
    compared = 0
    for f in bounds(n):
        cases = draw(n, d, f, seed=4)
        expected = each("Meamed", (f,), cases, lambda x, bad: nan_is_greatest(x))
        for got, value, x in zip(many(ours.Meamed(f), cases.matrices), expected, cases.matrices, strict=True):
            with np.errstate(invalid="ignore"):
                clear = clear_coordinates(nan_is_greatest(x.astype(np.float64)), n - f)
            assert_near(got[clear], value[clear], x)
            compared += clear.mean()
    assert compared > 0.7 * len(bounds(n)) * len(cases.kinds)


# --- By distances -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("name", ["Krum", "MultiKrum"])
def test_krum(name, n, d):
    compared = total = 0
    for f in bounds(n):
        cases = draw(n, d, f, seed=5)
        rule, count = getattr(ours, name)(f), 1 if name == "Krum" else n - f
        selected = many(lambda x, rule=rule, count=count: _selection.lowest(rule._scores(x), count), cases.matrices)
        expected = each(name, (f,), cases, far_instead)  # there, a client with NaN would win
        for index, got in enumerate(many(rule, cases.matrices)):
            x = far_instead(cases.matrices[index].astype(np.float64), cases.bad[index])
            scores = krum_scores(squared_distances(x), n - f - 1)
            chosen, clear = lowest(scores, count)
            total += 1
            # Krum takes the lower index at an exact tie, here and there: of integers, or of two nearest each other.
            if clear or (name == "Krum" and (cases.kinds[index] == "ties" or n - f - 1 == 1)):
                compared += 1
                assert set(np.flatnonzero(selected[index]).tolist()) == chosen, cases.kinds[index]
                assert_near(got, expected[index], cases.matrices[index], cases.kinds[index])
    assert compared > total / 2


@every_shape
def test_multi_krum_as_it_is_with_nan(n, d):
    """Where ByzFL happens to be right about NaN, it is asked about NaN."""
    f = (n - 1) // 2
    cases = draw(n, d, f, seed=6)
    with_nan = [index for index, kind in enumerate(cases.kinds) if "nan" in kind and f > 0]
    expected = each("MultiKrum", (f,), cases)
    got = many(ours.MultiKrum(f), cases.matrices)
    for index in with_nan:
        distances = squared_distances(far_instead(cases.matrices[index].astype(np.float64), cases.bad[index]))
        if lowest(krum_scores(distances, n - f - 1), n - f)[1]:
            assert_near(got[index], expected[index], cases.matrices[index])


def test_byzfl_lets_a_nan_client_win():
    """The difference that the docstrings speak of; if this fails, ByzFL has been mended."""
    x = np.array([[1.0, 2.0], [1.5, 2.0], [1.0, 2.5], [np.nan, 0.0]])
    with np.errstate(invalid="ignore"):
        assert np.isnan(theirs.Krum(1)(x)).any()
        assert np.isnan(theirs.Median()(x)).any()
        assert np.isnan(theirs.GeometricMedian()(x)).any()
    np.testing.assert_array_equal(ours.Krum(1)(x), [1, 2])


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 9), (4, 17), (7, 100), (11, 10_000), (20, 333), (33, 1000)], ids=str)
def test_minimum_diameter_averaging(n, d):
    compared = total = 0
    for f in {min(f, 5 if n < 12 else 1) for f in bounds(n)}:
        cases = draw(n, d, f, seed=7)
        rule = ours.MDA(f)
        left_out = many(lambda x, rule=rule: rule._best_subset(x)[1], cases.matrices)
        expected = each("MDA", (f,), cases)
        for index, got in enumerate(many(rule, cases.matrices)):
            x = far_instead(cases.matrices[index].astype(np.float64), cases.bad[index])
            kept = np.delete(np.arange(n), left_out[index])
            total += 1
            if diameters_are_clear(squared_distances(x), f):
                compared += 1
                assert_near(got, expected[index], cases.matrices[index], cases.kinds[index])
                assert_near(got, cases.matrices[index][kept].mean(axis=0, dtype=np.float64), cases.matrices[index])
    assert compared > total / 3


def diameters_are_clear(distances, f):
    from itertools import combinations

    n = len(distances)
    diameters = [np.delete(np.delete(distances, out, 0), out, 1).max() for out in combinations(range(n), f)]
    ascending = np.sort(diameters)
    return len(ascending) == 1 or is_clear(ascending, 1)


@every_shape
def test_monna(n, d):
    for f in bounds(n):
        cases = draw(n, d, f, seed=8)
        idx = n // 2
        expected = each("MoNNA", (f, idx), cases, far_instead)
        for index, got in enumerate(many(ours.MoNNA(f, idx), cases.matrices)):
            if cases.bad[index][idx]:
                assert np.isnan(got).any()  # who is trusted is bad
                continue
            x = far_instead(cases.matrices[index].astype(np.float64), cases.bad[index])
            if is_clear(np.sort(squared_distances(x)[idx]), n - f):
                assert_near(got, expected[index], cases.matrices[index], cases.kinds[index])


@every_shape
def test_nearest_neighbor_mixing(n, d):
    compared = total = 0
    for f in bounds(n):
        cases = draw(n, d, f, seed=9)
        expected = each("NNM", (f,), cases, far_instead)
        for index, got in enumerate(many(ours.NNM(f), cases.matrices)):
            bad = cases.bad[index]
            distances = squared_distances(far_instead(cases.matrices[index].astype(np.float64), bad))
            clear = [not bad[i] and is_clear(np.sort(distances[i]), n - f) for i in range(n)]
            assert_near(got[clear], expected[index][clear], cases.matrices[index], cases.kinds[index])
            np.testing.assert_array_equal(got[bad], 0)
            compared, total = compared + np.sum(clear), total + np.sum(~bad)
    assert compared > total / 2


# --- Around a point ---------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(("nu", "iterations"), [(0.1, 3), (1e-3, 1), (2.0, 8), (0.1, 0)])
def test_geometric_median(n, d, nu, iterations):
    cases = draw(n, d, (n - 1) // 2, seed=10)

    def infinite_instead(x, bad):  # there, infinite clients have no influence, those with NaN have
        x[bad] = np.inf
        return x

    expected = each("GeometricMedian", (nu, iterations), cases, infinite_instead)
    got = many(ours.GeometricMedian(nu, iterations), cases.matrices)
    for index, x in enumerate(cases.matrices):
        assert_near(got[index], expected[index], x, cases.kinds[index])


@every_shape
@pytest.mark.parametrize(("steps", "tau"), [(1, 100.0), (3, 1.0), (0, 1.0), (2, 0.0)])
def test_centered_clipping_over_three_calls(n, d, steps, tau):
    cases = draw(n, d, (n - 1) // 2, seed=11)
    for first in range(0, len(cases.kinds) - 2, 3):
        rule, other = ours.CenteredClipping(None, steps, tau), theirs.CenteredClipping(None, steps, tau)
        for index in range(first, first + 3):
            x = cases.matrices[index]
            finite = x[~cases.bad[index]].astype(np.float64)  # the others would make it NaN for ever
            if tau == 0 and not finite.any(axis=1).all():
                break  # 0 / 0, there
            with np.errstate(all="ignore"):
                expected = other(finite)
            assert_near(rule(x), expected, cases.matrices)  # the centre goes through all of them
            assert_near(np.asarray(rule.m), expected, cases.matrices)


# --- Before another rule ----------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_bucketing_with_the_same_seed(n, d, size):
    cases = draw(n, d, (n - 1) // 2, seed=12, rounds=1)
    for index, x in enumerate(cases.matrices):
        np.random.seed(index)
        with np.errstate(all="ignore"):
            expected = theirs.Bucketing(size)(x.astype(np.float64))
        np.random.seed(index)
        assert_near(ours.Bucketing(size)(x), expected, x, cases.kinds[index])


@every_shape
@pytest.mark.parametrize("norm", [2.0, 30.0, 0.0])
def test_clipping(n, d, norm):
    cases = draw(n, d, (n - 1) // 2, seed=13)
    expected = each("Clipping", (norm,), cases)
    for index, got in enumerate(many(ours.Clipping(norm), cases.matrices)):
        assert_near(got, expected[index], cases.matrices[index], cases.kinds[index])


@every_shape
def test_adaptive_robust_clipping(n, d):
    for f in {*bounds(n), n // 2}:
        cases = draw(n, d, min(f, (n - 1) // 2), seed=14)
        expected = each("ARC", (f,), cases)
        for index, got in enumerate(many(ours.ARC(f), cases.matrices)):
            if "nan" not in cases.kinds[index]:  # Python does not sort NaN
                assert_near(got, expected[index], cases.matrices[index], cases.kinds[index])


# --- Dtypes ---------------------------------------------------------------------------------------------------------

BY_NAME = [("Average", ()), ("Median", ()), ("TrMean", (2,)), ("Krum", (2,)), ("MultiKrum", (2,)), ("MDA", (2,))]
BY_NAME += [("MoNNA", (2,)), ("Meamed", (2,)), ("NNM", (2,)), ("GeometricMedian", ())]


@pytest.mark.parametrize(("name", "arguments"), BY_NAME, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "int64", "int32"])
def test_float64_and_integers(name, arguments, dtype):
    """To float64's digits, without JAX's float64; integers become it, but for those that Krum selects."""
    x = np.random.default_rng(15).normal(size=(7, 30)) * 1000 + 2**24
    x = x.astype(dtype)
    got, expected = getattr(ours, name)(*arguments)(x), getattr(theirs, name)(*arguments)(x.copy())
    assert got.dtype == expected.dtype == (dtype if name == "Krum" else np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    assert not jax.config.jax_enable_x64


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TrMean", "Krum", "MultiKrum", "MDA", "MoNNA", "Meamed", "NNM", "ARC"])
@pytest.mark.parametrize("f", [-1, 1.5, "1", 2, 3, 4, 5])
def test_refuses_what_byzfl_refuses(name, f):
    x = np.arange(8.0).reshape(4, 2)

    def outcome(module):
        try:
            return np.shape(getattr(module, name)(f)(x.copy()))
        except Exception as error:
            return type(error)

    assert outcome(ours) == outcome(theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GeometricMedian", {"nu": 1}),
        ("GeometricMedian", {"T": -1}),
        ("GeometricMedian", {"T": 1.0}),
        ("CenteredClipping", {"L": -1}),
        ("CenteredClipping", {"tau": 1}),
        ("CenteredClipping", {"tau": -1.0}),
        ("Bucketing", {"s": 0}),
        ("Clipping", {"c": 2}),
        ("Clipping", {"c": -1.0}),
        ("MoNNA", {"idx": -1}),
    ],
)
def test_refuses_options_that_byzfl_refuses(name, options):
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(theirs, name)(**options)
    with pytest.raises(expected.type, match=rf"^{name}: {next(iter(options))} must be"):
        getattr(ours, name)(**options)
