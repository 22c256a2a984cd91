"""The FedJAX adapter's robust rules: each is the core's, alone and after others, with and without a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

fedjax = pytest.importorskip("fedjax")

import fedfuse_jax as ff  # noqa: E402
from fedfuse_jax import fedjax as adapter  # noqa: E402

KEY = jax.random.PRNGKey(3)

# The aggregator, and what it should give of stacked updates and `where`.
RULES = {
    "median": (adapter.median_aggregator, ff.coordinate_median),
    "trimmed mean": (
        lambda **options: adapter.trimmed_mean_aggregator(0.25, **options),
        lambda x, where: ff.trimmed_mean(x, trim_fraction=0.25, where=where),
    ),
    "mean around median": (
        lambda **options: adapter.mean_around_median_aggregator(2, **options),
        lambda x, where: ff.mean_around_median(x, 2, where=where),
    ),
    "krum": (
        lambda **options: adapter.krum_aggregator(2, **options),
        lambda x, where: ff.krum(x, 2, where=where),
    ),
    "multi-krum": (
        lambda **options: adapter.multi_krum_aggregator(2, 3, **options),
        lambda x, where: ff.multi_krum(x, 2, 3, where=where),
    ),
    "bulyan": (
        lambda **options: adapter.bulyan_aggregator(1, **options),
        lambda x, where: ff.bulyan(x, 1, where=where),
    ),
    "geometric median": (
        lambda **options: adapter.geometric_median_aggregator(num_iterations=3, smoothing=0.1, **options),
        lambda x, where: ff.geometric_median(x, num_iterations=3, smoothing=0.1, where=where),
    ),
}
every_rule = pytest.mark.parametrize("name", RULES)


def make_updates(num_clients=11, num_bad=0, seed=0):
    generator = np.random.default_rng(seed)
    updates = [
        {"w": generator.normal(size=(3, 4)).astype(np.float32), "b": generator.normal(size=5).astype(np.float32)}
        for _ in range(num_clients)
    ]
    for update in updates[:num_bad]:
        update["w"][0, 0] = np.nan
    return updates


def clients_of(updates):
    """A generator, with weights that would show if they had an influence."""
    return ((f"client {index}", update, 10.0**index) for index, update in enumerate(updates))


def stacked(updates):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)


def assert_same(got, expected):
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6), got, expected)


# --- Rules ------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("num_bad", [0, 1])
def test_a_rule_is_the_cores(name, num_bad):
    build, rule = RULES[name]
    updates, aggregator = make_updates(num_bad=num_bad), build()
    got, state = aggregator.apply(clients_of(updates), aggregator.init())
    assert state == ()
    assert_same(got, rule(stacked(updates), where=None))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@every_rule
def test_mixing_comes_before_a_rule(name):
    build, rule = RULES[name]
    updates = make_updates(num_bad=1)
    aggregator = build(pre_aggregators=[adapter.nearest_neighbor_mixing_pre_aggregator(2)])
    got, state = aggregator.apply(clients_of(updates), aggregator.init())
    assert jax.tree.leaves(state) == []
    mixed = ff.nearest_neighbor_mixing(stacked(updates), 2)
    assert_same(got, rule(mixed, where=jnp.arange(11) >= 1))


@every_rule
def test_bucketing_comes_before_a_rule(name):
    build, rule = RULES[name]
    updates = make_updates(num_clients=23, num_bad=2)
    aggregator = build(pre_aggregators=[adapter.bucketing_pre_aggregator(2, KEY)])
    state = aggregator.init()
    results = []
    for _ in range(2):
        got, state = aggregator.apply(clients_of(updates), state)
        results.append(got)
    now, later = jax.random.split(KEY)
    buckets = ff.bucketing(now, stacked(updates), 2)
    assert_same(results[0], rule(buckets, where=jnp.arange(12) < 11))  # 21 clients are finite
    again = ff.bucketing(jax.random.split(later)[0], stacked(updates), 2)
    assert_same(results[1], rule(again, where=jnp.arange(12) < 11))
    assert not np.array_equal(results[0]["w"], results[1]["w"])  # other buckets in each round


def test_several_pre_aggregators_in_their_order():
    updates = make_updates(num_clients=23, num_bad=3)
    stages = [adapter.bucketing_pre_aggregator(2, KEY), adapter.nearest_neighbor_mixing_pre_aggregator(3)]
    aggregator = adapter.krum_aggregator(3, pre_aggregators=stages)
    got, _ = aggregator.apply(clients_of(updates), aggregator.init())
    where = jnp.arange(12) < 10
    buckets = ff.bucketing(jax.random.split(KEY)[0], stacked(updates), 2)
    assert_same(got, ff.krum(ff.nearest_neighbor_mixing(buckets, 3, where=where), 3, where=where))


def test_own_pre_aggregator():
    def halve(updates, where, state):
        return jax.tree.map(lambda leaf: leaf / 2, updates), where, state + 1

    own = adapter.PreAggregator(lambda: jnp.zeros((), jnp.int32), halve)
    aggregator = adapter.median_aggregator(pre_aggregators=[own])
    updates, state = make_updates(), aggregator.init()
    for _ in range(3):
        got, state = aggregator.apply(clients_of(updates), state)
    assert_same(got, jax.tree.map(lambda leaf: leaf / 2, ff.coordinate_median(stacked(updates))))
    assert int(state[0]) == 3


@pytest.mark.parametrize("num_bad", [0, 3, 4])
def test_who_is_found_out_is_not_trimmed_once_more(num_bad):
    """Nine clients of which four may be bad: without the four that are NaN, four at each end would leave nobody."""
    updates = make_updates(num_clients=9, num_bad=num_bad)
    aggregator = adapter.trimmed_mean_aggregator(
        trim_count=4, pre_aggregators=[adapter.nearest_neighbor_mixing_pre_aggregator(4)]
    )
    got, _ = aggregator.apply(clients_of(updates), aggregator.init())
    mixed = ff.nearest_neighbor_mixing(stacked(updates), 4)
    assert_same(got, ff.trimmed_mean(mixed, 4 - num_bad, where=jnp.arange(9) >= num_bad))


@every_rule
def test_equal_aggregators_compile_once(name):
    from fedfuse_jax.fedjax import _stacking

    updates = make_updates(num_clients=13)
    sizes = []
    for _ in range(2):
        stages = [adapter.nearest_neighbor_mixing_pre_aggregator(1)]
        aggregator = RULES[name][0](pre_aggregators=stages)
        aggregator.apply(clients_of(updates), aggregator.init())
        sizes.append(_stacking._prepare_and_reduce._cache_size())
    assert sizes[0] == sizes[1]


# --- Centered clipping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "ones"])
def test_centered_clipping_carries_its_center(start):
    updates = make_updates(num_bad=1)
    center = jax.tree.map(jnp.zeros_like if start is None else jnp.ones_like, updates[1])
    aggregator = adapter.centered_clipping_aggregator(0.5, num_iterations=2, center=None if start is None else center)
    state = aggregator.init()
    assert bool(jax.tree.leaves(state)) == (start is not None)
    for _ in range(3):
        got, state = aggregator.apply(clients_of(updates), state)
        center = ff.centered_clipping(stacked(updates), center, 0.5, num_iterations=2)
        assert_same(got, center)


def test_centered_clipping_keeps_its_center_in_float32():
    aggregator = adapter.centered_clipping_aggregator(1e-3)
    updates = [{"w": jnp.full(4, 256.0, jnp.bfloat16)}] * 3
    state = aggregator.init()
    for _ in range(5):
        got, state = aggregator.apply(clients_of(updates), state)
    (center,) = jax.tree.leaves(state)
    assert got["w"].dtype == jnp.bfloat16
    assert center.dtype == jnp.float32
    np.testing.assert_allclose(center, 5 * 1e-3 / 2, rtol=1e-5)


def test_centered_clipping_in_federated_averaging():
    algorithm = adapter.federated_averaging(
        lambda params, batch, rng: params - batch["x"][0],
        fedjax.optimizers.sgd(1.0),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=1, num_epochs=1, seed=0),
        adapter.centered_clipping_aggregator(0.25),
    )
    clients = [
        (index, fedjax.ClientDataset({"x": np.full(1, value, np.float32)}), jax.random.PRNGKey(0))
        for index, value in enumerate([1.0, 1.0, 1.0, np.nan])
    ]
    state = algorithm.init(jnp.zeros(()))
    assert type(state) is fedjax.algorithms.fed_avg.ServerState  # no arrays yet
    seen = []
    for _ in range(3):
        state, _ = algorithm.apply(state, clients)
        seen.append(float(state.params))
    assert isinstance(state, adapter.StatefulServerState)
    np.testing.assert_allclose(seen, [0.25, 0.75, 1.0], rtol=1e-6)  # deltas -1, -0.75, -0.25 around 0, -0.25, -0.5


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adapter.krum_aggregator(-1), ValueError, "krum_aggregator: num_byzantine is -1; it needs"),
        (lambda: adapter.bulyan_aggregator(1.0), TypeError, "bulyan_aggregator: num_byzantine is float 1.0; it needs"),
        (lambda: adapter.multi_krum_aggregator(1, 0), ValueError, "multi_krum_aggregator: num_selected is 0; it needs"),
        (lambda: adapter.trimmed_mean_aggregator("0.1"), TypeError, "trimmed_mean_aggregator: trim_fraction is str"),
        (lambda: adapter.trimmed_mean_aggregator(KEY), TypeError, "trimmed_mean_aggregator: trim_fraction is"),
        (lambda: adapter.trimmed_mean_aggregator(trim_count=1.5), TypeError, "trimmed_mean_aggregator: trim_count is"),
        (lambda: adapter.trimmed_mean_aggregator(trim_count=True), TypeError, "trimmed_mean_aggregator: trim_count is"),
        (lambda: adapter.mean_around_median_aggregator(True), TypeError, "mean_around_median_aggregator: num_byz"),
        (lambda: adapter.geometric_median_aggregator(num_iterations=0), ValueError, "geometric_median_aggregator: num"),
        (lambda: adapter.geometric_median_aggregator(smoothing=-1.0), ValueError, "geometric_median_aggregator: smoo"),
        (lambda: adapter.centered_clipping_aggregator(-1.0), ValueError, "centered_clipping_aggregator: radius is -1"),
        (lambda: adapter.centered_clipping_aggregator("1"), TypeError, "centered_clipping_aggregator: radius is str"),
        (lambda: adapter.bucketing_pre_aggregator(0, KEY), ValueError, "bucketing_pre_aggregator: bucket_size is 0"),
        (lambda: adapter.bucketing_pre_aggregator(2, 1.5), TypeError, "bucketing_pre_aggregator: key is"),
        (
            lambda: adapter.nearest_neighbor_mixing_pre_aggregator(-1),
            ValueError,
            "mixing_pre_aggregator: num_byzantine",
        ),
        (
            lambda: adapter.median_aggregator(pre_aggregators=[len]),
            TypeError,
            "median_aggregator: pre_aggregators holds",
        ),
    ],
)
def test_refuses_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (adapter.krum_aggregator(3), "krum: num_byzantine is 3; it needs"),
        (adapter.multi_krum_aggregator(1, 6), "multi_krum: num_selected is 6; it needs"),
        (adapter.bulyan_aggregator(1), "bulyan: num_byzantine is 1; it needs"),
        (adapter.mean_around_median_aggregator(5), "mean_around_median: num_byzantine is 5; it needs"),
        (adapter.centered_clipping_aggregator(1.0, center={"w": jnp.zeros(2)}), "center has the structure"),
    ],
)
def test_refuses_too_few_clients(aggregator, message):
    with pytest.raises(ValueError, match=message) as caught:
        aggregator.apply(clients_of(make_updates(5)), aggregator.init())
    assert any("_aggregator: updates[i] are the params" in note for note in caught.value.__notes__)
