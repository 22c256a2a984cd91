"""The FedJAX adapter's fused server optimizers: the core's numbers, with FedJAX's sign, state and training."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

fedjax = pytest.importorskip("fedjax")

from hlo import custom_calls, large_arrays  # noqa: E402
from operations import has_kernel  # noqa: E402

import fedfuse_jax as ff  # noqa: E402
from fedfuse_jax import fedjax as adapter  # noqa: E402
from fedfuse_jax.fedjax import server_optimizers  # noqa: E402

# The optimizer, the core's update, and the scalars of both.
OPTIMIZERS = {
    "fedavgm": (adapter.fedavgm, ff.fedavgm_weighted_update, {"learning_rate": 0.3, "momentum": 0.7}),
    "fedadagrad": (adapter.fedadagrad, ff.fedadagrad_weighted_update, {"learning_rate": 0.3, "b1": 0.2, "tau": 0.1}),
    "fedadam": (
        adapter.fedadam,
        ff.fedadam_weighted_update,
        {"learning_rate": 0.3, "b1": 0.8, "b2": 0.9, "tau": 0.1},
    ),
    "fedyogi": (
        adapter.fedyogi,
        ff.fedyogi_weighted_update,
        {"learning_rate": 0.3, "b1": 0.8, "b2": 0.9, "tau": 0.1},
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
NUM_CLIENTS = 5


def make_deltas(num_clients=NUM_CLIENTS, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {name: generator.normal(size=leaf.shape).astype(np.float32) for name, leaf in PARAMS.items()}
        for _ in range(num_clients)
    ]


def clients_of(deltas, weights=None):
    weights = range(1, len(deltas) + 1) if weights is None else weights
    return ((f"client {i}", delta, weight) for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)))


def by_hand(name, state, params, deltas, weights=None, **changed):
    """The core's update of client - server."""
    _, update, scalars = OPTIMIZERS[name]
    updates = jax.tree.map(lambda *leaves: -jnp.stack(leaves), *deltas)
    params, state = update(params, state, updates, weights, **(scalars | changed))
    return state, params


def initial_state(name, params=PARAMS):
    tau = OPTIMIZERS[name][2].get("tau")
    return ff.init_server_state(params) if tau is None else ff.init_server_state(params, tau=tau)


def make(name, **changed):
    build, _, scalars = OPTIMIZERS[name]
    return build(**(scalars | changed))


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        tolerance = max(rtol, 2**-7 if left.dtype == jnp.bfloat16 else 0)
        np.testing.assert_allclose(
            np.asarray(left, np.float64), np.asarray(right, np.float64), rtol=tolerance, atol=atol
        )


def assert_equal(got, expected):
    assert_close(got, expected, rtol=0, atol=0)


# --- The numbers ------------------------------------------------------------------------------------------------


@every_optimizer
def test_rounds_are_the_cores(name):
    optimizer = make(name)
    got = expected = (initial_state(name), PARAMS)
    assert_equal(optimizer.init(PARAMS), got[0])
    for round_index in range(4):
        deltas = make_deltas(NUM_CLIENTS + round_index, seed=round_index)
        weights = np.arange(1, len(deltas) + 1)
        got = optimizer.apply_to_clients(clients_of(deltas, weights), *got)
        expected = by_hand(name, *expected, deltas, weights)
        assert_close(got, expected)
    assert int(got[0].step) == 4
    assert np.abs(got[1]["w"] - PARAMS["w"]).max() > 0.1


@every_optimizer
def test_a_delta_is_that_of_one_client(name):
    optimizer, (delta,) = make(name), make_deltas(1)
    got = optimizer.apply(delta, initial_state(name), PARAMS)
    assert_close(got, by_hand(name, initial_state(name), PARAMS, [delta]))
    assert_close(jax.jit(optimizer.apply)(delta, initial_state(name), PARAMS), got)


@every_optimizer
def test_descends(name):
    """On ||params||², whose gradient FedJAX's optimizers are given."""
    optimizer = make(name)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(100):
        state, params = optimizer.apply(jax.tree.map(lambda leaf: 2 * leaf, params), state, params)
    assert all(np.abs(leaf).max() < 1 for leaf in params.values())  # of 5


def test_a_schedule_counts_the_steps_taken():
    optimizer = make("fedadam", learning_rate=lambda step: 0.5 / (1 + step))
    got = expected = (initial_state("fedadam"), PARAMS)
    for round_index, rate in enumerate((0.5, 0.25, 0.25, 0.5 / 3)):
        deltas = make_deltas(seed=round_index)
        if round_index == 1:
            deltas[0]["b"][0] = np.nan  # a round that does not count
        got = optimizer.apply_to_clients(clients_of(deltas), *got)
        expected = by_hand("fedadam", *expected, deltas, np.arange(1, 6), learning_rate=jnp.float32(rate))
        assert_close(got, expected)
    assert int(got[0].step) == 3


@pytest.mark.parametrize("as_weight", [int, float, np.int64, np.float32, jnp.int32, jnp.float32])
def test_takes_any_real_scalar_for_a_weight(as_weight):
    deltas, state = make_deltas(3), initial_state("fedadam")
    weights = [as_weight(weight) for weight in (2, 5, 3)]
    got = make("fedadam").apply_to_clients(clients_of(deltas, weights), state, PARAMS)
    assert_close(got, by_hand("fedadam", state, PARAMS, deltas, np.array([2, 5, 3])))


@every_optimizer
@pytest.mark.parametrize("bad", ["nan", "inf", "no examples", "nobody"])
def test_a_round_without_a_mean_changes_nothing(name, bad):
    optimizer, deltas = make(name), make_deltas()
    before = optimizer.apply_to_clients(clients_of(deltas), optimizer.init(PARAMS), PARAMS)
    weights = None
    if bad == "nobody":
        deltas = []
    elif bad == "no examples":
        weights = [0] * len(deltas)
    else:
        deltas[2]["w"][1, 1] = float(bad)
    assert_equal(optimizer.apply_to_clients(clients_of(deltas, weights), *before), before)


def test_bfloat16_parameters_have_a_float32_state():
    optimizer = make("fedadam")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    deltas = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), delta) for delta in make_deltas()]
    state, after = optimizer.apply_to_clients(clients_of(deltas), optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.first_moment)} == {jnp.dtype(jnp.float32)}
    assert_close((state, after), by_hand("fedadam", initial_state("fedadam", params), params, deltas, np.arange(1, 6)))


@every_optimizer
def test_a_round_is_one_call(name):
    if not has_kernel(f"{name}_weighted_update"):
        pytest.skip("nothing is compiled")
    _, update, scalars = OPTIMIZERS[name]
    deltas = ff.stack_clients(make_deltas(50))
    arguments = (deltas, jnp.ones(50), initial_state(name), PARAMS, scalars)
    text = server_optimizers._descend.lower(*arguments, update=update).compile().as_text()
    assert custom_calls(text) == [f"fedfuse.{name}_weighted_update.v1"]
    assert not large_arrays(text, 50 * 4)


def test_equal_optimizers_compile_once():
    sizes = []
    for rate in (0.1, 0.1, 0.2):
        optimizer = adapter.fedyogi(rate, b1=0.5)
        optimizer.apply_to_clients(clients_of(make_deltas(13)), optimizer.init(PARAMS), PARAMS)
        sizes.append(server_optimizers._descend._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


# --- In a federation --------------------------------------------------------------------------------------------


def constant_algorithm(server_optimizer, aggregator=None, values=(1.0, 2.0, 9.0)):
    """Clients that move every parameter to their number in one step; the i-th has i + 1 examples."""
    algorithm = adapter.federated_averaging(
        lambda params, batch, rng: jax.tree.map(lambda leaf: leaf - batch["x"][0], params),
        fedjax.optimizers.sgd(1.0),
        server_optimizer,
        fedjax.ShuffleRepeatBatchHParams(batch_size=9, num_epochs=1, seed=0),
        aggregator,
    )
    clients = [
        (index, fedjax.ClientDataset({"x": np.full(index + 1, value, np.float32)}), jax.random.PRNGKey(0))
        for index, value in enumerate(values)
    ]
    return algorithm, clients


@every_optimizer
def test_federated_averaging_weighs_by_numbers_of_examples(name):
    algorithm, clients = constant_algorithm(make(name))
    state = algorithm.init(PARAMS)
    assert type(state) is fedjax.algorithms.fed_avg.ServerState
    expected = (state.opt_state, PARAMS)
    for _ in range(3):
        deltas = [jax.tree.map(lambda leaf, value=value: leaf - value, expected[1]) for value in (1.0, 2.0, 9.0)]
        expected = by_hand(name, *expected, deltas, np.array([1, 2, 3]))
        state, diagnostics = algorithm.apply(state, clients)
        assert_close((state.opt_state, state.params), expected)
        assert set(diagnostics) == {0, 1, 2}
    assert type(state) is fedjax.algorithms.fed_avg.ServerState


def test_federated_averaging_steps_over_bad_rounds():
    algorithm, clients = constant_algorithm(make("fedadam"))
    before, _ = algorithm.apply(algorithm.init(PARAMS), clients)
    after, diagnostics = algorithm.apply(before, [])
    assert diagnostics == {}
    assert_equal(after, before)
    _, bad_clients = constant_algorithm(make("fedadam"), values=(1.0, np.nan))
    assert_equal(algorithm.apply(before, bad_clients)[0], before)
    with pytest.raises(ValueError, match="clients is empty"):
        constant_algorithm(make("fedadam"), adapter.median_aggregator())[0].apply(before, [])


def test_after_an_aggregator_it_takes_what_that_gives():
    """The median of 1, 2 and 9 counts as the one client's update, whoever has how many examples."""
    for aggregator, value in ((adapter.median_aggregator(), 2.0), (adapter.mean_aggregator(), 32.0 / 6)):
        algorithm, clients = constant_algorithm(make("fedadam"), aggregator)
        state, _ = algorithm.apply(algorithm.init(PARAMS), clients)
        delta = jax.tree.map(lambda leaf, value=value: leaf - value, PARAMS)
        _, expected = by_hand("fedadam", initial_state("fedadam"), PARAMS, [delta])
        for got, wanted in zip(state.params.values(), expected.values(), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_a_private_adam():
    private = adapter.clipped_noisy_mean_aggregator(1.0, 0.1, jax.random.PRNGKey(0))
    algorithm, clients = constant_algorithm(make("fedadam"), private)
    first, _ = algorithm.apply(algorithm.init(PARAMS), clients)
    second, _ = algorithm.apply(first, clients)
    assert isinstance(second, adapter.StatefulServerState)
    assert int(second.opt_state.step) == 2


def test_a_state_is_saved_and_goes_on():
    algorithm, clients = constant_algorithm(make("fedyogi"))
    state, _ = algorithm.apply(algorithm.init(PARAMS), clients)
    saved = pickle.loads(pickle.dumps(state))  # as FedJAX saves states
    assert_equal(algorithm.apply(saved, clients)[0], algorithm.apply(state, clients)[0])
    leaves, structure = jax.tree.flatten(state.opt_state)
    assert len(leaves) == 1 + 2 * len(PARAMS)
    assert isinstance(jax.tree.unflatten(structure, leaves), ff.server.ServerState)


def test_it_is_a_fedjax_optimizer():
    for name in OPTIMIZERS:
        optimizer = make(name)
        assert isinstance(optimizer, fedjax.Optimizer) and isinstance(optimizer, adapter.FusedOptimizer)


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: adapter.fedadam("fast"), TypeError, "fedadam: learning_rate is not an array"),
        (lambda: adapter.fedadam(jnp.ones(2)), ValueError, r"fedadam: learning_rate has shape \(2,\)"),
        (lambda: adapter.fedadam(0.1, b1=1.5), ValueError, "fedadam: b1 is 1.5; it needs to be from 0 to 1"),
        (lambda: adapter.fedyogi(0.1, b2=-0.5), ValueError, "fedyogi: b2 is -0.5; it needs to be from 0 to 1"),
        (lambda: adapter.fedadagrad(0.1, tau=-1.0), ValueError, "fedadagrad: tau is -1.0; it needs to be at least 0"),
        (lambda: adapter.fedavgm(0.1, momentum=2), ValueError, "fedavgm: momentum is 2; it needs to be from 0 to 1"),
    ],
)
def test_refuses_when_it_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_refuses_clients():
    optimizer, state = make("fedadam"), initial_state("fedadam")
    with pytest.raises(ValueError, match=r"fedadam: .* needs triples"):
        optimizer.apply_to_clients([1], state, PARAMS)
    with pytest.raises(TypeError, match="fedadam: weight of client 'client 0' is a str; it needs a real number"):
        optimizer.apply_to_clients(clients_of(make_deltas(1), ["one"]), state, PARAMS)
    with pytest.raises(ValueError, match="fedadam: weight of client 'client 0' has shape"):
        optimizer.apply_to_clients(clients_of(make_deltas(1), [np.ones(2)]), state, PARAMS)
    for deltas in ([{"w": np.ones(3, np.float32)}], [make_deltas(1)[0], {"w": np.ones(3, np.float32)}]):
        with pytest.raises(ValueError, match="it needs") as caught:
            optimizer.apply_to_clients(clients_of(deltas), state, PARAMS)
        assert any("fedadam" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"fedadam: opt_state is tuple .*; it needs a ServerState"):
        optimizer.apply(make_deltas(1)[0], (), PARAMS)
