"""The server optimizers of `fedfuse_jax.compat.flower` without Flower: its numbers, forms, bad rounds, errors."""

from __future__ import annotations

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import has_kernel
from test_battery import assert_same_bits

from fedfuse_jax.compat import flower

# What flwr 1.41 makes of zeros in two rounds in which every client sends MODEL.
MODEL = np.array([0.5, -0.1, 1e-4], np.float32)
TWO_ROUNDS = [
    (
        flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.6),
        [0.25, -0.05, 5e-5],
        [0.525, -0.105, 1.05e-4],
    ),
    (
        flower.FedAdagrad(eta=0.2, tau=0.01),
        [0.19607843, -0.18181818, 1.98019802e-3],
        [0.29821592, -0.06426847, -0.02966536],
    ),
    (
        flower.FedAdam(),
        [0.07279018, -0.06749634, 7.3510870e-4],
        [0.15658332, -0.13543285, -2.52206709e-3],
    ),
    (
        flower.FedAdam(eta=0.2, eta_l=3.0, beta_1=0.8, beta_2=0.95, tau=0.01),
        [0.14241981, -0.10721170, 3.46170273e-4],
        [0.30397472, -0.17794674, -1.65190913e-4],
    ),
    (
        flower.FedYogi(eta=0.2, eta_l=3.0, beta_1=0.8, beta_2=0.95, tau=0.01),
        [0.16419903, -0.12360680, 3.99107568e-4],
        [0.36763062, -0.19201341, -4.71185279e-4],
    ),
]
OPTIMIZERS = [strategy for strategy, _, _ in TWO_ROUNDS]
name_of = lambda value: type(value).__name__  # noqa: E731
every_optimizer = pytest.mark.parametrize("strategy", OPTIMIZERS, ids=name_of)

PARAMS = {"w": jnp.linspace(-1, 1, 10).reshape(2, 5), "low": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(())}


def models_of(n_clients, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), (n_clients, *x.shape)).astype(x.dtype), PARAMS)


def some_state(strategy):
    return strategy(PARAMS, strategy.init(PARAMS), models_of(3, seed=1), [1, 2, 3])


@pytest.mark.parametrize(("strategy", "first", "second"), TWO_ROUNDS, ids=name_of)
@pytest.mark.parametrize("how", ["eagerly", "under jit", "as an argument", "under vmap", "as lists"])
def test_two_rounds_as_flower_has_them(strategy, first, second, how):
    models, params = np.stack([MODEL] * 3), jnp.zeros(3)
    step = strategy
    if how == "under jit":
        step = jax.jit(strategy)
    elif how == "as an argument":
        step = functools.partial(jax.jit(lambda strategy, *rest: strategy(*rest), static_argnums=0), strategy)
    elif how == "under vmap":
        step = jax.vmap(strategy, in_axes=(0, 0, 0, None))
        models, params = models[None], params[None]
    elif how == "as lists":
        models, params = [[model[:1], model[1:]] for model in models], [np.zeros(1, "f4"), np.zeros(2, "f4")]
    state = jax.vmap(strategy.init)(params) if how == "under vmap" else strategy.init(params)
    for expected in (first, second):
        params, state = step(params, state, models, jnp.array([1, 2, 5]))
        got = np.concatenate(params) if how == "as lists" else np.ravel(params)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
    assert np.all(state.step == 2)


@every_optimizer
def test_both_forms_of_models(strategy):
    tree = [jax.random.normal(jax.random.key(seed), (4, *shape)) for seed, shape in enumerate([(2, 5), (3,), ()])]
    params = [leaf[0] for leaf in tree]
    state = strategy.init(params)
    wanted, wanted_state = strategy(params, state, tree, [1, 2, 3, 4])
    as_arrays = [np.asarray(leaf) for leaf in params]
    lists = [[np.asarray(leaf[client]) for leaf in tree] for client in range(4)]
    got, got_state = strategy(as_arrays, strategy.init(as_arrays), lists, [1, 2, 3, 4])
    assert [type(array) for array in got] == [np.ndarray] * 3
    assert_same_bits((got, got_state), (wanted, wanted_state))


@every_optimizer
def test_optimizers_keep_dtypes(strategy):
    params, state = some_state(strategy)
    assert {name: leaf.dtype for name, leaf in params.items()} == {name: leaf.dtype for name, leaf in PARAMS.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.first_moment, state.second_moment))} == {jnp.dtype("f4")}
    params = [np.zeros(2, np.float64), np.zeros(2, np.float16)]
    params, _ = strategy(params, strategy.init(params), [[np.ones(2, np.float64), np.ones(2, np.float16)]])
    assert [array.dtype for array in params] == [np.float64, np.float16]


BAD_ROUNDS = {
    "NaN": ({"w": np.nan}, None),
    "inf": ({"b": np.inf}, None),
    "low precision": ({"low": -np.inf}, None),
    "nobody": ({}, [0, 0, 0]),
    "NaN examples": ({}, [1, np.nan, 1]),
    "overflow": ({"b": 3e38}, [1, 1000, 1]),
}


@every_optimizer
@pytest.mark.parametrize("bad", BAD_ROUNDS)
def test_a_bad_round_of_an_optimizer_changes_nothing(strategy, bad):
    params, state = some_state(strategy)
    spoiled, num_examples = BAD_ROUNDS[bad]
    models = models_of(3)
    for name, value in spoiled.items():
        models[name] = models[name].at[(1,) + (0,) * (models[name].ndim - 1)].set(value)
    assert_same_bits(jax.jit(strategy)(params, state, models, num_examples), (params, state))
    moved, after = strategy(params, state, models_of(3), [1, 0, 2])
    assert int(after.step) == 2
    assert not np.array_equal(moved["w"], params["w"])


@every_optimizer
def test_a_round_without_replies_changes_nothing(strategy):
    params = [np.ones(3, np.float32)]
    state = strategy.init(params)
    got, after = strategy(params, state, [], [])
    assert (got, after) == (params, state)


def test_fed_avgm_is_fed_avg_by_default():
    models, num_examples = jnp.array([[1.0], [2.0], [6.0]]), [20, 20, 10]
    moved, _ = flower.FedAvgM()(jnp.ones(1), flower.FedAvgM().init(jnp.ones(1)), models, num_examples)
    np.testing.assert_allclose(moved, flower.FedAvg()(models, num_examples), rtol=1e-6)


def test_one_round_is_two_calls_and_in_place():
    """The models are read once, by the mean; and donated buffers are the results'."""
    if not (has_kernel("weighted_mean") and has_kernel("fedadam_weighted_update")):
        pytest.skip("no compiled kernel")
    strategy = flower.FedAdam()
    step = jax.jit(strategy, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, some_state(strategy))
    arguments = params, state, models_of(3), jnp.array([1, 2, 3])
    text = step.lower(*arguments).compile().as_text()
    assert sorted(hlo.custom_calls(text)) == ["fedfuse.fedadam_weighted_update.v1", "fedfuse.weighted_mean.v1"]
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    after = step(*arguments)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_bias_correction_does_not_cancel():
    """1 − β² for a β next to 1 keeps its digits in float32; Δ = 1 at τ = 0 moves by η (1 + β₂)^½ / (1 + β₁)."""
    strategy = flower.FedAdam(beta_1=0.9999, beta_2=0.99999, tau=0.0)
    params, _ = strategy(jnp.zeros(1), strategy.init(jnp.zeros(1)), jnp.ones((1, 1)))
    np.testing.assert_allclose(params, 0.1 * 1.99999**0.5 / 1.9999, rtol=1e-6)


ZEROS = jnp.zeros(3)
START = flower.FedAdam().init(ZEROS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: flower.FedAvgM(server_momentum=-0.1),
            ValueError,
            r"^FedAvgM: server_momentum is -0.1; .* from 0 to 1",
        ),
        (lambda: flower.FedAvgM(server_learning_rate=np.nan), ValueError, "^FedAvgM: server_learning_rate is nan"),
        (lambda: flower.FedAdam(eta=np.inf), ValueError, "^FedAdam: eta is inf; it needs to be finite"),
        (lambda: flower.FedAdam(eta=jnp.ones(())), TypeError, "^FedAdam: eta is float32.*needs a Python number"),
        (lambda: flower.FedAdam(eta_l="0.1"), TypeError, "^FedAdam: eta_l is str"),
        (lambda: flower.FedAdam(beta_1=1), ValueError, "^FedAdam: beta_1 is 1; it needs to be less than 1"),
        (lambda: flower.FedAdam(beta_1=1 - 1e-9), ValueError, "^FedAdam: beta_1 is .*less than 1, in float32"),
        (lambda: flower.FedAdam(beta_2=1.5), ValueError, "^FedAdam: beta_2 is 1.5; it needs to be from 0 to 1"),
        (lambda: flower.FedYogi(beta_1=-1), ValueError, "^FedYogi: beta_1 is -1"),
        (lambda: flower.FedYogi(beta_2=True), TypeError, "^FedYogi: beta_2 is bool"),
        (lambda: flower.FedYogi(tau=-1e-3), ValueError, "^FedYogi: tau is -0.001; it needs to be at least 0"),
        (lambda: flower.FedAdagrad(tau=np.nan), ValueError, "^FedAdagrad: tau is nan"),
        (lambda: flower.FedAdagrad(beta_1=0.9), TypeError, "beta_1"),
        (lambda: flower.FedAdam(fraction_train=0.5), TypeError, "fraction_train"),
        (lambda: flower.FedAdam(0.1), TypeError, "positional"),
        (lambda: flower.FedAdam()(ZEROS, None, ZEROS[None]), TypeError, "^FedAdam: state is .*what init.params. made"),
        (lambda: flower.FedAdam()(ZEROS, START, ZEROS), ValueError, r"^FedAdam: models has shape \(3,\)"),
        (lambda: flower.FedAdam()(ZEROS, START, jnp.ones((2, 1))), ValueError, r"^FedAdam: models.*\(2, 3\)"),
        (lambda: flower.FedAdam()(ZEROS, START, {"w": ZEROS[None]}), ValueError, "^FedAdam: models has the structure"),
        (lambda: flower.FedAdam()(ZEROS, START, jnp.ones((0, 3))), ValueError, "^FedAdam: models has no clients"),
        (lambda: flower.FedAdam()(ZEROS, START, [[ZEROS]]), ValueError, "^FedAdam: models has the structure"),
        (lambda: flower.FedAdam()(ZEROS, START, ZEROS[None], [1, 2]), ValueError, "^FedAdam: num_examples has shape"),
        (
            lambda: flower.FedAdam()(ZEROS, START, ZEROS[None].astype(complex)),
            TypeError,
            "^FedAdam: models has dtype comp",
        ),
        (lambda: flower.FedAdam().init(jnp.ones(3, complex)), TypeError, "^init_server_state: params has dtype comp"),
    ],
)
def test_optimizers_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
