"""The optax side: the same rules in optax's words, and rules as aggregators."""

import builtins
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedfuse_jax as ff

optax = pytest.importorskip("optax")
ffx = pytest.importorskip("fedfuse_jax.optax")

PAIRS = {
    "avgm": (ffx.fedavgm, ff.fedavgm_weighted_update, {"momentum": 0.7}),
    "adagrad": (ffx.fedadagrad, ff.fedadagrad_weighted_update, {"tau": 0.1}),
    "adam": (ffx.fedadam, ff.fedadam_weighted_update, {"b1": 0.8, "b2": 0.95, "tau": 0.1}),
    "yogi": (ffx.fedyogi, ff.fedyogi_weighted_update, {"b1": 0.8, "b2": 0.95, "tau": 0.1}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_transformation_steps_like_the_fused_rule(name):
    make, fused, options = PAIRS[name]
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.zeros(2)}
    server = make(learning_rate=0.3, **options)
    state = server.init(params)
    tau = options.get("tau", 0.0)
    fused_params, fused_state = params, ff.init_server_state(params, tau=tau)
    step = jax.jit(functools.partial(fused, learning_rate=0.3, **options))
    for seed in range(5):
        updates = jax.tree.map(lambda x, s=seed: jax.random.normal(jax.random.key(s), (4, *x.shape)), params)
        if seed == 3:
            updates["b"] = updates["b"].at[0, 0].set(jnp.nan)
        gradient = jax.tree.map(lambda x: -x.mean(0), updates)
        moves, state = jax.jit(server.update)(gradient, state, params)
        params = optax.apply_updates(params, moves)
        fused_params, fused_state = step(fused_params, fused_state, updates)
    pairs = zip(jax.tree.leaves((params, state)), jax.tree.leaves((fused_params, fused_state)), strict=True)
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 4


def test_a_schedule_sees_the_step():
    server = ffx.fedavgm(learning_rate=lambda step: 1.0 / (step + 1), momentum=0.0)
    state = server.init(jnp.zeros(1))
    moves = []
    for _ in range(3):
        move, state = server.update(-jnp.ones(1), state)
        moves.append(float(move[0]))
    np.testing.assert_allclose(moves, [1, 1 / 2, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_what_an_aggregator_is_told_does_not_disturb_the_server(name):
    """optax hands the keyword arguments of an update to every part of a chain."""
    from optax.experimental import aggregating

    make, fused, options = PAIRS[name]
    rule = ffx.aggregator(ff.weighted_mean)
    params, updates = jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, -1.0], [jnp.nan, 1.0]])
    told = {"where": jnp.array([True, True, False]), "weights": jnp.array([1.0, 3.0, 2.0])}
    state = ff.init_server_state(params, tau=options.get("tau", 0.0))
    wanted, _ = fused(params, state, updates, learning_rate=0.3, **options, **told)
    for last in (make(0.3, **options), optax.chain(optax.identity(), make(0.3, **options))):
        server = aggregating.process(optax.with_extra_args_support(optax.identity()), rule, last)
        moves, _ = jax.jit(server.update)(-updates, server.init(params), params, **told)
        np.testing.assert_allclose(optax.apply_updates(params, moves), wanted, rtol=1e-6)
    chain = optax.chain(optax.trace(0.9), make(0.3, **options))
    assert isinstance(chain, optax.GradientTransformationExtraArgs)
    chain.update(-updates[0], chain.init(params), params, value=1.0)


def test_any_rule_is_an_aggregator():
    from optax.experimental import aggregating

    updates = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0], [1e9, jnp.nan]])}
    median = ffx.aggregator(ff.coordinate_median)
    assert isinstance(median, aggregating.Aggregator)
    got, state = jax.jit(median.update)(updates, median.init({"w": jnp.zeros(2)}), {"w": jnp.zeros(2)})
    assert got["w"].tolist() == [3.0, 4.0]
    clipped = ffx.aggregator(ff.clipped_weighted_sum, max_norm=1.0)
    got, _ = clipped.update(updates, state, weights=jnp.ones(3), where=jnp.array([True, True, False]))
    wanted = ff.clipped_weighted_sum({"w": updates["w"][:2]}, jnp.ones(2), 1.0)
    np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-6)


def test_aggregation_and_server_step_in_one_chain():
    from optax.experimental import aggregating

    server = aggregating.process(optax.identity(), ffx.aggregator(ff.weighted_mean), ffx.fedadam(0.1))
    params = jnp.zeros(3)
    state = server.init(params)
    updates = jnp.array([[0.4, -0.2, 2e-4], [0.6, 0.0, 0.0]])
    moves, state = jax.jit(server.update)(-updates, state, params)
    wanted, _ = ff.fedadam_weighted_update(params, ff.init_server_state(params), updates, learning_rate=0.1)
    np.testing.assert_allclose(moves, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_transformation_of_no_leaves(name):
    """What optax.masked and optax.partition leave of a tree may be nothing."""
    server = optax.masked(getattr(ffx, name)(0.1), {"w": False})
    gradients = {"w": jnp.ones(3)}
    moves, _ = jax.jit(server.update)(gradients, server.init(gradients))
    assert moves["w"].tolist() == [1.0] * 3


def test_an_optax_without_aggregators_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("optax.experimental"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"optax\.experimental\.aggregating; it needs optax 0\.2\.6"):
        ffx.aggregator(ff.weighted_mean)


def test_the_package_does_not_import_optax():
    import subprocess
    import sys

    code = "import sys, fedfuse_jax; sys.exit('optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
