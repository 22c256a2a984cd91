"""The FedJAX adapter: its aggregators, and its federated averaging against FedJAX's own.

Run as a script, `python tests/test_fedjax.py RESULT.npz`, this file is the oracle: it restores the
`jax.tree_map` that FedJAX still calls, in a process of its own, and records FedJAX's own algorithm.
"""

import gc
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

fedjax = pytest.importorskip("fedjax")

NUM_CLIENTS, NUM_ROUNDS = 5, 4


# The federation that both sides train: least squares, clients of unequal size, a stateful server.


def train(federated_averaging, **options):
    """Returns the states after each round and the last round's diagnostics."""
    generator = np.random.default_rng(7)
    truth = generator.normal(size=3)
    clients = []
    for index in range(NUM_CLIENTS):
        x = generator.normal(size=(4 + 3 * index, 3)) + index
        y = x @ truth + 0.1 * generator.normal(size=len(x))
        data = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
        clients.append((b"client %d" % index, fedjax.ClientDataset(data)))

    def loss(params, batch, rng):
        noise = 0.01 * jax.random.normal(rng, batch["y"].shape)  # so that the clients' keys matter
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"] + noise) ** 2)

    algorithm = federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(0.01),
        fedjax.optimizers.adam(0.1),
        fedjax.ShuffleRepeatBatchHParams(batch_size=4, num_epochs=2, seed=3),
        **options,
    )
    states = [algorithm.init({"w": jnp.zeros(3), "b": jnp.zeros(())})]
    for round_index in range(NUM_ROUNDS):
        keys = jax.random.split(jax.random.PRNGKey(round_index), NUM_CLIENTS)
        cohort = [(name, data, key) for (name, data), key in zip(clients, keys, strict=True)]
        state, diagnostics = algorithm.apply(states[-1], cohort)
        states.append(state)
    return states, diagnostics


def recorded(states, diagnostics):
    """Every number of a training run, by name."""
    numbers = {
        f"{round_index}{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for round_index, state in enumerate(states)
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    }
    for client_id, diagnostic in diagnostics.items():
        for name, value in diagnostic.items():
            numbers[f"{client_id!r} {name}"] = np.asarray(value)
    return numbers


if __name__ == "__main__":
    jax.tree_map = jax.tree_util.tree_map
    np.savez(sys.argv[1], **recorded(*train(fedjax.algorithms.fed_avg.federated_averaging)))
    sys.exit()

from fedfuse_jax import fedjax as adapter  # noqa: E402 - the oracle above must not need us

# Those without a state, made so that five clients are enough.
AGGREGATORS = {
    "mean_aggregator": adapter.mean_aggregator,
    "median_aggregator": adapter.median_aggregator,
    "trimmed_mean_aggregator": adapter.trimmed_mean_aggregator,
    "mean_around_median_aggregator": partial(adapter.mean_around_median_aggregator, 1),
    "krum_aggregator": partial(adapter.krum_aggregator, 1),
    "multi_krum_aggregator": partial(adapter.multi_krum_aggregator, 1),
    "bulyan_aggregator": partial(adapter.bulyan_aggregator, 0),
    "geometric_median_aggregator": adapter.geometric_median_aggregator,
}
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)


def make_updates(num_clients, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "w": generator.normal(size=(3, 5)).astype(np.float32),
            "b": [generator.normal(size=4).astype(np.float32), np.float32(generator.normal())],
        }
        for _ in range(num_clients)
    ]


def lazily(updates, weights=None):
    """A generator, which has no length, of what FedJAX hands to an aggregator."""
    weights = [1.0] * len(updates) if weights is None else weights
    return (
        (f"client {index}", update, weight) for index, (update, weight) in enumerate(zip(updates, weights, strict=True))
    )


def aggregate(aggregator, updates, weights=None):
    result, _ = aggregator.apply(lazily(updates, weights), aggregator.init())
    return result


def reduced(reduce, updates):
    """The oracle: `reduce` over axis 0 of each stacked leaf, in float64."""
    return jax.tree.map(lambda *leaves: reduce(np.stack(leaves).astype(np.float64)), *updates)


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(left, np.float64), right, rtol=rtol, atol=atol)


# Aggregators


@every_aggregator
def test_is_a_fedjax_aggregator(name):
    aggregator = AGGREGATORS[name]()
    assert isinstance(aggregator, fedjax.aggregators.Aggregator)
    assert jax.tree.leaves(aggregator.init()) == []
    state = {"handed": "through"}
    assert aggregator.apply(lazily(make_updates(5)), state)[1] is state


@pytest.mark.parametrize("num_clients", [1, 2, 7])
def test_mean_is_the_weighted_mean(num_clients):
    updates = make_updates(num_clients)
    weights = list(range(3, 3 + num_clients))
    expected = reduced(lambda x: np.average(x, axis=0, weights=weights), updates)
    assert_close(aggregate(adapter.mean_aggregator(), updates, weights), expected)


@pytest.mark.parametrize(
    "as_weight", [int, float, np.int64, np.float32, np.float64, np.asarray, jnp.int32, jnp.float32]
)
def test_mean_takes_any_real_scalar_for_a_weight(as_weight):
    updates, weights = make_updates(3), [2, 5, 3]
    expected = reduced(lambda x: np.average(x, axis=0, weights=weights), updates)
    got = aggregate(adapter.mean_aggregator(), updates, [as_weight(weight) for weight in weights])
    assert_close(got, expected)


def test_mean_takes_signed_weights():
    updates, weights = make_updates(3), [2.0, -0.5, 1.0]
    expected = reduced(lambda x: np.tensordot(weights, x, 1) / np.sum(weights), updates)
    assert_close(aggregate(adapter.mean_aggregator(), updates, weights), expected)


def test_mean_needs_no_more_memory_for_more_clients():
    held = []

    def clients():
        for index in range(12):
            gc.collect()
            held.append(sum(array.nbytes for array in jax.live_arrays()))
            yield index, {"w": jnp.full(100_000, float(index))}, 1

    result, _ = adapter.mean_aggregator().apply(clients(), ())
    np.testing.assert_allclose(result["w"][:3], 5.5, rtol=1e-6)
    assert held[-1] - held[2] < 100_000  # one more client kept would be 400,000 bytes


def test_mean_never_holds_two_totals():
    total = adapter.mean._first_total({"w": jnp.ones(1000)}, 1.0)
    adapter.mean._next_total(total, {"w": jnp.ones(1000)}, 1.0)
    assert total["params"]["w"].is_deleted()


def test_mean_of_bfloat16_sums_in_float32():
    # FedJAX sums in the leaf's dtype: 256 + 1 is 256 in bfloat16, and the mean came out as 0.256.
    updates = [{"w": jnp.full(3, 1.001, jnp.bfloat16)}] * 1000
    got = aggregate(adapter.mean_aggregator(), updates)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["w"].astype(np.float32), 1)


@every_aggregator
def test_each_leaf_keeps_its_dtype(name):
    tree = {"half": jnp.ones(3, jnp.float16), "brain": jnp.ones(3, jnp.bfloat16), "w": jnp.ones(3)}
    got = aggregate(AGGREGATORS[name](), [tree] * 5)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, tree)
    assert_close(got, tree)


def test_mean_of_signed_weights_that_sum_to_zero_divides_by_zero():
    clients = [("a", jnp.array([1.0, 5.0, 2.0]), 1.0), ("b", jnp.array([3.0, 4.0, 2.0]), -1.0)]
    mean, _ = adapter.mean_aggregator().apply(clients, None)
    np.testing.assert_array_equal(mean, [-np.inf, np.inf, np.nan])


def test_mean_of_weights_that_sum_to_zero_is_nan():
    got = aggregate(adapter.mean_aggregator(), make_updates(3), [0, 0, 0])
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(got))


def test_mean_lets_nan_through():
    updates = make_updates(3)
    updates[1]["w"][0, 0] = np.nan
    got = aggregate(adapter.mean_aggregator(), updates)
    assert np.isnan(got["w"]).sum() == 1
    assert np.isnan(got["w"][0, 0])


@pytest.mark.parametrize("num_clients", [1, 4, 9])
def test_median(num_clients):
    updates = make_updates(num_clients)
    expected = reduced(lambda x: np.median(x, axis=0), updates)
    weights = [10.0**index for index in range(num_clients)]  # without influence
    assert_close(aggregate(adapter.median_aggregator(), updates, weights), expected)


@pytest.mark.parametrize(
    ("options", "trimmed"),
    [({}, 2), ({"trim_fraction": 0.25}, 2), ({"trim_fraction": 0.0}, 0), ({"trim_count": 4}, 4)],
)
def test_trimmed_mean(options, trimmed):
    updates = make_updates(10)
    expected = reduced(lambda x: np.sort(x, axis=0)[trimmed : 10 - trimmed].mean(axis=0), updates)
    weights = [10.0**index for index in range(10)]  # without influence
    got = aggregate(adapter.trimmed_mean_aggregator(**options), updates, weights)
    assert_close(got, expected)


@pytest.mark.parametrize("bad_value", [np.nan, -np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["median_aggregator", "trimmed_mean_aggregator"])
def test_order_statistics_withstand_bad_clients(name, bad_value):
    updates = make_updates(10)
    for update in updates[:2]:
        update["w"][:] = bad_value
    got = aggregate(AGGREGATORS[name](), updates)
    honest = np.stack([update["w"] for update in updates[2:]])
    assert (got["w"] >= honest.min(axis=0)).all()
    assert (got["w"] <= honest.max(axis=0)).all()


@every_aggregator
def test_under_jit(name):
    updates, weights = make_updates(5), jnp.arange(1.0, 6.0)
    got = jax.jit(lambda *arguments: aggregate(AGGREGATORS[name](), *arguments))(updates, weights)
    assert_close(got, jax.tree.map(np.asarray, aggregate(AGGREGATORS[name](), updates, weights)))


def test_gradient_of_the_mean():
    updates = [jnp.array([1.0, 2.0]), jnp.array([5.0, 4.0])]

    def first_of_mean(updates, weights):
        return aggregate(adapter.mean_aggregator(), updates, weights)[0]

    by_update, by_weight = jax.grad(first_of_mean, argnums=(0, 1))(updates, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(by_update, [[0.25, 0], [0.75, 0]], rtol=1e-6)
    np.testing.assert_allclose(by_weight, [-0.75, 0.25], rtol=1e-6)  # (x_i - mean) / sum of weights


# Aggregators refuse


@every_aggregator
def test_refuses_nobody(name):
    with pytest.raises(ValueError, match=f"{name}: clients_params_and_weights is empty; it needs"):
        AGGREGATORS[name]().apply(iter([]), ())


@every_aggregator
def test_refuses_what_is_no_triple(name):
    with pytest.raises(ValueError, match=rf"{name}: .* holds a tuple; it needs triples \(client"):
        AGGREGATORS[name]().apply([({"w": jnp.ones(2)}, 1.0)], ())


@every_aggregator
@pytest.mark.parametrize("position", [0, 2])
def test_refuses_integer_leaves(name, position):
    updates = make_updates(3)
    updates[position]["w"] = updates[position]["w"].astype(np.int32)
    with pytest.raises(TypeError, match=r"\['w'\].* int32.* needs floating") as caught:
        aggregate(AGGREGATORS[name](), updates)
    assert any(name in note for note in caught.value.__notes__)


@every_aggregator
@pytest.mark.parametrize("change", [{"w": np.ones((3, 4), np.float32)}, {"extra": np.float32(1)}])
def test_refuses_clients_that_differ(name, change):
    updates = make_updates(3)
    updates[2] |= change
    with pytest.raises(ValueError, match=r"needs") as caught:
        aggregate(AGGREGATORS[name](), updates)
    assert any(name in note for note in caught.value.__notes__)


def test_mean_names_the_client_it_refuses():
    updates = make_updates(3)
    del updates[1]["b"]
    with pytest.raises(ValueError, match="accumulate_weighted: update") as caught:
        aggregate(adapter.mean_aggregator(), updates)
    assert any("'client 1'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "weight of client 'client 1' is a NoneType; it needs a real number"),
        ("three", TypeError, "weight of client 'client 1' is a str; it needs a real number"),
        (1j, TypeError, "weight of client 'client 1' is a complex; it needs a real number"),
        (
            np.ones(1),
            ValueError,
            r"weight of client 'client 1' has shape \(1,\); it needs a scalar",
        ),
        (
            jnp.ones(2),
            ValueError,
            r"weight of client 'client 1' has shape \(2,\); it needs a scalar",
        ),
        (jax.random.key(0), TypeError, "weight is a PRNG key array"),
    ],
)
def test_mean_refuses_weights(weight, error, message):
    with pytest.raises(error, match=message):
        aggregate(adapter.mean_aggregator(), make_updates(2), [1.0, weight])


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, float("nan")])
def test_trimmed_mean_refuses_fractions(fraction):
    with pytest.raises(ValueError, match=r"trimmed_mean_aggregator: trim_fraction is .* \[0, 0.5\)"):
        adapter.trimmed_mean_aggregator(fraction)


def test_trimmed_mean_refuses_counts():
    with pytest.raises(ValueError, match="trimmed_mean_aggregator: trim_count is -1; it needs"):
        adapter.trimmed_mean_aggregator(trim_count=-1)
    with pytest.raises(ValueError, match="trim_count") as caught:
        aggregate(adapter.trimmed_mean_aggregator(trim_count=2), make_updates(4))
    assert any("trimmed_mean_aggregator" in note for note in caught.value.__notes__)


# Federated averaging


def test_federated_averaging_equals_fedjax(tmp_path):
    assert not hasattr(jax, "tree_map")  # neither FedJAX nor we run because somebody patched JAX
    result = tmp_path / "fedjax.npz"
    subprocess.run([sys.executable, __file__, result], check=True, timeout=300)
    with np.load(result) as expected:
        got = recorded(*train(adapter.federated_averaging))
        assert set(got) == set(expected)
        assert {name for name in got if "delta_l2_norm" in name} == {
            f"{b'client %d' % index!r} delta_l2_norm" for index in range(NUM_CLIENTS)
        }
        for name, value in got.items():
            assert value.dtype == expected[name].dtype
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        start, end = expected["0[0]['w']"], expected[f"{NUM_ROUNDS}[0]['w']"]
        assert np.abs(end - start).max() > 0.1  # that there was something to compare


def test_default_aggregator_is_the_mean():
    default, _ = train(adapter.federated_averaging)
    mean, _ = train(adapter.federated_averaging, aggregator=adapter.mean_aggregator())
    median, _ = train(adapter.federated_averaging, aggregator=adapter.median_aggregator())
    np.testing.assert_array_equal(default[-1].params["w"], mean[-1].params["w"])
    assert np.abs(default[-1].params["w"] - median[-1].params["w"]).max() > 1e-3


def test_debug_backend():
    expected, _ = train(adapter.federated_averaging)
    with fedjax.for_each_client_backend("debug"):
        got, diagnostics = train(adapter.federated_averaging)
    assert len(diagnostics) == NUM_CLIENTS
    assert_close(got[-1].params, jax.tree.map(np.asarray, expected[-1].params))


def constant_algorithm(aggregator=None, params_dtype=jnp.float32):
    """Clients that move the one parameter to their number in one step, a server that follows."""
    algorithm = adapter.federated_averaging(
        lambda params, batch, rng: params - batch["x"][0].astype(params.dtype),
        fedjax.optimizers.sgd(1.0),
        fedjax.optimizers.sgd(1.0, momentum=0.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=1, num_epochs=1, seed=0),
        aggregator,
    )
    clients = [
        (index, fedjax.ClientDataset({"x": np.full(1, value, np.float32)}), jax.random.PRNGKey(0))
        for index, value in enumerate([1.0, 2.0, 9.0])
    ]
    return algorithm, clients, jnp.zeros((), params_dtype)


def test_aggregator_gets_deltas_lazily_and_numbers_of_examples():
    seen = []

    def apply(clients, state):
        assert iter(clients) is clients
        for client in clients:
            seen.append(client)
        return seen[0][1], state

    algorithm, clients, params = constant_algorithm(fedjax.aggregators.Aggregator(lambda: (), apply))
    clients[1] = (1, fedjax.ClientDataset({"x": np.full(3, 2.0, np.float32)}), clients[1][2])
    algorithm.apply(algorithm.init(params), clients)
    assert [client_id for client_id, _, _ in seen] == [0, 1, 2]
    assert [float(delta) for _, delta, _ in seen] == [-1, -2, -9]  # server - client
    assert [weight for _, _, weight in seen] == [1, 3, 1]


def test_server_state_is_fedjaxs_own():
    own = fedjax.algorithms.fed_avg.ServerState
    algorithm, clients, params = constant_algorithm()
    state = algorithm.init(params)
    assert type(state) is own
    state, _ = algorithm.apply(own(state.params, state.opt_state), clients)
    assert type(state) is own
    assert float(state.params) == 4


def test_state_of_a_stateful_aggregator_goes_along():
    mean = adapter.mean_aggregator()

    def apply(clients, state):
        result, _ = mean.apply(clients, ())
        return result, state + 1

    counting = fedjax.aggregators.Aggregator(lambda: jnp.zeros((), jnp.int32), apply)
    algorithm, clients, params = constant_algorithm(counting)
    state = algorithm.init(params)
    for _ in range(3):
        state, _ = algorithm.apply(state, clients)
    assert isinstance(state, fedjax.algorithms.fed_avg.ServerState)
    assert int(state.aggregator_state) == 3
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves((state.params, state.opt_state))) + 1

    # A checkpoint of FedJAX's own algorithm knows no aggregator: it begins its life now.
    plain = fedjax.algorithms.fed_avg.ServerState(state.params, state.opt_state)
    assert int(algorithm.apply(plain, clients)[0].aggregator_state) == 1


def test_low_precision_states_keep_their_dtypes():
    algorithm, clients, params = constant_algorithm(params_dtype=jnp.bfloat16)
    first = algorithm.init(params)
    second, _ = algorithm.apply(first, clients)
    assert len(jax.tree.leaves(first)) == 2  # the parameter and its momentum
    assert [leaf.dtype for leaf in jax.tree.leaves((first, second))] == [jnp.bfloat16] * 4
    assert float(second.params) == 4


def test_federated_averaging_refuses_nobody():
    algorithm, _, params = constant_algorithm()
    with pytest.raises(ValueError, match="federated_averaging: clients is empty; it needs"):
        algorithm.apply(algorithm.init(params), [])


def test_federated_averaging_refuses_what_is_no_aggregator():
    with pytest.raises(TypeError, match="federated_averaging: aggregator is a function; it needs"):
        constant_algorithm(adapter.mean_aggregator)


# The module


def test_importing_the_package_imports_no_framework():
    code = "import fedfuse_jax, sys; sys.exit('fedjax' in sys.modules or 'haiku' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
