"""The FedJAX adapter's private mean: the core's clipped and noisy sum, its sensitivity, its key from round to round."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

fedjax = pytest.importorskip("fedjax")

from hlo import custom_calls  # noqa: E402
from operations import has_kernel  # noqa: E402

import fedfuse_jax as ff  # noqa: E402
from fedfuse_jax.fedjax import StatefulServerState, clipped_noisy_mean_aggregator, federated_averaging  # noqa: E402

KEY = jax.random.PRNGKey(3)


def make_updates(num_clients=6, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return [
        {"w": generator.normal(size=(30, 4)).astype(dtype), "b": generator.normal(size=5).astype(dtype)}
        for _ in range(num_clients)
    ]


def clients_of(updates):
    """A generator, with weights that would show if they had an influence."""
    return ((f"client {index}", update, 10.0**index) for index, update in enumerate(updates))


def aggregate(aggregator, updates):
    mean, _ = aggregator.apply(clients_of(updates), aggregator.init())
    return mean


def clipped(update, max_norm):
    norm = np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in update.values()))
    return {name: leaf * min(1, max_norm / norm) for name, leaf in update.items()}


def distance(left, right):
    return np.sqrt(sum(np.sum((np.asarray(left[k], np.float64) - np.asarray(right[k])) ** 2) for k in left))


def assert_close(got, expected, atol=1e-6):
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=atol)


# --- What it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected_clients", "divisor"), [(None, 6), (8, 8), (2.5, 2.5)])
def test_mean_of_clipped_updates(expected_clients, divisor):
    updates = make_updates()
    got = aggregate(clipped_noisy_mean_aggregator(2.0, 0, KEY, expected_clients=expected_clients), updates)
    shares = [clipped(update, 2.0) for update in updates]
    assert_close(got, {name: sum(share[name] for share in shares) / divisor for name in got})


def test_short_updates_stay_as_they_are():
    updates = make_updates()
    got = aggregate(clipped_noisy_mean_aggregator(1e3, 0, KEY), updates)
    assert_close(got, {name: np.mean([update[name] for update in updates], axis=0) for name in got})


def test_rounds_are_the_cores_with_keys_of_their_own():
    updates, aggregator = make_updates(), clipped_noisy_mean_aggregator(2.0, 0.5, KEY, expected_clients=8)
    state, key = aggregator.init(), KEY
    for _ in range(3):
        mean, state = aggregator.apply(clients_of(updates), state)
        now, key = jax.random.split(key)
        total = ff.clipped_noisy_weighted_sum(now, ff.stack_clients(updates), jnp.ones(6), 2.0, 0.5 * 2.0)
        assert_close(mean, {name: total[name] / 8 for name in total})


def test_noise_has_the_size_it_says():
    silence = [{"w": np.zeros(200_000, np.float32)}] * 5
    for options, stddev in (({}, 3.0 * 0.5 / 5), ({"expected_clients": 10}, 3.0 * 0.5 / 10)):
        noise = np.asarray(aggregate(clipped_noisy_mean_aggregator(0.5, 3.0, KEY, **options), silence)["w"])
        assert abs(noise.std() / stddev - 1) < 0.01
        assert abs(noise.mean()) < 5 * stddev / np.sqrt(noise.size)


def test_every_round_has_noise_of_its_own():
    updates, aggregator = make_updates(), clipped_noisy_mean_aggregator(1.0, 1.0, KEY)
    state, means = aggregator.init(), []
    for _ in range(3):
        mean, state = aggregator.apply(clients_of(updates), state)
        means.append(np.asarray(mean["w"]).ravel())
    assert len(np.unique(np.concatenate(means))) == 3 * means[0].size
    np.testing.assert_array_equal(means[0], np.ravel(aggregate(aggregator, updates)["w"]))  # and repeats


@pytest.mark.parametrize("sent", [0.0, 7.0, 1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("expected_clients", [None, 4])
def test_one_client_moves_the_mean_by_no_more_than_its_share(sent, expected_clients):
    aggregator = clipped_noisy_mean_aggregator(0.5, 1.0, KEY, expected_clients=expected_clients)
    updates = make_updates()
    silent = [*updates[:-1], {name: np.zeros_like(leaf) for name, leaf in updates[-1].items()}]
    changed = [*updates[:-1], {name: np.full_like(leaf, sent) for name, leaf in updates[-1].items()}]
    sensitivity = 0.5 / (expected_clients or 6)
    moved = distance(aggregate(aggregator, changed), aggregate(aggregator, silent))
    expected = sensitivity if 0 < sent < np.inf else 0  # what is not finite contributes nothing
    assert moved == pytest.approx(expected, rel=1e-4, abs=1e-7 if expected else 0)


def test_a_client_more_or_less_with_a_divisor_that_does_not_tell():
    aggregator = clipped_noisy_mean_aggregator(0.5, 1.0, KEY, expected_clients=4)
    updates = make_updates()
    assert distance(aggregate(aggregator, updates), aggregate(aggregator, updates[:-1])) < 0.5 / 4 * (1 + 1e-5)


def test_each_leaf_keeps_its_dtype():
    tree = {"half": jnp.ones(3, jnp.float16), "brain": jnp.ones(3, jnp.bfloat16), "w": jnp.ones(3)}
    got = aggregate(clipped_noisy_mean_aggregator(1.0, 0.1, KEY), [tree] * 5)
    assert {name: leaf.dtype for name, leaf in got.items()} == {name: leaf.dtype for name, leaf in tree.items()}


def test_under_jit_it_is_one_call():
    updates, aggregator = make_updates(), clipped_noisy_mean_aggregator(1.0, 1.0, KEY)
    function = jax.jit(lambda updates, state: aggregator.apply(clients_of(updates), state))
    got, _ = function(updates, aggregator.init())
    assert_close(got, aggregate(aggregator, updates))
    if not has_kernel("clipped_noisy_weighted_sum"):
        pytest.skip("nothing is compiled")
    calls = custom_calls(function.lower(updates, aggregator.init()).compile().as_text())
    assert len([call for call in calls if "clipped_noisy_weighted_sum" in call]) == 1


# --- Its state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, jax.random.key(3)], ids=["raw", "typed"])
def test_the_state_is_a_key_of_the_kind_given(key):
    aggregator = clipped_noisy_mean_aggregator(1.0, 1.0, key)
    _, state = aggregator.apply(clients_of(make_updates()), aggregator.init())
    (held,) = jax.tree.leaves(state)
    assert (held.dtype, held.shape) == (key.dtype, key.shape)
    assert isinstance(aggregator, fedjax.aggregators.Aggregator)


def test_a_checkpoint_goes_on_where_it_was():
    updates, aggregator = make_updates(), clipped_noisy_mean_aggregator(1.0, 1.0, KEY)
    _, state = aggregator.apply(clients_of(updates), aggregator.init())
    saved = pickle.loads(pickle.dumps(state))  # as FedJAX saves states
    expected, _ = aggregator.apply(clients_of(updates), state)
    got, _ = aggregator.apply(clients_of(updates), saved)
    np.testing.assert_array_equal(got["w"], expected["w"])


def test_federated_averaging_carries_the_key():
    algorithm = federated_averaging(
        lambda params, batch, rng: params - batch["x"][0],
        fedjax.optimizers.sgd(1.0),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=1, num_epochs=1, seed=0),
        clipped_noisy_mean_aggregator(1.0, 0.1, KEY),
    )
    clients = [
        (index, fedjax.ClientDataset({"x": np.full((1, 3), 5.0, np.float32)}), jax.random.PRNGKey(0))
        for index in range(4)
    ]
    first = algorithm.init(jnp.zeros(3))
    second, _ = algorithm.apply(first, clients)
    third, _ = algorithm.apply(second, clients)
    assert isinstance(third, StatefulServerState)
    assert len({jax.random.key_data(*s.aggregator_state).tobytes() for s in (first, second, third)}) == 3
    # Every client asks for steps far longer than 1 and gets steps of norm 1 and noise of 0.1 / 4.
    for round_index, state in ((1, second), (2, third)):
        np.testing.assert_allclose(state.params, round_index / np.sqrt(3), atol=0.15)
    assert len(np.unique(third.params - second.params)) == 3


# --- What it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0, 1.0, KEY), ValueError, "max_norm is -1.0; it needs to be at least 0"),
        ((float("nan"), 1.0, KEY), ValueError, "max_norm is nan; it needs to be at least 0"),
        (("1", 1.0, KEY), TypeError, "max_norm is str '1'; it needs a Python number"),
        ((1.0, -0.5, KEY), ValueError, "noise_multiplier is -0.5; it needs to be at least 0"),
        ((1.0, None, KEY), TypeError, "noise_multiplier is NoneType None; it needs a Python number"),
        ((float("inf"), 1.0, KEY), ValueError, "max_norm is inf and noise_multiplier 1.0; their product"),
        ((1e200, 1e200, KEY), ValueError, "their product, the standard deviation of the noise, needs to be finite"),
        ((1.0, 1.0, 7), TypeError, "key is int 7; it needs one JAX key"),
        ((1.0, 1.0, jax.random.split(jax.random.key(0))), ValueError, r"key has shape \(2,\); it needs one JAX key"),
    ],
)
def test_refuses_arguments(arguments, error, message):
    with pytest.raises(error, match=f"clipped_noisy_mean_aggregator: .*{message}"):
        clipped_noisy_mean_aggregator(*arguments)


@pytest.mark.parametrize(
    ("expected_clients", "error", "message"),
    [
        (0, ValueError, "expected_clients is 0.0; it needs to be above 0 and finite"),
        (float("inf"), ValueError, "expected_clients is inf; it needs to be above 0 and finite"),
        (-3, ValueError, "expected_clients is -3; it needs to be at least 0"),
        ("many", TypeError, "expected_clients is str 'many'; it needs a Python number"),
    ],
)
def test_refuses_a_divisor(expected_clients, error, message):
    with pytest.raises(error, match=f"clipped_noisy_mean_aggregator: {message}"):
        clipped_noisy_mean_aggregator(1.0, 1.0, KEY, expected_clients=expected_clients)


def test_refuses_clients():
    aggregator = clipped_noisy_mean_aggregator(1.0, 1.0, KEY)
    with pytest.raises(ValueError, match="clipped_noisy_mean_aggregator: clients_params_and_weights is empty"):
        aggregate(aggregator, [])
    with pytest.raises(TypeError, match=r"\['w'\].* int32.* needs floating") as caught:
        aggregate(aggregator, [{"w": np.ones(3, np.int32)}])
    assert any("clipped_noisy_mean_aggregator" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="needs"):
        aggregate(aggregator, [{"w": np.ones(3, np.float32)}, {"w": np.ones(4, np.float32)}])
