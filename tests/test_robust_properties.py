"""What the robust rules promise, whoever the clients are: equivariance, breakdown, and the papers' definitions.

The definitions here are loops over clients in NumPy, written from the papers, for every allowed number of clients and
of bad ones, up to eleven clients.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import by_id, checkerboard

import fedfuse_jax as ff

MOST_CLIENTS = 11


def samples(n_clients, size=6, seed=0):
    return np.random.default_rng([seed, n_clients]).standard_normal((n_clients, size)).astype(np.float32)


# --- The papers' definitions --------------------------------------------------------------------------------------


def distances_of(x):
    x = x.astype(np.float64)
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def score(distances, client, among, num_neighbors):
    return sum(sorted(distances[client, other] for other in among if other != client)[:num_neighbors])


def krum_order(x, f):
    distances, everybody = distances_of(x), range(len(x))
    return sorted(everybody, key=lambda i: (score(distances, i, everybody, len(x) - f - 2), i))


def krum(x, f):
    return x[krum_order(x, f)[0]]


def multi_krum(x, f):
    return x[krum_order(x, f)[: len(x) - f]].mean(0)


def mean_around_median(x, f):
    columns = []
    for column in x.astype(np.float64).T:
        middle = np.median(column)
        nearest = sorted(column, key=lambda value, middle=middle: (abs(value - middle), value))
        columns.append(np.mean(nearest[: len(x) - f]))
    return np.array(columns)


def bulyan(x, f):
    distances, left, picks = distances_of(x), list(range(len(x))), []
    distances[np.isnan(distances)] = np.inf
    while len(picks) < len(x) - 2 * f:
        num_neighbors = max(len(left) - f - 2, 1)
        best, pick = min((score(distances, i, left, num_neighbors), i) for i in left)
        if not np.isfinite(best):
            break
        picks.append(pick)
        left.remove(pick)
    return mean_around_median(x[picks], 2 * f) if len(picks) > 2 * f else np.full(x.shape[1], np.nan)


def nearest_neighbor_mixing(x, f):
    order = np.argsort(distances_of(x), axis=1, kind="stable")[:, : len(x) - f]
    return np.stack([x[near].mean(0) for near in order])


def geometric_median(x, f):
    center = np.median(x.astype(np.float64), axis=0)
    for _ in range(8):
        pull = 1 / np.maximum(np.linalg.norm(x - center, axis=1), 1e-6)
        center = pull @ x / pull.sum()
    return center


def centered_clipping(x, f):
    center = np.zeros(x.shape[1])
    for _ in range(3):
        steps = x - center
        center = center + (steps * np.minimum(1, 1.5 / (1e-30 + np.linalg.norm(steps, axis=1)))[:, None]).mean(0)
    return center


def clip_from_zero(x, f, **options):
    center = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), x)
    return ff.centered_clipping(x, center, 1.5, num_iterations=3, **options)


def without_f(rule):
    return lambda x, f, **options: rule(x, **options)


# Our rule, the definition, and which f it allows.
RULES = {
    "mean_around_median": (ff.mean_around_median, mean_around_median, lambda n, f: f < n),
    "krum": (ff.krum, krum, lambda n, f: n - f - 2 >= 1),
    "multi_krum": (ff.multi_krum, multi_krum, lambda n, f: n - f - 2 >= 1),
    "bulyan": (ff.bulyan, bulyan, lambda n, f: n >= 4 * f + 3),
    "nearest_neighbor_mixing": (ff.nearest_neighbor_mixing, nearest_neighbor_mixing, lambda n, f: f < n),
    "geometric_median": (without_f(ff.geometric_median), geometric_median, lambda n, f: f == 0),
    "centered_clipping": (clip_from_zero, centered_clipping, lambda n, f: f == 0),
}
each_rule = pytest.mark.parametrize("name", RULES)


@each_rule
@pytest.mark.parametrize("most", [7, pytest.param(MOST_CLIENTS, marks=pytest.mark.full)])
def test_every_allowed_number_of_clients(name, most):
    """And a clear refusal of every other."""
    rule, definition, allowed = RULES[name]
    for n_clients in range(1, most + 1):
        for f in range(n_clients + 1):
            x = samples(n_clients, seed=f)
            if allowed(n_clients, f):
                np.testing.assert_allclose(rule(jnp.asarray(x), f), definition(x, f), rtol=2e-5, atol=2e-5)
            elif name not in ("geometric_median", "centered_clipping"):
                with pytest.raises(ValueError, match=f"{name}: num_byzantine is {f}; it needs .*{n_clients} clients"):
                    rule(jnp.asarray(x), f)


@pytest.mark.parametrize("num_bad", range(8))
def test_bulyan_past_its_tolerance(num_bad):
    """Who is not finite is never picked, stays among those left, and so counts: then nobody may be near enough."""
    for f in (1, 2):
        for n_clients in (4 * f + 3, 4 * f + 5):
            x = samples(n_clients, seed=f)
            x[np.random.default_rng(n_clients).permutation(n_clients)[:num_bad]] = np.nan
            np.testing.assert_allclose(ff.bulyan(jnp.asarray(x), f), bulyan(x, f), rtol=2e-5, atol=2e-5)


@each_rule
def test_where_is_a_smaller_problem(name):
    """Of eleven clients those who take part decide alone, in one compiled program; NaN where they are too few."""
    rule, definition, allowed = RULES[name]
    f = 0 if name in ("geometric_median", "centered_clipping") else 2
    x, traces = samples(MOST_CLIENTS), []

    @jax.jit
    def call(x, where):
        traces.append(None)
        return rule(x, f, where=where)

    for count in range(1, MOST_CLIENTS + 1):
        where = np.zeros(MOST_CLIENTS, bool)
        where[np.random.default_rng(count).permutation(MOST_CLIENTS)[:count]] = True
        got = np.asarray(call(np.where(where[:, None], x, np.nan), where))
        if got.shape == x.shape:
            assert not got[~where].any()
            got = got[where]
        if allowed(count, f):
            np.testing.assert_allclose(got, definition(x[where], f), rtol=2e-5, atol=2e-5)
        else:
            assert np.isnan(got).all(), count
    assert len(traces) == 1


# --- Equivariance -------------------------------------------------------------------------------------------------


@each_rule
def test_permuting_clients(name):
    # Of a small Bulyan, the last pick is one of two who are nearest each other: a tie, which goes by index.
    n_clients, f = (15, 3) if name == "bulyan" else (11, 2)
    rule, x = RULES[name][0], samples(n_clients)
    order = np.random.default_rng(1).permutation(n_clients)
    wanted, got = np.asarray(rule(jnp.asarray(x), f)), np.asarray(rule(jnp.asarray(x[order]), f))
    np.testing.assert_allclose(got, wanted[order] if wanted.shape == x.shape else wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in RULES if name != "centered_clipping"])
@pytest.mark.parametrize("factor", [1.0, -4.0, 2.0**-20, 2.0**20])
def test_shifting_and_scaling(name, factor):
    """A shift by whole numbers and a power of two: exact in what goes in."""
    rule = RULES[name][0]
    x = np.round(samples(11) * 1024) / 1024
    if name == "geometric_median":
        rule = lambda x, f: ff.geometric_median(x, smoothing=0.0)  # noqa: E731
    wanted = np.asarray(rule(jnp.asarray(x), 2))
    got = np.asarray(rule(jnp.asarray(factor * (x + 8)), 2))
    np.testing.assert_allclose(got / factor - 8, wanted, rtol=1e-5, atol=2e-5)


def test_centered_clipping_shifts_and_scales_with_its_center():
    x, center = samples(7), samples(1)[0]
    wanted = ff.centered_clipping(x, center, 1.5, num_iterations=2)
    got = ff.centered_clipping(4 * (x + 8), 4 * (center + 8), 6.0, num_iterations=2)
    np.testing.assert_allclose(got / 4 - 8, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("radius", [-1.0, np.nan])
def test_a_traced_radius_that_is_none_gives_nan(radius):
    """Not the plain mean: that would let everybody through."""
    clip = jax.jit(lambda radius: ff.centered_clipping(samples(5), jnp.zeros(samples(5).shape[1]), radius))
    assert np.isnan(clip(radius)).all()


# --- Breakdown ----------------------------------------------------------------------------------------------------

BAD = {
    "far": lambda bad, good: np.full_like(bad, 1e6),
    "far apart": lambda bad, good: 1e6 * np.sign(samples(len(bad), bad.shape[1], seed=9)),
    "farther than float32 can square": lambda bad, good: np.full_like(bad, -1e30),
    "near": lambda bad, good: np.repeat(good.mean(0)[None] + 3 * good.std(0), len(bad), 0),
    "infinite": lambda bad, good: np.full_like(bad, -np.inf),
    "infinite both ways": lambda bad, good: np.where(np.arange(bad.size).reshape(bad.shape) % 2, np.inf, -np.inf),
    "NaN": lambda bad, good: np.full_like(bad, np.nan),
    "one NaN each": lambda bad, good: np.where(np.arange(bad.shape[1]) == 2, np.nan, good.mean(0)),
}


@pytest.mark.parametrize("attack", BAD)
@pytest.mark.parametrize("name", RULES)
def test_bad_clients_move_the_result_no_farther_than_the_good_are_apart(name, attack):
    """As many as the paper allows. A bound that all the papers' rules keep: within a few diameters of the good ones."""
    n_clients, f = 11, {"bulyan": 2, "krum": 4, "multi_krum": 4, "centered_clipping": 1}.get(name, 4)
    x = samples(n_clients)
    places = np.random.default_rng(2).permutation(n_clients)[:f]
    good = np.delete(x, places, axis=0)
    x[places] = BAD[attack](x[places], good)
    got = np.asarray(RULES[name][0](jnp.asarray(x), f))
    if got.shape == x.shape:
        got = np.delete(got, places, axis=0)
    diameter = np.sqrt(distances_of(good).max())
    away = np.linalg.norm(np.atleast_2d(got) - good.mean(0), axis=1)
    assert (away <= 2 * diameter).all(), away / diameter


@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan"])
def test_a_client_that_is_not_finite_is_never_chosen(name):
    """Not even when more are bad than the rule is told of."""
    rule = RULES[name][0]
    x = samples(11)
    for count in range(1, 12):
        x[:count] = np.nan if count % 2 else np.inf
        got = np.asarray(rule(jnp.asarray(x), 2))
        assert np.isfinite(got).all() or np.isnan(got).all()
        if count <= 2:
            assert np.isfinite(got).all()


def test_ties_go_to_the_lower_index():
    x = jnp.asarray(np.repeat(samples(3), 4, axis=0))  # four of each
    assert ff.krum(x, 2).tolist() == x[0].tolist() or ff.krum(x, 2).tolist() == x[4 * 1].tolist()
    chosen = jax.grad(lambda x: ff.krum(x, 2).sum())(x)
    assert np.flatnonzero(chosen.sum(1)).tolist() in ([0], [4], [8])
    kept = jax.grad(lambda x: ff.multi_krum(x, 2, 2).sum())(x)
    assert np.flatnonzero(kept.sum(1)).tolist() in ([0, 1], [4, 5], [8, 9])


# --- Distances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_nothing_cancels(offset):
    """Weights far from zero, a little apart: what subtracting norms loses altogether."""
    x = (offset + np.random.default_rng(0).integers(-8, 9, (9, 5000)) / 8).astype(np.float32)
    got, wanted = ff.pairwise_squared_distances(jnp.asarray(x)), distances_of(x)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert np.array_equal(got, got.T)
    assert not np.diagonal(got).any()


@pytest.mark.parametrize("n_clients", [63, 64, 65, 127, 129, 261])
def test_every_group_of_clients_meets_every_other(n_clients):
    """The kernel cuts many clients into groups, of those that take part."""
    x, where = samples(n_clients, 50), np.random.default_rng(0).random(n_clients) < 0.8
    np.testing.assert_allclose(ff.pairwise_squared_distances(jnp.asarray(x)), distances_of(x), rtol=1e-5)
    got = np.asarray(ff.pairwise_squared_distances(jnp.asarray(x), where=where))
    np.testing.assert_allclose(got[where][:, where], distances_of(x[where]), rtol=1e-5)


def test_who_is_not_finite_or_absent_is_far_from_everyone():
    x = samples(5)
    x[1, 2], x[3, 0], x[4] = np.nan, -np.inf, np.inf
    where = np.array([True, True, False, True, True])
    got = np.asarray(ff.pairwise_squared_distances(jnp.asarray(x), where=where))
    wanted = np.full((5, 5), np.inf)
    wanted[[0, 1, 3, 4], [0, 1, 3, 4]] = 0
    assert np.array_equal(got, wanted)
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(jnp.isfinite(d := ff.pairwise_squared_distances(x)), d, 0)))(x)
    assert not np.asarray(gradient)[[1, 3, 4]].any()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan", "nearest_neighbor_mixing"])
def test_shared_distances_change_nothing(name):
    rule, x = RULES[name][0], jnp.asarray(samples(11)).at[4].set(jnp.nan)
    where = jnp.arange(11) != 7
    distances = ff.pairwise_squared_distances(x, where=where)
    wanted = np.asarray(rule(x, 2 if name != "bulyan" else 1, where=where))
    got = np.asarray(rule(x, 2 if name != "bulyan" else 1, distances=distances))
    assert got.tobytes() == wanted.tobytes()


def test_krum_scores_by_definition():
    x = samples(8)
    distances = ff.pairwise_squared_distances(jnp.asarray(x))
    for f, count in itertools.product(range(4), (None, 1, 7)):
        wanted = [score(distances_of(x), i, range(8), 6 - f if count is None else count) for i in range(8)]
        np.testing.assert_allclose(ff.krum_scores(distances, f, num_neighbors=count), wanted, rtol=1e-5)
    where = jnp.arange(8) < 4
    assert np.isinf(ff.krum_scores(distances, 1, where=where)[4:]).all()
    assert np.isnan(ff.krum_scores(distances, 2, where=where)).all()


# --- Around the median ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_median(bad):
    """It is at no distance from itself."""
    x = jnp.array([[1.0], [2.0], [bad], [bad], [bad]])
    assert ff.mean_around_median(x, 4).tolist() == [[bad]] or ff.mean_around_median(x, 4).tolist() == [bad]


def test_values_that_nearly_tie():
    """Values about as far below the median as above: their sum with it rounds alike, and they still do not tie."""
    tiny = 2.0**-30
    for low, high, kept in ((tiny, 4.0, tiny), (-tiny, 4.0, 4.0), (0.0, 4.0, 0.0)):
        got = ff.mean_around_median(jnp.array([[low], [2.0], [high]], jnp.float32), 1)
        assert got.tolist() == [np.float32((np.float32(kept) + np.float32(2)) / 2)]


# --- Mixing and bucketing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [jax.random.key(5), jax.random.PRNGKey(5)], ids=["typed", "raw"])
@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_buckets_are_means_of_a_permutation(key, size):
    x, order = samples(11), np.asarray(jax.random.permutation(jax.random.key(5), 11))
    wanted = np.stack([x[order[i : i + size]].mean(0) for i in range(0, 11, size)])
    np.testing.assert_allclose(ff.bucketing(key, jnp.asarray(x), size), wanted, rtol=1e-5, atol=1e-6)


def test_buckets_of_those_who_are_there():
    x = samples(11)
    x[3, 0] = np.nan
    where = np.arange(11) % 4 != 0
    got = np.asarray(ff.bucketing(jax.random.key(0), jnp.asarray(x), 3, where=where))
    active = x[where & np.isfinite(x).all(1)]
    assert got.shape == (4, 6)
    assert not got[3].any()
    counts = [3, 3, len(active) - 6]
    np.testing.assert_allclose(np.array(counts) @ got[:3], active.sum(0), rtol=1e-5, atol=1e-5)


def test_duplicates_come_after_oneself():
    """Whose gradient it is tells them apart."""
    x = jnp.zeros((4, 2))
    weights = jax.jacobian(lambda x: ff.nearest_neighbor_mixing(x, 3)[:, 0])(x)[..., 0]
    assert np.array_equal(weights, np.eye(4))


def test_mixing_alone():
    """A single client is its own neighbour; one that is not finite is nobody's, not even its own."""
    assert ff.nearest_neighbor_mixing(jnp.array([[3.0, 4.0]]), 0).tolist() == [[3.0, 4.0]]
    assert ff.nearest_neighbor_mixing(jnp.array([[3.0, jnp.nan]]), 0).tolist() == [[0.0, 0.0]]
    assert ff.nearest_neighbor_mixing(jnp.array([[3.0], [jnp.nan], [jnp.inf]]), 1).tolist() == [[3.0], [0.0], [0.0]]


# --- Transformations ----------------------------------------------------------------------------------------------


def tree_of(x):
    return {"a": x[..., :4].reshape(*x.shape[:-1], 2, 2), "b": x[..., 4], "c": x[..., 5:]}


ALL = {name: (lambda x, rule=rule, **options: rule(x, 2, **options)) for name, (rule, _, _) in RULES.items()}
ALL["bucketing"] = lambda x, **options: ff.bucketing(jax.random.key(0), x, 3, **options)
each_of_all = pytest.mark.parametrize("name", ALL)


@each_of_all
def test_a_tree_is_one_vector(name):
    x = jnp.asarray(samples(11))
    wanted, got = tree_of(ALL[name](x)), jax.jit(ALL[name])(tree_of(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


@each_of_all
def test_vmap(name):
    x = jnp.stack([samples(11, seed=seed) for seed in range(3)])
    where = jnp.arange(33).reshape(3, 11) % 7 != 0
    rule = lambda x, where: ALL[name](x, where=where)  # noqa: E731
    got = jax.jit(jax.vmap(rule))(x, where)
    shared = jax.jit(jax.vmap(rule, (None, 0)))(x[0], where)
    for i in range(3):
        np.testing.assert_allclose(got[i], rule(x[i], where[i]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shared[i], rule(x[0], where[i]), rtol=1e-5, atol=1e-6)


@each_of_all
def test_strict_promotion(name):
    """Under the strictest settings of jax.numpy the values are the same."""
    x, where = jnp.asarray(samples(11)).astype(jnp.bfloat16), jnp.arange(11) != 3
    wanted = ALL[name](x, where=where)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(ALL[name](x, where=where), wanted)


@each_of_all
def test_a_second_call_outside_of_jit_compiles_nothing(name, caplog):
    ALL[name](jnp.asarray(samples(11)))
    values = jnp.asarray(samples(11, seed=1))
    with jax.log_compiles():
        ALL[name](values)
        jax.jit(lambda: 0.0)()  # which shows that a compilation would be seen
    assert sum("Compiling" in record.message for record in caplog.records) == 1


@each_of_all
def test_gradient(name):
    """By finite differences in float64; and exactly 0 for who is absent or, where it has no influence, not finite."""
    with jax.enable_x64():
        x = jnp.asarray(samples(11).astype(np.float64))
        rule = lambda x: jnp.sum(jnp.sin(ALL[name](x)))  # noqa: E731
        direction = jnp.asarray(samples(11, seed=3).astype(np.float64))
        step = 1e-6
        wanted = (rule(x + step * direction) - rule(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(jax.grad(rule)(x), direction), wanted, rtol=1e-6, atol=1e-7)
    where = jnp.arange(11) != 3
    spoiled = jnp.asarray(samples(11)).at[3].set(jnp.nan)
    gradient = jax.grad(lambda x: jnp.sum(ALL[name](x, where=where)))(spoiled)
    assert not np.asarray(gradient)[3].any()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("smoothing", [0.0, 1e-6])
@pytest.mark.parametrize("alike", [False, True])
def test_the_geometric_median_s_gradients_are_finite(smoothing, alike):
    """Also where a client is at the median, one is absent, and nothing smooths: first and second derivatives."""
    x = jnp.ones((7, 6)) if alike else jnp.asarray(samples(7))
    call = lambda *values: jnp.sum(ff.geometric_median(*values[:2], smoothing=values[2], where=jnp.arange(7) != 2))  # noqa: E731
    values = x, jnp.ones(7), smoothing
    for gradient in (*jax.grad(call, (0, 1, 2))(*values), jax.hessian(call)(*values)):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan", "geometric_median", "centered_clipping"])
def test_results_have_the_dtypes_asked_for(name):
    x = jnp.asarray(samples(11)).astype(jnp.bfloat16)
    assert ALL[name](x).dtype == jnp.float32
    assert ALL[name](x, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@checkerboard(
    name=by_id(ALL),
    sharded=by_id(["parameters", "clients"]),
    kind={"Auto": AxisType.Auto, "Explicit": AxisType.Explicit},
)
def test_sharding(name, sharded, kind):
    if jax.device_count() < 4:
        pytest.skip("needs four devices: XLA was started before tests/conftest.py")
    x = jnp.asarray(samples(12, 8))
    wanted = ALL[name](x)
    spec = P(None, "a") if sharded == "parameters" else P("a")
    mesh = jax.make_mesh((4,), ("a",), (kind,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_allclose(jax.jit(ALL[name])(placed), wanted, rtol=1e-5, atol=1e-6)
        if sharded == "clients" or name == "mean_around_median":
            return
        mapped = jax.shard_map(
            lambda x: ALL[name](x, axis_name="a"), mesh=mesh, in_specs=spec,
            out_specs=spec if wanted.ndim == 2 else P("a"),
            check_vma=name != "centered_clipping",  # whose center is made inside here, alike on every device
        )  # fmt: skip
        np.testing.assert_allclose(jax.jit(mapped)(placed), wanted, rtol=1e-5, atol=1e-6)
