"""`jax_debug_nans`: an absent client's NaN is in no step that JAX can see; a present one's in no compiled result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedfuse_jax as ff

ABSENT, N_CLIENTS, SIZE = 3, 11, 5
WHERE = jnp.ones(N_CLIENTS, bool).at[ABSENT].set(False)
ONES, KEY = jnp.ones(N_CLIENTS), jax.random.key(0)
START = jnp.ones(SIZE)


def server_step(rule):
    return lambda x: rule(START, ff.init_server_state(START, tau=0.0), x, learning_rate=0.1, where=WHERE)[0]


def near(x):
    distances = ff.pairwise_squared_distances(x, where=WHERE)
    return jnp.where(jnp.isfinite(distances), distances, 0)


OPERATIONS = {
    "weighted_sum": lambda x: ff.weighted_sum(x, ONES, where=WHERE),
    "weighted_mean": lambda x: ff.weighted_mean(x, ONES, where=WHERE),
    "squared_norms": lambda x: ff.squared_norms(x, where=WHERE),
    "coordinate_median": lambda x: ff.coordinate_median(x, where=WHERE),
    "trimmed_mean": lambda x: ff.trimmed_mean(x, where=WHERE),
    "mean_around_median": lambda x: ff.mean_around_median(x, 1, where=WHERE),
    "pairwise_squared_distances": near,
    "krum": lambda x: ff.krum(x, 1, where=WHERE),
    "multi_krum": lambda x: ff.multi_krum(x, 1, where=WHERE),
    "bulyan": lambda x: ff.bulyan(x, 1, where=WHERE),
    "nearest_neighbor_mixing": lambda x: ff.nearest_neighbor_mixing(x, 1, where=WHERE),
    "bucketing": lambda x: ff.bucketing(KEY, x, 2, where=WHERE),
    "geometric_median": lambda x: ff.geometric_median(x, where=WHERE),
    "centered_clipping": lambda x: ff.centered_clipping(x, jnp.zeros(SIZE), 1.0, where=WHERE),
    "clipped_weighted_sum": lambda x: ff.clipped_weighted_sum(x, ONES, 1.0, where=WHERE),
    "clipped_noisy_weighted_sum": lambda x: ff.clipped_noisy_weighted_sum(KEY, x, ONES, 1.0, 0.1, where=WHERE),
    "noisy_weighted_sum": lambda x: ff.noisy_weighted_sum(KEY, x, ONES, 0.1, where=WHERE),
    "fedavgm_weighted_update": server_step(ff.fedavgm_weighted_update),
    "fedadagrad_weighted_update": server_step(ff.fedadagrad_weighted_update),
    "fedadam_weighted_update": server_step(ff.fedadam_weighted_update),
    "fedyogi_weighted_update": server_step(ff.fedyogi_weighted_update),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_absent_client_s_nan_is_never_seen(name):
    operation = OPERATIONS[name]
    good = jnp.asarray(np.random.default_rng(0).standard_normal((N_CLIENTS, SIZE)), jnp.float32)
    updates = good.at[ABSENT].set(jnp.nan)
    gradient = jax.grad(lambda x: jnp.sum(operation(x)))
    with jax.debug_nans(True):
        wanted = operation(updates)
        np.testing.assert_allclose(jax.jit(operation)(updates), wanted, rtol=1e-5, atol=1e-6)
        of_updates = gradient(updates)
        assert np.all(np.asarray(of_updates)[ABSENT] == 0)
        np.testing.assert_allclose(jax.jit(gradient)(updates), of_updates, rtol=1e-4, atol=1e-5)
        with jax.disable_jit():
            np.testing.assert_allclose(operation(updates), wanted, rtol=1e-5, atol=1e-6)


WITHSTAND = {
    "coordinate_median": ff.coordinate_median,
    "trimmed_mean": ff.trimmed_mean,
    "mean_around_median": lambda x: ff.mean_around_median(x, 1),
    "pairwise_squared_distances": lambda x: jnp.isfinite(ff.pairwise_squared_distances(x)),
    "finite_clients": ff.finite_clients,
    "krum": lambda x: ff.krum(x, 1),
    "multi_krum": lambda x: ff.multi_krum(x, 1),
    "bulyan": lambda x: ff.bulyan(x, 1),
    "nearest_neighbor_mixing": lambda x: ff.nearest_neighbor_mixing(x, 1),
    "bucketing": lambda x: ff.bucketing(KEY, x, 2),
    "geometric_median": ff.geometric_median,
    "centered_clipping": lambda x: ff.centered_clipping(x, jnp.zeros(SIZE), 1.0, num_iterations=2),
    "clipped_weighted_sum": lambda x: ff.clipped_weighted_sum(x, ONES, 1.0),
    "clipped_noisy_weighted_sum": lambda x: ff.clipped_noisy_weighted_sum(KEY, x, ONES, 1.0, 0.1),
}


@pytest.mark.parametrize("name", WITHSTAND)
def test_a_present_client_s_nan_is_not_seen_where_the_result_is_finite(name):
    rule = WITHSTAND[name]
    updates = np.random.default_rng(0).standard_normal((N_CLIENTS, SIZE)).astype(np.float32)
    updates[ABSENT, 2] = np.nan
    updates = jnp.asarray(updates)  # JAX looks at what it moves, too
    with jax.debug_nans(True):
        got = rule(updates)
        np.testing.assert_allclose(jax.jit(rule)(updates), got, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(got))


def test_norms_that_are_asked_for_are_reported():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        ff.clipped_weighted_sum(jnp.array([[jnp.nan, 1.0]]), jnp.ones(1), 1.0, return_norms=True)


def test_what_is_finite_needs_no_nan_on_the_way():
    update = jnp.array([3.0, -1.0, 2.0])
    with jax.debug_nans(True), jax.disable_jit():
        assert ff.topk_sparsify(update, 2)[1].tolist() == [0, 2]
        assert np.all(np.isfinite(ff.quantize(update)[1]))
        assert np.isfinite(ff.adaptive_clip_norm(1.0, update))


def test_a_documented_nan_is_reported():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        ff.coordinate_median(jnp.ones((3, 2)), where=jnp.zeros(3, bool))
