"""`fedfuse_jax.compat.flower` against the installed `flwr`, on hundreds of random cases a rule."""

from __future__ import annotations

import inspect
import logging
import types

import jax
import numpy as np
import pytest
from compat_cases import (
    GAP,
    KINDS,
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
from fedfuse_jax.compat.flower import aggregators

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
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


def record(row):
    """A model as Flower sends it: two arrays."""
    return ArrayRecord({name: Array(array) for name, array in as_trees(row).items()})


def replies(x):
    """What clients send to Flower: a model each, and their number of examples."""
    return [
        RecordDict({"arrays": record(row), "metrics": MetricRecord({"num-examples": int(count)})})
        for row, count in zip(x, examples(len(x)), strict=True)
    ]


def aggregate(strategy, x, server_round=1):
    """Theirs, through the strategy itself; what it knows of messages is put aside."""
    messages = [types.SimpleNamespace(content=content) for content in replies(x)]
    strategy._check_and_log_replies = lambda replies, is_train: (messages, [])
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)  # which Bulyan does once a client
        arrays, _ = strategy.aggregate_train(server_round, messages)
    return None if arrays is None else np.concatenate([array.numpy().ravel() for array in arrays.values()])


def results_of(x):
    """The clients as Flower's legacy functions have them."""
    return [([row[: len(row) // 3], row[len(row) // 3 :]], int(w)) for row, w in zip(x, examples(len(x)), strict=True)]


# --- Coordinate by coordinate -----------------------------------------------------------------------------------


@every_shape
def test_mean(n, d):
    for f in bounds(n):
        cases = draw(n, d, f, seed=20, rounds=2)
        for got, x in zip(many(ours.FedAvg(), cases), cases.matrices, strict=True):
            assert_near(got, aggregate(theirs.FedAvg(), x.astype(np.float64)), x)  # NaN included


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
        return _selection.lowest(aggregators._scores(rule, tree), count)

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


# --- Who is selected, dtypes, and models without arrays ------------------------------------------------------------

RULES = [
    (ours.FedAvg(), lambda: theirs.FedAvg()),
    (ours.FedMedian(), lambda: theirs.FedMedian()),
    (ours.FedTrimmedAvg(0.2), lambda: theirs.FedTrimmedAvg(beta=0.2)),
    (ours.Krum(1), lambda: theirs.Krum(num_malicious_nodes=1)),
    (ours.MultiKrum(1, 3), lambda: theirs.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3)),
    (ours.Bulyan(1), lambda: theirs.Bulyan(num_malicious_nodes=1)),
]
every_rule = pytest.mark.parametrize(("rule", "make"), RULES, ids=lambda value: type(value).__name__)


def aggregate_clients(strategy, clients, counts):
    """Theirs, on a list of arrays per client: the arrays, and what it makes of the metrics."""
    contents = [
        RecordDict(
            {
                "arrays": ArrayRecord({str(key): Array(array) for key, array in enumerate(client)}),
                "metrics": MetricRecord({"num-examples": int(count), "loss": float(2**index)}),
            }
        )
        for index, (client, count) in enumerate(zip(clients, counts, strict=True))
    ]
    messages = [types.SimpleNamespace(content=content) for content in contents]
    strategy._check_and_log_replies = lambda replies, is_train: (messages, [])
    arrays, metrics = strategy.aggregate_train(1, messages)
    return [array.numpy() for array in arrays.values()], metrics["loss"]


@every_rule
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_dtypes_are_flowers(rule, make, dtype):
    """Those of floats, float64 for integers, and the values to the digits of these dtypes."""
    generator = np.random.default_rng(35)
    counters = generator.integers(0, 2 if dtype == "bool" else 100, (9, 4))
    # Not for those that select: Flower's distances, of a Gram matrix, lose their digits there.
    if dtype in ("int64", "float64") and not hasattr(rule, "selected"):
        counters = counters + 2**33
    clients = [[row.astype(dtype), generator.normal(size=3)] for row in counters]
    got, (expected, _) = rule(clients, examples(9)), aggregate_clients(make(), clients, examples(9))
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # Flower adds what it has multiplied and rounded.
        np.testing.assert_allclose(one, other, rtol=20 * np.finfo(other.dtype).eps)


@every_rule
def test_metrics_are_averaged_over_who_is_selected(rule, make):
    for seed in range(20):
        x = np.random.default_rng([36, seed]).normal(size=(9, 5))
        clients, counts = [[row] for row in x], examples(9)
        _, loss = aggregate_clients(make(), clients, counts)
        selected = rule.selected(clients) if hasattr(rule, "selected") else np.ones(9, bool)
        weights = counts * selected
        np.testing.assert_allclose(np.average(2.0 ** np.arange(9), weights=weights), loss, rtol=1e-12)


@every_rule
def test_models_without_arrays(rule, make):
    clients, counts = [[]] * 9, examples(9)
    if hasattr(rule, "selected"):
        with pytest.raises(ValueError, match="need at least one array"):
            aggregate_clients(make(), clients, counts)
        with pytest.raises(ValueError, match=f"^{type(rule).__name__}: updates has no arrays"):
            rule(clients, counts)
    else:
        assert rule(clients, counts) == aggregate_clients(make(), clients, counts)[0] == []


def test_legacy_models_without_arrays():
    results = [([], 1)] * 9
    assert (
        legacy.aggregate(results)
        == legacy.aggregate_median(results)
        == legacy.aggregate_trimmed_avg(results, 0.2)
        == []
    )
    with pytest.raises(ValueError, match="need at least one array"):
        legacy.aggregate_bulyan(results, 1, legacy.aggregate_krum, to_keep=0)


# --- Server optimizers --------------------------------------------------------------------------------------------

SETTINGS = [
    ("FedAvgM", {}),
    ("FedAvgM", {"server_learning_rate": 0.3}),
    ("FedAvgM", {"server_momentum": 0.9}),
    ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.5}),
    ("FedAdagrad", {}),
    ("FedAdagrad", {"eta": 0.01, "tau": 1e-2}),
    ("FedAdagrad", {"eta": 1.0, "eta_l": 3.0, "tau": 0.5}),
    ("FedAdam", {}),
    ("FedAdam", {"beta_1": 0.0, "beta_2": 0.0}),
    ("FedAdam", {"eta": 0.02, "beta_1": 0.5, "beta_2": 0.9, "tau": 1e-2}),
    ("FedAdam", {"eta": 1.0, "eta_l": 3.0, "beta_1": 0.99, "beta_2": 0.999, "tau": 0.1}),
    ("FedYogi", {}),
    ("FedYogi", {"eta": 0.1, "beta_1": 0.0, "beta_2": 0.5}),
    ("FedYogi", {"eta": 0.5, "eta_l": 3.0, "beta_1": 0.99, "beta_2": 0.999, "tau": 0.1}),
]
every_setting = pytest.mark.parametrize(("name", "arguments"), SETTINGS, ids=str)
OPTIMIZERS = sorted({name for name, _ in SETTINGS})
ROUNDS = 5
some_shapes = pytest.mark.parametrize(("n", "d"), [(1, 3), (4, 17), (20, 333)], ids=str)


def ours_over_rounds(strategy, start, rounds):
    """The parameters after every round of every case: ``start`` is (cases, d), ``rounds`` (cases, rounds, n, d)."""

    def play(params, rounds):
        def step(carry, models):
            carry = strategy(*carry, models, examples(rounds["a"].shape[1]))
            return carry, carry[0]

        return jax.lax.scan(step, (params, strategy.init(params)), rounds)[1]

    results = jax.jit(jax.vmap(play))(as_trees(start), as_trees(rounds))
    return np.concatenate([np.asarray(results["a"]), np.asarray(results["b"])], axis=-1)


def flowers(name, arguments):
    return getattr(theirs, name)(fraction_train=0.0, **arguments)  # so that there is nobody to ask for clients


def theirs_over_rounds(strategy, start, rounds):
    """The same of one case; and in which coordinates Yogi's sign was clear in every round so far."""
    arrays, clear = start, np.ones(start.shape, bool)
    for server_round, models in enumerate(rounds, 1):
        strategy.configure_train(server_round, record(arrays), ConfigRecord(), None)
        if isinstance(strategy, theirs.FedYogi):
            square = (np.average(models, axis=0, weights=examples(len(models))) - arrays) ** 2
            second = np.concatenate(list(strategy.v_t.values())) if strategy.v_t else np.zeros_like(square)
            clear = clear & ((second == 0) | (abs(second - square) > GAP * second))
        arrays = aggregate(strategy, models, server_round)
        yield arrays, clear


def compare(name, arguments, start, rounds, rtol):
    compared = []
    for got, params, models in zip(
        ours_over_rounds(getattr(ours, name)(**arguments), start, rounds), start, rounds, strict=True
    ):
        scale = max(1.0, abs(models).max())
        expected = theirs_over_rounds(flowers(name, arguments), params.astype(float), models.astype(float))
        for after, (wanted, clear) in zip(got, expected, strict=True):
            np.testing.assert_allclose(after[clear], wanted[clear], rtol=rtol, atol=rtol * scale)
            compared.append(clear.mean())
    assert np.mean(compared) > 0.99


@some_shapes
@every_setting
def test_optimizer(name, arguments, n, d):
    """In float64, on models of every kind.

    Where Δ is small against τ, a step magnifies its rounding by η / τ, up to a hundredfold, in every round anew: in
    float32 there would be nothing left to compare.
    """
    cases = [draw(n, d, (n - 1) // 2, seed=seed, rounds=ROUNDS) for seed in (28, 29)]
    good = KINDS[: KINDS.index("nan")]
    with jax.enable_x64():
        rounds = np.concatenate(
            [[case.matrices[[k == kind for k in case.kinds]] for kind in good] for case in cases]
        ).astype(np.float64)
        start = np.random.default_rng(30).normal(size=(len(rounds), d))
        compare(name, arguments, start, rounds, rtol=1e-11)


@some_shapes
@every_setting
def test_optimizer_in_float32(name, arguments, n, d):
    """Where clients agree on a direction, so that a step does not magnify rounding.

    What is left is that of means and products, and that of the betas: float32 has 1 − 0.999 to 2e-5.
    """
    generator = np.random.default_rng([31, n, d])
    start = generator.normal(size=(10, d)).astype(np.float32)
    away = generator.choice([-1, 1], (10, d)) * generator.uniform(2, 4, (10, d))
    rounds = start[:, None, None] + away[:, None, None] * generator.uniform(0.9, 1.1, (10, ROUNDS, n, d))
    compare(name, arguments, start, rounds.astype(np.float32), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_round_without_replies(name):
    """Nothing changes, there as here; but there it counts."""
    x = np.random.default_rng(32).normal(size=(2, 4, 7))
    strategy, start = flowers(name, {}), np.zeros(7)
    with jax.enable_x64():
        mine = getattr(ours, name)()
        params, state, skipping = [start], mine.init([start]), start
        for server_round, models in enumerate((x[0], [], x[1]), 1):
            strategy.configure_train(server_round, record(skipping), ConfigRecord(), None)
            arrays = aggregate(strategy, models, server_round)
            skipping = skipping if arrays is None else arrays
            params, state = mine(params, state, [[row] for row in models], examples(len(models)))
    assert int(state.step) == 2
    assert np.allclose(params[0], skipping, rtol=1e-9) == (name != "FedAdam")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_optimizers_on_lists_have_the_host_s_precision(name, dtype):
    """Without JAX's float64; batch counters become float64 there too."""
    generator = np.random.default_rng(37)
    x = generator.integers(-50, 50, (3, 4, 7)).astype(dtype)
    strategy, mine = flowers(name, {}), getattr(ours, name)()
    params, arrays = [np.zeros(7, dtype)], np.zeros(7, dtype)
    state = mine.init(params)
    for server_round, models in enumerate(x, 1):
        strategy.configure_train(server_round, record(arrays), ConfigRecord(), None)
        arrays = aggregate(strategy, models, server_round)
        params, state = mine(params, state, [[row] for row in models], examples(4))
        assert params[0].dtype == arrays.dtype == np.float64
        np.testing.assert_allclose(params[0], arrays, rtol=1e-12)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_on_models_without_arrays(name):
    strategy, mine = flowers(name, {}), getattr(ours, name)()
    strategy.configure_train(1, ArrayRecord({}), ConfigRecord(), None)
    arrays, _ = aggregate_clients(strategy, [[], []], [1, 2])
    assert mine([], mine.init([]), [[], []], [1, 2])[0] == arrays == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_client_is_not_for_good(name):
    """The difference that the docstrings speak of."""
    x = np.random.default_rng(33).normal(size=(3, 4, 7))
    x[1, 2, 5] = np.nan
    momentum = {"server_momentum": 0.9} if name == "FedAvgM" else {}
    start = np.zeros((1, 7))
    *_, (poisoned, _) = theirs_over_rounds(flowers(name, momentum), start[0], x)
    assert np.isnan(poisoned[5])
    with jax.enable_x64():
        got = ours_over_rounds(getattr(ours, name)(**momentum), start, x[None])[0]
    (first, _), (second, _) = theirs_over_rounds(flowers(name, momentum), start[0], x[[0, 2]])
    np.testing.assert_allclose(got, [first, first, second], rtol=1e-9)


def test_fed_adam_becomes_float64_there():
    x = np.random.default_rng(34).normal(size=(4, 7)).astype(np.float32)
    for name in OPTIMIZERS:
        ((params, _),) = theirs_over_rounds(flowers(name, {}), x[0], x[None])
        assert params.dtype == (np.float64 if name == "FedAdam" else np.float32)
        mine = getattr(ours, name)()
        assert mine([x[0]], mine.init([x[0]]), [[row] for row in x])[0][0].dtype == np.float32


@pytest.mark.parametrize("name", ["FedAvg", *OPTIMIZERS, "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_arguments_are_flowers(name):
    """The names and the defaults, but for what all its strategies have: whom to sample, and where to look."""

    def defaults(strategy):
        parameters = inspect.signature(strategy).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters}

    known = defaults(getattr(ours, name))
    assert known == {key: value for key, value in defaults(getattr(theirs, name)).items() if key in known}
    assert set(known) | set(defaults(theirs.FedAvg)) == set(defaults(getattr(theirs, name)))
