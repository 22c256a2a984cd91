"""Clipped and noisy sums: sensitivity whatever a client sends, noise that is JAX's own, the adaptive bound."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operations import has_kernel

import fedfuse_jax as ff

KEY = jax.random.key(7)
EPS = float(jnp.finfo(jnp.float32).eps)


# --- Sensitivity ------------------------------------------------------------------------------------------------

generator = np.random.default_rng(0)
ORDINARY = generator.standard_normal(1001).astype(np.float32)
BAD_CLIENTS = {
    "ordinary": ORDINARY,
    "NaN": np.where(np.arange(1001) == 500, np.float32(np.nan), ORDINARY),
    "all NaN": np.full(1001, np.nan, np.float32),
    "inf": np.where(np.arange(1001) == 0, np.float32(np.inf), ORDINARY),
    "both infinities": np.copysign(np.float32(np.inf), ORDINARY),
    "greatest": np.copysign(np.finfo(np.float32).max, ORDINARY),
    "greatest once": np.where(np.arange(1001) == 3, np.finfo(np.float32).max, np.float32(0)),
    "1e30": np.float32(1e30) * ORDINARY,
    "1e20": np.float32(1e20) * ORDINARY,
    "1e-20": np.float32(1e-20) * ORDINARY,
    "1e-38": np.float32(1e-38) * ORDINARY,
    "subnormal": np.full(1001, 1e-45, np.float32),
    "zero": np.zeros(1001, np.float32),
    "just above": (ORDINARY / np.linalg.norm(ORDINARY.astype(np.float64)) * (1 + 1e-6)).astype(np.float32),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", BAD_CLIENTS)
def test_one_client_moves_the_sum_by_its_weight_times_the_bound(bad, dtype):
    """The sum with the client less the sum without it: at most |w| C and, adding, some ulp of the sum."""
    others = generator.standard_normal((6, 1001)).astype(np.float32)
    updates = jnp.asarray(np.vstack([others[:3], BAD_CLIENTS[bad], others[3:]])).astype(dtype)
    for weight, bound in ((1.0, 1.0), (-2.5, 0.01), (0.5, 30.0), (3.0, 1e-6), (1.0, 0.0)):
        weights = jnp.array([1.0, 0.5, -1.0, weight, 1.0, 2.0, 0.25])
        where = jnp.arange(7) != 3
        total, norms = ff.clipped_weighted_sum(updates, weights, bound, return_norms=True)
        without = ff.clipped_weighted_sum(updates, weights, bound, where=where)
        assert np.isfinite(total).all()
        moved = np.linalg.norm(np.asarray(total, np.float64) - np.asarray(without, np.float64))
        rounding = 8 * EPS * np.linalg.norm(np.abs(np.asarray(total, np.float64))) + np.finfo(np.float32).tiny
        assert moved <= abs(weight) * bound * (1 + 8 * EPS) + rounding
        sent = np.asarray(updates[3].astype(jnp.float32), np.float64)
        if not np.isfinite(sent).all():
            assert moved == 0
            assert np.isnan(norms[3]) if np.isnan(sent).any() else norms[3] == np.inf


def test_a_lone_client_is_no_longer_than_the_bound():
    """Without others to add to, nothing is left but the rounding of each coordinate."""
    for scale in (1e-3, 1.0, 1e10, 1e25, 3e36):
        for seed in range(20):
            update = np.random.default_rng(seed).standard_normal(977).astype(np.float32) * np.float32(scale)
            total = np.asarray(ff.clipped_weighted_sum(update[None], jnp.ones(1), 1.0), np.float64)
            norm = np.linalg.norm(update.astype(np.float64))
            np.testing.assert_allclose(np.linalg.norm(total), min(1.0, norm), rtol=4 * EPS)
            np.testing.assert_allclose(total, update / max(norm, 1.0), rtol=8 * EPS)


def test_float64_norms_whose_squares_leave_the_range():
    with jax.enable_x64():
        for scale in (1e-300, 1e-160, 1e160, 1e300, 1e306):
            updates = np.random.default_rng(0).standard_normal((3, 50)) * scale
            total, norms = ff.clipped_weighted_sum(updates, jnp.ones(3), 1e-310, return_norms=True)
            wanted = np.linalg.norm(updates / scale, axis=1) * scale
            np.testing.assert_allclose(norms, wanted, rtol=1e-14)
            total, norms = ff.clipped_weighted_sum(updates, jnp.ones(3), 2.0, return_norms=True)
            factors = np.minimum(1, 2.0 / wanted)
            np.testing.assert_allclose(total, (factors[:, None] * updates).sum(0), rtol=1e-12)


def test_the_norm_is_that_of_the_whole_tree():
    tree = {"a": jnp.array([[3.0], [0.0]]), "b": {"c": jnp.array([[0.0, 4.0], [1.0, 0.0]], jnp.bfloat16)}}
    total, norms = ff.clipped_weighted_sum(tree, jnp.ones(2), 2.5, return_norms=True)
    assert norms.tolist() == [5.0, 1.0]
    assert (total["a"].tolist(), total["b"]["c"].tolist()) == ([1.5], [1.0, 2.0])


def test_an_infinite_bound_clips_nobody():
    updates = jnp.array([[1e38, 3e38], [1.0, -1.0]])
    got = jax.jit(ff.clipped_weighted_sum)(updates, jnp.ones(2), jnp.inf)
    np.testing.assert_array_equal(got, ff.weighted_sum(updates, jnp.ones(2)))


@pytest.mark.parametrize("where", [None, jnp.array([True, True, False, True])], ids=["everybody", "some"])
def test_a_client_that_is_not_finite_has_no_gradient_and_spoils_nobody_s(where):
    updates = jnp.array([[3.0, 4.0], [jnp.nan, 1.0], [jnp.inf, 0.0], [0.1, 0.2]])
    weights = jnp.array([1.0, 2.0, -1.0, 0.5])

    def loss(updates, weights, bound):
        return jnp.sum(jnp.sin(ff.clipped_weighted_sum(updates, weights, bound, where=where)))

    for_updates, for_weights, for_bound = jax.jit(jax.grad(loss, (0, 1, 2)))(updates, weights, 1.0)
    assert not np.any(np.asarray(for_updates)[1:3])
    assert not np.any(np.asarray(for_weights)[1:3])
    kept = jnp.array([0, 3])
    wanted = jax.grad(lambda x, w, c: jnp.sum(jnp.sin(ff.clipped_weighted_sum(x, w, c))), (0, 1, 2))(
        updates[kept], weights[kept], 1.0
    )
    np.testing.assert_allclose(for_updates[kept], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(for_weights[kept], wanted[1], rtol=1e-5)
    np.testing.assert_allclose(for_bound, wanted[2], rtol=1e-5)


@pytest.mark.parametrize("bound", [-1.0, float("nan"), -float("inf")])
def test_a_traced_bound_that_makes_no_sense_gives_nan(bound):
    got = jax.jit(ff.clipped_weighted_sum)(jnp.ones((2, 3)), jnp.ones(2), bound)
    assert np.isnan(got).all()


def test_nobody_is_added_before_all_norms_are_known():
    """Enough to be shared by threads; another bound each time, so that what memory holds from the last is wrong."""
    updates, weights = jax.random.normal(jax.random.key(2), (16, 50_001)), jnp.ones(16)
    shares = np.asarray(updates, np.float64) / np.linalg.norm(np.asarray(updates, np.float64), axis=1)[:, None]
    clipped_sum = jax.jit(ff.clipped_weighted_sum)
    for bound in [1.0, 100.0] * 10:
        np.testing.assert_allclose(
            clipped_sum(updates, weights, bound), bound * shares.sum(axis=0), atol=1e-6 * bound, rtol=1e-5
        )


# --- Noise ------------------------------------------------------------------------------------------------------


def noise_of(key, *shapes):
    """A noisy sum of nothing."""
    tree = [jnp.zeros((1, *shape)) for shape in shapes]
    noise = ff.noisy_weighted_sum(key, tree if len(shapes) > 1 else tree[0], jnp.zeros(1), 1.0)
    return noise if len(shapes) > 1 else [noise]


def assert_same_noise(got, wanted):
    """A few ulp: the same random bits, another order of additions in a polynomial."""
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=6 * EPS, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (17,), (4096,), (4097,), (70_001,), (3, 0, 2), (33, 7, 5)], ids=str)
def test_noise_is_that_of_jax(shape):
    assert_same_noise(noise_of(KEY, shape)[0], jax.random.normal(KEY, shape, jnp.float32))


def test_noise_of_a_tree():
    shapes = [(5,), (2, 3), (), (5000,)]
    for got, key, shape in zip(noise_of(KEY, *shapes), jax.random.split(KEY, 4), shapes, strict=True):
        assert_same_noise(got, jax.random.normal(key, shape, jnp.float32))


def test_keys_of_both_kinds():
    raw = jax.random.PRNGKey(3)
    wanted = jax.random.normal(raw, (9,))
    for key in (raw, np.asarray(raw), jax.random.wrap_key_data(raw)):
        assert_same_noise(noise_of(key, (9,))[0], wanted)


def test_noise_under_vmap():
    """Over keys, over updates, and over both: what vmap of the definition gives."""
    keys, updates, weights = jax.random.split(KEY, 3), jnp.ones((3, 2, 50)), jnp.ones(2)
    for in_axes in ((0, None), (None, 0), (0, 0)):
        arguments = [keys if in_axes[0] == 0 else KEY, updates if in_axes[1] == 0 else updates[0]]
        got = jax.jit(jax.vmap(lambda k, x: ff.noisy_weighted_sum(k, x, weights, 0.5), in_axes))(*arguments)
        wanted = jax.vmap(lambda k, x: x.sum(0) + 0.5 * jax.random.normal(k, (50,)), in_axes)(*arguments)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_other_generators_use_their_own_bits():
    key = jax.random.key(3, impl="rbg")
    updates = {"a": jnp.ones((2, 5)), "b": jnp.ones((2, 3))}
    got = ff.noisy_weighted_sum(key, updates, jnp.ones(2), 0.5)
    for name, part in zip("ab", jax.random.split(key, 2), strict=True):
        np.testing.assert_allclose(got[name], 2 + 0.5 * jax.random.normal(part, got[name].shape), rtol=1e-6)
    got = ff.clipped_noisy_weighted_sum(key, updates["a"], jnp.ones(2), 0.1, 0.5)
    clipped = ff.clipped_weighted_sum(updates["a"], jnp.ones(2), 0.1)
    np.testing.assert_allclose(got, clipped + 0.5 * jax.random.normal(key, (5,)), rtol=1e-6)


def test_the_old_layout_of_counters_is_jax_s_too():
    with jax.threefry_partitionable(False):
        got = ff.noisy_weighted_sum(KEY, jnp.zeros((1, 7)), jnp.zeros(1), 1.0)
        wanted = jax.random.normal(KEY, (7,))
    assert_same_noise(got, wanted)
    assert not np.allclose(got, jax.random.normal(KEY, (7,)))


def test_no_deviation_adds_nothing():
    """Not even a zero: a negative zero stays one."""
    updates, weights = jnp.array([[1.5, -0.0, 2.0]]), jnp.ones(1)
    for stddev in (0.0, -0.0):
        got = jax.jit(ff.noisy_weighted_sum)(KEY, updates, weights, stddev)
        np.testing.assert_array_equal(got, ff.weighted_sum(updates, weights))
    if has_kernel("noisy_weighted_sum"):
        assert np.signbit(got[1]) == np.signbit(ff.weighted_sum(updates, weights)[1])


def test_statistics_of_the_noise():
    """A million: mean, deviation, fourth moment and tail, each within five of its own standard errors."""
    noise = np.asarray(noise_of(jax.random.key(2024), (1_000_000,))[0], np.float64)
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - expected) < 5 * np.sqrt(deviation / noise.size)
    assert abs((np.abs(noise) > 3).mean() - 0.0026998) < 5 * np.sqrt(0.0027 / noise.size)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5e-3


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("mesh_shape", "specs"),
    [
        ((4,), {"w": P(None, "a"), "v": P(None, "a"), "b": P()}),
        ((4,), {"w": P(None, None, "a"), "v": P(), "b": P()}),
        ((2, 2), {"w": P(None, "a", "b"), "v": P(None, ("a", "b")), "b": P()}),
        ((2, 2), {"w": P(None, "b", None, "a"), "v": P(None, "b"), "b": P()}),
    ],
    ids=str,
)
def test_every_device_makes_the_noise_of_its_own_coordinates(mesh_shape, specs, kind):
    """The same bits as on one device, without a collective."""
    # More coordinates to a device than fit a task, whose bounds are not those of the device's rows.
    shapes = {"w": (8, 12, 300), "v": (4096 * 4,), "b": ()}
    updates = {name: jax.random.normal(jax.random.key(1), (3, *shape)) for name, shape in shapes.items()}
    weights = jnp.array([1.0, -2.0, 0.5])
    wanted = jax.jit(ff.noisy_weighted_sum)(KEY, updates, weights, 0.5)
    mesh = jax.make_mesh(mesh_shape, ("a", "b")[: len(mesh_shape)], (kind,) * len(mesh_shape))
    with jax.set_mesh(mesh):
        sharded = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in updates.items()}
        compiled = jax.jit(ff.noisy_weighted_sum).lower(KEY, sharded, weights, jnp.float32(0.5)).compile()
        got = jax.device_get(compiled(KEY, sharded, weights, jnp.float32(0.5)))
    assert not hlo.collectives(compiled.as_text())
    for name in shapes:
        if has_kernel("noisy_weighted_sum"):
            np.testing.assert_array_equal(got[name], wanted[name])
        else:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30, 1e37])
def test_sharded_norms_of_any_size(scale):
    """Devices add up parts of squared norms: those leave the range of float32 long before the norms do."""
    updates = jax.random.normal(jax.random.key(0), (5, 16)) * scale
    updates = updates.at[1, 3].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(0).at[4].mul(1e-3)
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, -2.0])
    wanted, norms = ff.clipped_weighted_sum(updates, weights, scale, return_norms=True)
    mesh = jax.make_mesh((4,), ("a",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(updates, NamedSharding(mesh, P(None, "a")))
        got, got_norms = jax.jit(lambda x: ff.clipped_weighted_sum(x, weights, scale, return_norms=True))(sharded)
    np.testing.assert_allclose(got_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * scale)


def rows_of_all_magnitudes(dtype, num_shards):
    """Rows of one coordinate to a shard: shards alike, a little apart, and anywhere in the range."""
    generator, info = np.random.default_rng(0), np.finfo(dtype)
    lowest, highest = int(info.minexp) - int(info.nmant), int(info.maxexp) - 1
    # Where sums of squares would leave the range, scaled by this fraction of it or that.
    fractions = [sign * info.maxexp * part // 16 for sign in (-1, 1) for part in range(17)]
    centers = [*range(lowest, highest + 1, info.maxexp // 128), *(x + step for x in fractions for step in (-1, 0, 1))]
    centers = np.array(centers)[:, None]
    shape = (len(centers), num_shards)
    spread = [centers + generator.integers(-most, most + 1, shape) for most in (0, 1, 3, 30)]
    exponents = np.concatenate([*spread, generator.integers(lowest, highest + 1, shape)]).clip(lowest, highest)
    numbers = generator.choice([1 - 1e-3, 1.0, 1 + 1e-3, 1.5, -1.0], exponents.shape)
    # One shard just above a power of two, and the others just below.
    numbers[: len(centers)] = np.where(np.arange(num_shards) == 0, 1 + 1e-3, 1 - 1e-3)
    return np.ldexp(numbers, exponents).astype(dtype)


@pytest.mark.parametrize("way", ["Auto", "Explicit", "axis_name"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_client_exceeds_the_bound_wherever_its_parameters_are(dtype, way):
    """By search, and compiled: a simplifier may turn right arithmetic into wrong."""
    num_shards, info = jax.device_count(), np.finfo(dtype)
    tolerance = {"rtol": 12 * info.eps, "atol": num_shards * info.tiny}

    def each_alone(rows, bound, axis_name=None):
        def alone(row):
            weights = jnp.ones(1, dtype)
            return ff.clipped_weighted_sum(row[None], weights, bound, return_norms=True, axis_name=axis_name)

        sums, norms = jax.vmap(alone)(rows)
        return sums, norms[:, 0]

    with jax.enable_x64(dtype == "float64"):
        rows = rows_of_all_magnitudes(dtype, num_shards)
        kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
        mesh = jax.make_mesh((num_shards,), ("a",), (kind,))
        split = P(None, "a")
        call = each_alone
        if way == "axis_name":
            call = jax.shard_map(
                lambda rows, bound: each_alone(rows, bound, "a"),
                mesh=mesh,
                in_specs=(split, P()),
                out_specs=(split, P()),
            )
        for bound in np.ldexp([0.7, 1, 1], [0, -(info.maxexp // 2), info.maxexp - 8]).astype(dtype):
            wanted, wanted_norms = jax.device_get(jax.jit(each_alone)(rows, bound))
            with jax.set_mesh(mesh):
                got, norms = jax.device_get(jax.jit(call)(jax.device_put(rows, NamedSharding(mesh, split)), bound))
            lengths = np.sqrt(np.square(got.astype(np.longdouble)).sum(1))
            assert (lengths <= bound * np.longdouble(1 + 8 * info.eps) + tolerance["atol"]).all()
            # Within some ulp of the end of the range, either side may be infinite already.
            in_range = wanted_norms < info.max * (1 - 8 * info.eps)
            np.testing.assert_allclose(norms[in_range], wanted_norms[in_range], **tolerance)
            np.testing.assert_allclose(got[in_range], wanted[in_range], **tolerance)
            assert (norms[~in_range] > info.max * (1 - 16 * info.eps)).all()


@pytest.mark.parametrize("way", ["here", "Auto", "Explicit", "axis_name"])
def test_a_norm_beyond_its_dtype_is_not_finite(way):
    """Whoever has one contributes nothing, and has no gradient: the same wherever the parameters are."""
    greatest = np.finfo(np.float32).max
    rows = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0.5, 0.4, 0.5, 0.4], [0.6, 0.6, 0.6, 0.6]], np.float32) * greatest

    def call(rows, axis_name=None):
        return ff.clipped_weighted_sum(rows, jnp.ones(4), 1.0, return_norms=True, axis_name=axis_name)

    def gradient(rows):
        return jax.grad(lambda x: jnp.sum(call(x)[0] * jnp.arange(1.0, 5.0)))(rows)

    mesh = jax.make_mesh((4,), ("a",), (AxisType.Explicit if way == "Explicit" else AxisType.Auto,))
    split, mapped = P(None, "a"), call
    if way == "axis_name":
        specs = {"in_specs": split, "out_specs": (P("a"), P())}
        mapped = jax.shard_map(lambda rows: call(rows, "a"), mesh=mesh, **specs)
    with jax.set_mesh(mesh):
        placed = jnp.asarray(rows) if way == "here" else jax.device_put(rows, NamedSharding(mesh, split))
        total, norms = jax.jit(mapped)(placed)
        slopes = jax.device_get(jax.jit(gradient)(placed))
    assert np.isinf(norms).tolist() == [True, False, False, True]
    kept = rows[1:3].astype(np.float64)
    np.testing.assert_allclose(total, (kept / np.linalg.norm(kept, axis=1, keepdims=True)).sum(0), rtol=1e-6)
    assert (slopes[[0, 3]] == 0).all()


def test_noise_of_sharded_clients_is_added_once():
    updates, weights = jax.random.normal(jax.random.key(1), (8, 12)), jnp.ones(8)
    mesh = jax.make_mesh((4,), ("a",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(updates, NamedSharding(mesh, P("a")))
        for call in (ff.noisy_weighted_sum, lambda k, x, w, s: ff.clipped_noisy_weighted_sum(k, x, w, 100.0, s)):
            got = jax.jit(call)(KEY, sharded, weights, 0.5)
            wanted = updates.sum(0) + 0.5 * jax.random.normal(KEY, (12,))
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_counters_beyond_32_bits():
    """The definition's arithmetic in two words: a block that begins behind 2³² coordinates."""
    from fedfuse_jax._primitives import private

    levels = jnp.array([[0, 1, 1], [70_000, 100_000, 2], [65_530, 65_536, 6]], jnp.uint32)
    high, low = private._counters(12, levels)
    counters = [(70_000 + i) * 65_536 + 65_530 + j for i in range(2) for j in range(6)]
    assert [int(h) << 32 | int(x) for h, x in zip(high, low, strict=True)] == counters
    got = private._normals(jax.random.key_data(KEY), (12,), levels[None], 0)
    wanted = [oracle.normals(np.asarray(jax.random.key_data(KEY)), (1,), counter)[0] for counter in counters]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


# --- The adaptive bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.5, 2.0])
def test_the_bound_finds_the_median_of_the_norms(start):
    norms = jnp.linspace(0.5, 1.5, 101)
    bound = jax.lax.fori_loop(0, 200, lambda _, c: ff.adaptive_clip_norm(c, norms), jnp.float32(start))
    assert abs(bound - 1.0) < 0.02


@pytest.mark.parametrize("quantile", [0.1, 0.9])
def test_the_bound_finds_other_quantiles(quantile):
    norms = jnp.linspace(0.5, 1.5, 101)
    bound = jnp.float32(1.0)
    for _ in range(300):
        bound = ff.adaptive_clip_norm(bound, norms, target_quantile=quantile, learning_rate=0.1)
    assert abs(bound - (0.5 + quantile)) < 0.02


def test_the_adaptive_rule_to_the_digit():
    norms = jnp.array([0.5, 1.0, 2.0, jnp.inf, jnp.nan])
    got = ff.adaptive_clip_norm(1.0, norms, target_quantile=0.3, learning_rate=0.5)
    np.testing.assert_allclose(got, np.exp(-0.5 * (2 / 5 - 0.3)), rtol=1e-6)
    where = jnp.array([True, False, True, False, False])
    got = ff.adaptive_clip_norm(1.0, norms, target_quantile=0.3, learning_rate=0.5, where=where)
    np.testing.assert_allclose(got, np.exp(-0.5 * (1 / 2 - 0.3)), rtol=1e-6)
    got = ff.adaptive_clip_norm(1.0, norms, key=KEY, count_stddev=10.0)  # not clamped
    share = (2 + 10 * float(jax.random.normal(jax.random.fold_in(KEY, 0x636F756E), ()))) / 5
    assert not 0 <= share <= 1
    np.testing.assert_allclose(got, np.exp(-0.2 * (share - 0.5)), rtol=1e-6)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_noise_on_the_count_is_not_that_of_a_sum(impl):
    """Given one key, the count and no coordinate of an array or of a tree have the same noise."""
    key = jax.random.key(3, impl=impl)
    bound = ff.adaptive_clip_norm(
        1.0, jnp.full(1, 2.0), target_quantile=0.0, learning_rate=1.0, key=key, count_stddev=1.0
    )
    of_count = -np.log(bound)
    shapes = [(64,), (3, 5), *[()] * 100]
    sums = np.concatenate([np.ravel(x) for x in noise_of(key, *shapes) + noise_of(key, (64,))])
    assert np.abs(sums - of_count).min() > 1e-5


def test_the_adaptive_rule_of_nobody_is_nan():
    for key in (None, KEY):
        got = ff.adaptive_clip_norm(1.0, jnp.ones(3), key=key, count_stddev=0.0, where=jnp.zeros(3, bool))
        assert np.isnan(got)


def test_the_adaptive_rule_is_not_silently_without_its_noise():
    call = jax.jit(lambda stddev: ff.adaptive_clip_norm(1.0, jnp.ones(3), count_stddev=stddev))
    assert np.isnan(call(1.0))
    assert call(0.0) == ff.adaptive_clip_norm(1.0, jnp.ones(3))


def test_the_adaptive_rule_under_transformations():
    norms, clip = jnp.linspace(0.5, 1.5, 7), jnp.array([0.5, 1.0, 2.0])
    got = jax.jit(jax.vmap(ff.adaptive_clip_norm, (0, None)))(clip, norms)
    np.testing.assert_allclose(got, [ff.adaptive_clip_norm(c, norms) for c in clip], rtol=1e-6)
    slope = jax.grad(ff.adaptive_clip_norm)(1.0, norms)
    np.testing.assert_allclose(slope, ff.adaptive_clip_norm(1.0, norms), rtol=1e-6)


def test_clients_whose_clip_factor_is_no_normal_number():
    """C / ‖x‖ of these is denormal, and would be flushed to 0: a client near the largest number, and a tiny bound."""
    with jax.enable_x64(True):
        total = ff.clipped_weighted_sum(jnp.array([[1.5e308, 0.0]]), jnp.ones(1), 1.0)
        np.testing.assert_allclose(total, [1.0, 0.0], rtol=1e-15)
    total = ff.clipped_weighted_sum(jnp.array([[6e4, 0.0]], jnp.float16), jnp.ones(1), 1e-35)
    np.testing.assert_allclose(total, [1e-35, 0.0], rtol=1e-6)
