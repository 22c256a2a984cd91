"""`fedfuse_jax.compat` without the packages whose conventions it follows: small vectors, forms of input, errors."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedfuse_jax as ff
from fedfuse_jax.compat import byzfl, flower

LADDER = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)

# What the documentation of ByzFL 0.0.11 says of LADDER.
BYZFL = [
    (byzfl.Average(), [4, 5, 6]),
    (byzfl.Median(), [4, 5, 6]),
    (byzfl.TrMean(1), [4, 5, 6]),
    (byzfl.GeometricMedian(), [3.78788764, 4.78788764, 5.78788764]),
    (byzfl.Krum(1), [1, 2, 3]),
    (byzfl.MultiKrum(1), [2.5, 3.5, 4.5]),
    (byzfl.MDA(1), [2.5, 3.5, 4.5]),
    (byzfl.MoNNA(1, 2), [5.5, 6.5, 7.5]),
    (byzfl.Meamed(1), [2.5, 3.5, 4.5]),
    (byzfl.NNM(1), [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]]),
    (byzfl.Clipping(2.0), 2 * LADDER / np.linalg.norm(LADDER, axis=1, keepdims=True)),
    (byzfl.ARC(1), [[1, 2, 3], [4, 5, 6], [4.4101, 5.0401, 5.6701]]),
]
every_rule = pytest.mark.parametrize(("rule", "expected"), BYZFL, ids=lambda value: type(value).__name__)


def as_list(x):
    return [np.array(row) for row in x]


# --- ByzFL ------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("form", [np.asarray, as_list, jnp.asarray, lambda x: list(jnp.asarray(x))])
def test_known_vectors(rule, expected, form):
    vectors = form(LADDER)
    got = rule(vectors)
    first = vectors[0] if isinstance(vectors, list) else vectors
    assert isinstance(got, np.ndarray) == isinstance(first, np.ndarray)
    assert isinstance(got, jax.Array) == isinstance(first, jax.Array)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@every_rule
def test_under_jit_and_vmap(rule, expected):
    got = jax.jit(jax.vmap(rule))(jnp.stack([LADDER, 2 * LADDER]))
    np.testing.assert_allclose(got[0], expected, rtol=2e-5)


@every_rule
def test_nothing_handed_in_is_changed(rule, expected):
    for form in (np.array, as_list):
        vectors = form(LADDER)
        rule(vectors)
        np.testing.assert_array_equal(vectors, LADDER)


@every_rule
def test_integers_and_tensors(rule, expected):
    for dtype in (float, int, np.uint8):
        got = rule(LADDER.astype(dtype))
        assert got.dtype == (dtype if type(rule) is byzfl.Krum else np.float64)
        np.testing.assert_allclose(got, rule(LADDER.astype(float)), rtol=1e-15)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert rule(LADDER.astype(np.float16)).dtype == np.float32
    assert rule(jnp.asarray(LADDER, int)).dtype == jnp.float32
    torch = pytest.importorskip("torch")
    for vectors in (torch.from_numpy(LADDER.copy()), [torch.from_numpy(row) for row in LADDER.copy()]):
        got = rule(vectors)
        assert isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5)


ROBUST = [byzfl.Median(), byzfl.TrMean(2), byzfl.GeometricMedian(), byzfl.Krum(2), byzfl.MultiKrum(2), byzfl.MDA(2)]
ROBUST += [byzfl.MoNNA(2), byzfl.Meamed(2), byzfl.CenteredClipping(tau=1.0)]


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_clients_do_not_win(rule, bad):
    vectors = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
    vectors[[2, 5]] = bad
    honest = np.delete(vectors, [2, 5], axis=0)
    assert np.linalg.norm(rule(vectors) - honest.mean(axis=0)) < np.linalg.norm(honest, axis=1).max()


@pytest.mark.parametrize(
    "rule", [byzfl.Krum(1), byzfl.MultiKrum(1), byzfl.MDA(1)], ids=lambda rule: type(rule).__name__
)
def test_more_bad_clients_than_bearable_give_nan(rule):
    vectors = np.array([[1.0], [2.0], [np.nan], [np.nan]], np.float32)
    assert np.isnan(rule(vectors)).all()


def test_everybody_has_an_own_number_of_neighbors():
    values = np.array([[0.0], [2.0], [4.0], [10.0], [10.1]], np.float32)
    assert byzfl.Krum(1)(values) == 4  # of three neighbours
    assert flower.Krum(1)(values) == 2  # of two


def test_centered_clipping_remembers():
    rule = byzfl.CenteredClipping(np.array([1.0, 1.0]), L=2, tau=1.0)
    first = rule(np.array([[1.0, 2.0], [1.0, 5.0]], np.float32))
    np.testing.assert_allclose(first, [1, 2.5])
    np.testing.assert_allclose(rule.m, first)
    np.testing.assert_allclose(rule(np.array([[1.0, 2.5]], np.float32)), first)
    np.testing.assert_allclose(byzfl.CenteredClipping(L=0)(LADDER), 0)


def test_bucketing():
    np.random.seed(3)
    got = byzfl.Bucketing(2)(LADDER)
    np.random.seed(3)
    order = np.random.permutation(3)
    np.testing.assert_allclose(got, [LADDER[order[:2]].mean(axis=0), LADDER[order[2]]])
    with pytest.raises(TypeError, match="Bucketing: vectors is traced"):
        jax.jit(byzfl.Bucketing(2))(LADDER)
    with pytest.raises(TypeError, match="CenteredClipping: vectors is traced"):
        jax.jit(lambda vectors: byzfl.CenteredClipping()(vectors))(LADDER)


@pytest.mark.parametrize("vectors", [[], np.zeros(3), np.zeros((0, 3)), [np.float32(1)]], ids=str)
def test_refuses_what_are_no_vectors(vectors):
    with pytest.raises(ValueError, match=r"^Krum: vectors .*; it needs"):
        byzfl.Krum(0)(vectors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: byzfl.Krum(-1), "Krum: f must be a non-negative integer, got -1"),
        (lambda: byzfl.Krum(True), "Krum: f must be a non-negative integer, got True"),
        (lambda: byzfl.TrMean(2)(LADDER), "TrMean: Cannot tolerate 2f ≥ n. Got f=2, n=3"),
        (lambda: byzfl.MoNNA(1, 3)(LADDER), "MoNNA: idx must be smaller than n, but got idx=3 and n=3"),
        (lambda: byzfl.NNM(3)(LADDER), "NNM: f must be smaller than len(vectors), but got f=3 and len(vectors)=3"),
        (lambda: byzfl.ARC(4)(LADDER), "ARC: f must be smaller than len(vectors)+1"),
        (lambda: byzfl.Bucketing(0), "Bucketing: s must be a positive integer, got 0"),
        (lambda: byzfl.Clipping(1), "Clipping: c must be a non-negative float, got 1"),
        (lambda: byzfl.MDA(20)(np.zeros((64, 2))), "MDA: f=20 of n=64 leaves"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


# --- Flower -----------------------------------------------------------------------------------------------------

VALUES = np.array([1.0, 1.5, 2.5, 2.0, np.nan], np.float32)
FLOWER = [
    (flower.Krum(1), 1.5),
    (flower.MultiKrum(1, 2), (1.5 * 2 + 2.0 * 4) / 6),
    (flower.FedMedian(), 2.0),
    (flower.FedTrimmedAvg(0.2), 2.0),
]
every_strategy = pytest.mark.parametrize(("rule", "expected"), FLOWER, ids=lambda value: type(value).__name__)
NUM_EXAMPLES = [1, 2, 3, 4, 1000]


@every_strategy
def test_flower_on_both_forms(rule, expected):
    tree = {"w": jnp.asarray(VALUES)[:, None], "b": jnp.asarray(VALUES)}
    got = rule(tree, NUM_EXAMPLES)
    np.testing.assert_allclose([got["w"][0], got["b"]], expected, rtol=1e-6)
    clients = [[np.full((1,), value, np.float32), np.float32(value)] for value in VALUES]
    got = rule(clients, NUM_EXAMPLES)
    assert [type(array) for array in got] == [np.ndarray] * 2
    np.testing.assert_allclose([got[0][0], got[1]], expected, rtol=1e-6)


@every_strategy
def test_flower_under_jit_and_vmap(rule, expected):
    got = jax.jit(jax.vmap(rule, in_axes=(0, None)))(jnp.stack([VALUES, 2 * VALUES]), jnp.array(NUM_EXAMPLES))
    np.testing.assert_allclose(got, [expected, 2 * expected], rtol=1e-6)
    as_argument = jax.jit(lambda rule, updates: rule(updates, jnp.array(NUM_EXAMPLES)), static_argnums=0)
    np.testing.assert_allclose(as_argument(rule, VALUES), expected, rtol=1e-6)


@every_strategy
def test_flower_keeps_dtypes(rule, expected):
    tree = {"half": jnp.asarray(VALUES, jnp.float16), "w": jnp.asarray(VALUES)}
    assert {name: leaf.dtype for name, leaf in rule(tree).items()} == {"half": jnp.float16, "w": jnp.float32}
    got = rule([[np.float64(value)[None], np.float16(value)[None]] for value in VALUES])
    assert [array.dtype for array in got] == [np.float64, np.float16]


OF_NUMPY = [
    (flower.FedAvg(), lambda x, w: np.average(x, axis=0, weights=w)),
    (flower.FedMedian(), lambda x, w: np.median(x, axis=0)),
    (flower.FedTrimmedAvg(0.2), lambda x, w: np.sort(x, axis=0)[1:-1].mean(axis=0)),
    (flower.Krum(1), lambda x, w: x[3]),
    (flower.MultiKrum(1, 2), lambda x, w: np.average(x[[0, 3]], axis=0, weights=w[[0, 3]])),
]


@pytest.mark.parametrize(("rule", "of_numpy"), OF_NUMPY, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_flower_computes_as_the_host_does(rule, of_numpy, dtype):
    """In float64, whatever JAX is set to, on numbers that float32 has not."""
    x = np.array([[0.75, 7.0], [9.0, 2.5], [-3.0, 1.5], [0.5, 6.5], [4.0, -5.0]])
    x = (2**30 + 1 + 4 * x if dtype == "int64" else x / 3).astype(dtype)
    w = np.array([3_000_000_001, 10, 7, 1_000_000_003, 5])
    small = np.float32([1, 2, 3, 4, 5]) / 1000
    got, beside = rule([[row, number] for row, number in zip(x, small, strict=True)], w)
    assert (got.dtype, beside.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(got, of_numpy(x.astype(float), w), rtol=1e-15)
    assert not jax.config.jax_enable_x64


def test_flower_selects_to_the_bit():
    clients = [[np.array([value])] for value in (0.2, 0.7, 1.0)]
    for num_examples in (None, [3, 7, 11]):
        assert flower.Krum(0)(clients, num_examples)[0] == 0.7
        assert byzfl.Krum(1)([client[0] for client in clients]) == 0.7
    assert np.isnan(flower.Krum(0)(clients, [1, 0, 1])[0])


def test_flower_rounds_large_numbers_of_examples():
    """JAX alone would cut them to 32 bits."""
    updates, tokens = jnp.array([[0.0], [1.0]]), [3_000_000_000, 1_000_000_000]
    assert flower.FedAvg()(updates, tokens) == 0.25
    strategy = flower.FedAvgM()
    assert strategy(jnp.zeros(1), strategy.init(jnp.zeros(1)), updates, tokens)[0] == 0.25


def test_flower_on_integers_in_pytrees():
    tree = {"count": jnp.array([1, 2, 6]), "host": np.array([1, 2, 6]), "w": jnp.array([1.0, 2.0, 6.0])}
    for rule, expected in ((flower.FedAvg(), 3.0), (flower.FedMedian(), 2.0), (flower.Krum(0), 1.0)):
        got = rule(tree)
        assert {leaf.dtype.name for leaf in got.values()} == {"float32"}
        assert {float(leaf) for leaf in got.values()} == {expected}


def test_flower_on_models_without_arrays():
    for rule in (flower.FedAvg(), flower.FedMedian(), flower.FedTrimmedAvg()):
        assert rule([[], [], []], [1, 2, 3]) == []
    for strategy in (flower.FedAvgM(), flower.FedAdagrad(), flower.FedAdam(), flower.FedYogi()):
        params, state = strategy([], strategy.init([]), [[], []], [1, 2])
        assert (params, int(state.step), state.first_moment) == ([], 0, [])


@pytest.mark.parametrize("kind", ["list", "tree"])
def test_whom_flower_selects(kind):
    values = np.array([1.0, 2.0, 3.0, 4.5, 6.0, 60.0, np.nan], np.float32)
    updates = [[value[None]] for value in values] if kind == "list" else {"w": jnp.asarray(values)}
    rules = [(flower.Krum(1), [2]), (flower.MultiKrum(1, 3), [1, 2, 3]), (flower.Bulyan(1), [0, 1, 2, 3, 4])]
    for rule, expected in rules:
        selected = rule.selected(updates)
        assert isinstance(selected, np.ndarray) == (kind == "list")
        assert selected.dtype == bool
        assert np.flatnonzero(selected).tolist() == expected
    if kind == "tree":
        np.testing.assert_array_equal(jax.jit(rule.selected)(updates), selected)
        np.testing.assert_allclose(ff.mean_around_median(updates, 2, where=selected)["w"], rule(updates)["w"])


def test_whom_byzfl_selects():
    vectors = np.array([[0.0], [2.0], [4.0], [10.0], [10.1]], np.float32)
    for rule, count in ((byzfl.Krum(1), 1), (byzfl.MultiKrum(1), 4)):
        for form in (np.asarray, as_list, jnp.asarray):
            selected = rule.selected(form(vectors))
            assert isinstance(selected, np.ndarray) == (form is not jnp.asarray)
            assert np.sum(selected) == count
            np.testing.assert_allclose(rule(form(vectors)), vectors[np.asarray(selected)].mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(jax.jit(rule.selected)(vectors), selected)


@pytest.mark.parametrize("dtype", ["float64", "int64", "int8", "bool"])
@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_flowers_server_optimizers_compute_as_the_host_does(name, dtype):
    """As they do where JAX has float64; float32 beside it stays what it is."""
    strategy = getattr(flower, name)()
    start = [np.array([1, 0]).astype(dtype), np.float32([1.0, 2.0])]
    rounds = [[[np.array([2 + k, k]).astype(dtype), np.float32([k, 0.5])] for k in range(3)] for _ in range(3)]

    def play(params):
        state = strategy.init(params)
        for models in rounds:
            params, state = strategy(params, state, models, [3_000_000_001, 1, 2])
        return params, state

    params, state = play(start)
    with jax.enable_x64():
        wanted, wanted_state = play([start[0].astype(float), start[1]])
    assert [array.dtype for array in params] == [np.float64, np.float32]
    assert [array.dtype for array in state.second_moment] == [np.float64, np.float32]
    for got, other in zip(jax.tree.leaves((params, state)), jax.tree.leaves((wanted, wanted_state)), strict=True):
        np.testing.assert_array_equal(got, other)


def test_flower_fed_avg():
    updates = {"w": jnp.array([[1.0], [2.0], [6.0]]), "low": jnp.array([1.0, 2.0, 6.0], jnp.float16)}
    got = flower.FedAvg()(updates, [20, 20, 10])
    np.testing.assert_allclose([got["w"][0], got["low"]], 2.4, rtol=1e-3)
    assert got["low"].dtype == jnp.float16
    assert np.isnan(flower.FedAvg()(VALUES))


def test_flower_without_examples_counts_alike():
    np.testing.assert_allclose(flower.MultiKrum(1, 2)(VALUES), 1.75)


def test_flower_with_at_least_one_neighbor():
    # n - f - 2 is 0 here, which `fedfuse_jax.krum` refuses.
    np.testing.assert_allclose(flower.Krum(1)(np.float32([5.0, 1.0, 1.5])), 1.0)
    np.testing.assert_allclose(flower.Krum(0)(np.float32([5.0])), 5.0)


def test_flowers_two_bulyans():
    x = np.random.default_rng(1).normal(size=(11, 5)).astype(np.float32)
    one, other = flower.Bulyan(2)(x), flower.LegacyBulyan(2)(x)
    assert not np.allclose(one, other)
    distances = np.sort(((x[:, None] - x[None]) ** 2).sum(axis=-1), axis=1)
    chosen = x[np.argsort(distances[:, 1:8].sum(axis=1))[:7]]  # seven neighbours, of whom the first is not itself
    nearest = np.argsort(abs(chosen - np.median(chosen, axis=0)), axis=0)[:3]
    np.testing.assert_allclose(one, np.take_along_axis(chosen, nearest, axis=0).mean(axis=0), rtol=1e-5)
    x[[3, 8]] = np.nan
    assert np.isfinite(flower.Bulyan(2)(x)).all()
    assert np.isfinite(flower.LegacyBulyan(2)(x)).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: flower.Krum(-1), ValueError, "Krum: num_malicious_nodes is -1; it needs"),
        (lambda: flower.MultiKrum(1, 0), ValueError, "MultiKrum: num_nodes_to_select is 0; it needs"),
        (lambda: flower.Krum(1.5), TypeError, "Krum: num_malicious_nodes is"),
        (lambda: flower.FedTrimmedAvg(0.5), ValueError, r"FedTrimmedAvg: `beta` must be in the range \[0, 0.5\)"),
        (
            lambda: flower.Bulyan(1)(np.zeros((6, 2), np.float32)),
            ValueError,
            "Bulyan: num_malicious_nodes is 1.* 6",
        ),
        (lambda: flower.LegacyBulyan(1)(np.zeros((6, 2), np.float32)), ValueError, "bulyan: num_byzantine is 1"),
        (lambda: flower.Krum(0)({}), ValueError, "Krum: updates has no client axis"),
        (lambda: flower.Krum(0)([[np.zeros(2, np.complex64)]] * 3), TypeError, "complex64.*needs floating"),
        (lambda: flower.Krum(0)([[], []]), ValueError, "Krum: updates has no arrays"),
        (lambda: flower.Bulyan(0).selected([[], []]), ValueError, "Bulyan: updates has no arrays"),
        (lambda: flower.LegacyBulyan(0)([[], []]), ValueError, "LegacyBulyan: updates has no arrays"),
    ],
)
def test_flower_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- The modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [byzfl, flower], ids=["byzfl", "flower"])
def test_docstrings(module):
    for name in module.__all__:
        rule = getattr(module, name)
        text = inspect.getdoc(rule)
        for needed in (".. math::", "Example:", "Notes:"):
            assert needed in text, f"{name} lacks {needed}"
        parameters = inspect.signature(rule).parameters
        for parameter in parameters:
            assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), f"{name}: nothing is said of {parameter}"
        assert bool(parameters) == ("Raises:" in text), name


def test_neither_package_is_imported():
    code = "import fedfuse_jax.compat.byzfl, fedfuse_jax.compat.flower, sys"
    code += "; sys.exit(bool({'byzfl', 'flwr', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
