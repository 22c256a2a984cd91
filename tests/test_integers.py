"""Numbers of the host arrive as they are: no integer is cut to the 32 bits that JAX has for it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedfuse_jax as ff

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
ONES = np.ones(4, np.float32)
PARAMS = np.ones(3, np.float32)
STATE = ff.init_server_state(PARAMS)
CODES = np.arange(12, dtype=np.uint8).reshape(4, 3)
INDICES = np.array([[0, 1, 2]] * 4, np.int32)

# One large number per client, beyond int32 and beyond uint32. All are float32 numbers but the last, which is rounded.
LARGE = [3_000_000_000, 2**32, 2**31, 2**40 + 1]


def private(**options):
    return functools.partial(ff.clipped_noisy_weighted_sum, KEY, X, **options)


def step(update, **fixed):
    return lambda **options: update(PARAMS, STATE, X, **(fixed | options))


SERVER = {
    "fedavgm_weighted_update": (step(ff.fedavgm_weighted_update, learning_rate=0.1), ()),
    "fedadagrad_weighted_update": (step(ff.fedadagrad_weighted_update, learning_rate=0.1), ("tau",)),
    "fedadam_weighted_update": (step(ff.fedadam_weighted_update, learning_rate=0.1), ("tau",)),
    "fedyogi_weighted_update": (step(ff.fedyogi_weighted_update, learning_rate=0.1), ("tau",)),
}
# By operation and argument: a call with one number per client in its place.
VECTORS = {
    ("weighted_sum", "weights"): lambda v: ff.weighted_sum(X, v),
    ("weighted_mean", "weights"): lambda v: ff.weighted_mean(X, v),
    ("multi_krum", "weights"): lambda v: ff.multi_krum(X, 1, 3, weights=v),
    ("geometric_median", "weights"): lambda v: ff.geometric_median(X, v),
    ("clipped_weighted_sum", "weights"): lambda v: ff.clipped_weighted_sum(X, v, 1.0),
    ("noisy_weighted_sum", "weights"): lambda v: ff.noisy_weighted_sum(KEY, X, v, 1.0),
    ("clipped_noisy_weighted_sum", "weights"): lambda v: ff.clipped_noisy_weighted_sum(KEY, X, v, 1.0, 1.0),
    ("adaptive_clip_norm", "norms"): lambda v: ff.adaptive_clip_norm(4e9, v),
    ("topk_sparse_weighted_sum", "weights"): lambda v: ff.topk_sparse_weighted_sum(X, INDICES, v, 3),
    ("quantized_weighted_sum", "scales"): lambda v: ff.quantized_weighted_sum(CODES, v, ONES, ONES),
    ("quantized_weighted_sum", "zero_points"): lambda v: ff.quantized_weighted_sum(CODES, ONES, v, ONES),
    ("quantized_weighted_sum", "weights"): lambda v: ff.quantized_weighted_sum(CODES, ONES, ONES, v),
} | {(name, "weights"): lambda v, call=call: call(weights=v) for name, (call, _) in SERVER.items()}
# A call with one number in its place.
SCALARS = {
    ("accumulate_weighted", "weight"): lambda v: ff.accumulate_weighted(PARAMS, PARAMS, v),
    ("geometric_median", "smoothing"): lambda v: ff.geometric_median(X, smoothing=v),
    ("centered_clipping", "radius"): lambda v: ff.centered_clipping(X * 1e10, PARAMS, v),
    ("clipped_weighted_sum", "max_norm"): lambda v: ff.clipped_weighted_sum(X * 1e10, ONES, v),
    ("noisy_weighted_sum", "stddev"): lambda v: ff.noisy_weighted_sum(KEY, X, ONES, v),
    ("clipped_noisy_weighted_sum", "max_norm"): lambda v: ff.clipped_noisy_weighted_sum(KEY, X * 1e10, ONES, v, 1.0),
    ("clipped_noisy_weighted_sum", "stddev"): lambda v: ff.clipped_noisy_weighted_sum(KEY, X, ONES, 1.0, v),
    ("adaptive_clip_norm", "clip_norm"): lambda v: ff.adaptive_clip_norm(v, ONES),
    ("adaptive_clip_norm", "learning_rate"): lambda v: ff.adaptive_clip_norm(1.0, ONES, learning_rate=v),
    ("adaptive_clip_norm", "count_stddev"): lambda v: ff.adaptive_clip_norm(1.0, ONES, count_stddev=v, key=KEY),
    ("init_server_state", "tau"): lambda v: ff.init_server_state(PARAMS, tau=v),
} | {
    (name, argument): lambda v, call=call, argument=argument: call(**{argument: v})
    for name, (call, more) in SERVER.items()
    for argument in ("learning_rate", *more)
}  # fmt: skip
# A call with a share from 0 to 1 in its place: of integers there are two.
SHARES = {
    ("adaptive_clip_norm", "target_quantile"): lambda v: ff.adaptive_clip_norm(1.0, ONES, target_quantile=v),
    ("fedavgm_weighted_update", "momentum"): lambda v: SERVER["fedavgm_weighted_update"][0](momentum=v),
    ("fedadagrad_weighted_update", "b1"): lambda v: SERVER["fedadagrad_weighted_update"][0](b1=v),
    ("fedadam_weighted_update", "b1"): lambda v: SERVER["fedadam_weighted_update"][0](b1=v),
    ("fedadam_weighted_update", "b2"): lambda v: SERVER["fedadam_weighted_update"][0](b2=v),
    ("fedyogi_weighted_update", "b1"): lambda v: SERVER["fedyogi_weighted_update"][0](b1=v),
    ("fedyogi_weighted_update", "b2"): lambda v: SERVER["fedyogi_weighted_update"][0](b2=v),
    ("trimmed_mean", "trim_fraction"): lambda v: ff.trimmed_mean(X, trim_fraction=v),
}
# A call with an integer in its place, which kernels, or JAX, hold in an int32.
COUNTS = {
    ("trimmed_mean", "trim_count"): lambda v: ff.trimmed_mean(X, v),
    ("mean_around_median", "num_byzantine"): lambda v: ff.mean_around_median(X, v),
    ("krum_scores", "num_byzantine"): lambda v: ff.krum_scores(np.ones((4, 4), np.float32), v),
    ("krum_scores", "num_neighbors"): lambda v: ff.krum_scores(np.ones((4, 4), np.float32), 1, num_neighbors=v),
    ("krum", "num_byzantine"): lambda v: ff.krum(X, v),
    ("multi_krum", "num_byzantine"): lambda v: ff.multi_krum(X, v),
    ("multi_krum", "num_selected"): lambda v: ff.multi_krum(X, 1, v),
    ("bulyan", "num_byzantine"): lambda v: ff.bulyan(X, v),
    ("nearest_neighbor_mixing", "num_byzantine"): lambda v: ff.nearest_neighbor_mixing(X, v),
    ("bucketing", "bucket_size"): lambda v: ff.bucketing(KEY, X, v),
    ("geometric_median", "num_iterations"): lambda v: ff.geometric_median(X, num_iterations=v),
    ("centered_clipping", "num_iterations"): lambda v: ff.centered_clipping(X, PARAMS, 1.0, num_iterations=v),
    ("topk_sparse_weighted_sum", "num_params"): lambda v: ff.topk_sparse_weighted_sum(X, INDICES, ONES, v),
    ("topk_sparsify", "k"): lambda v: ff.topk_sparsify(PARAMS, v),
    ("quantized_weighted_sum", "num_bits"): lambda v: ff.quantized_weighted_sum(CODES, ONES, ONES, ONES, num_bits=v),
    ("quantized_weighted_sum", "num_params"): lambda v: ff.quantized_weighted_sum(
        CODES, ONES, ONES, ONES, num_params=v
    ),
    ("quantized_weighted_sum", "block_size"): lambda v: ff.quantized_weighted_sum(
        CODES, ONES[:, None], ONES[:, None], ONES, block_size=v
    ),
    ("quantize", "num_bits"): lambda v: ff.quantize(PARAMS, num_bits=v),
    ("quantize", "block_size"): lambda v: ff.quantize(PARAMS, block_size=v),
}
NUMERIC = {*VECTORS, *SCALARS, *SHARES, *COUNTS}
# Arguments that are trees of floating arrays, truth values, names, or in a test of their own below.
OTHERS = {
    "updates", "update", "total", "params", "state", "center", "like", "rotated", "residual", "values", "where", "key",
    "out_dtype", "axis_name", "return_norms", "distances", "codes", "indices",
}  # fmt: skip


def test_every_argument_of_every_operation_is_here():
    tables = {"ServerState", "reference", "show_versions", "export_checks"}
    for name in sorted(set(ff.__all__) - tables):
        arguments = set(inspect.signature(getattr(ff, name)).parameters) - OTHERS
        assert arguments == {argument for operation, argument in NUMERIC if operation == name}, name


def assert_same(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def compare(call, value, as_float):
    """Eagerly and as a constant of a compiled program."""
    wanted = call(as_float)
    assert_same(call(value), wanted)
    assert_same(jax.jit(lambda: call(value))(), jax.jit(lambda: call(as_float))())


VECTOR_FORMS = {
    "list": list,
    "tuple": tuple,
    "int64": lambda v: np.array(v, np.int64),
    "uint64": lambda v: np.array(v, np.uint64),
    "float64": lambda v: np.array(v, np.float64),
    "list of int64": lambda v: [np.int64(x) for x in v],
    "list of uint64": lambda v: [np.uint64(x) for x in v],
    "list with an array of JAX's": lambda v: [jnp.float32(v[0]), *v[1:]],
    "objects": lambda v: np.array(v, object),
}


@pytest.mark.parametrize("place", VECTORS, ids="-".join)
@pytest.mark.parametrize("form", VECTOR_FORMS)
def test_one_number_per_client(place, form):
    compare(VECTORS[place], VECTOR_FORMS[form](LARGE), np.array(LARGE, np.float32))


SCALAR_FORMS = {
    "int": int, "int64": np.int64, "uint64": np.uint64, "float": float, "float64": np.float64, "array": np.array,
}  # fmt: skip


@pytest.mark.parametrize("place", SCALARS, ids="-".join)
@pytest.mark.parametrize("form", SCALAR_FORMS)
def test_one_number(place, form):
    for number in (3_000_000_000, 2**32):
        compare(SCALARS[place], SCALAR_FORMS[form](number), jnp.float32(number))


@pytest.mark.parametrize("place", SHARES, ids="-".join)
def test_shares(place):
    operation, argument = place
    numbers = [0] if argument == "trim_fraction" else [0, 1]
    for form in (int, np.int64, np.uint64, np.float64):
        for number in numbers:
            assert_same(SHARES[place](form(number)), SHARES[place](float(number)))
        for number in (2**32, 2**32 + 1, 2**63 - 1):
            with pytest.raises(ValueError, match=f"^{operation}: {argument} is .*; it needs to be "):
                SHARES[place](form(number))


@pytest.mark.parametrize("place", COUNTS, ids="-".join)
@pytest.mark.parametrize("number", [2**31, 2**32 + 1, 2**33 + 8, 10**30])
def test_counts(place, number):
    """One that cannot be meant is refused in words of ours."""
    operation, argument = place
    for form in (int, np.int64, np.uint64) if number < 2**63 else (int,):
        with pytest.raises(ValueError, match=f"^{operation}: {argument} is {number}; it needs to be "):
            COUNTS[place](form(number))


@pytest.mark.parametrize("place", [*SCALARS, *VECTORS], ids="-".join)
def test_integers_beyond_all_floats_are_refused(place):
    operation, argument = place
    value = 10**400 if place in SCALARS else [1, 1, 1, 10**400]
    call = SCALARS.get(place) or VECTORS[place]
    with pytest.raises(ValueError, match=f"^{operation}: {argument} holds an integer beyond the range of float64"):
        call(value)


@pytest.mark.parametrize("place", SCALARS, ids="-".join)
def test_integers_beyond_64_bits_are_the_floats_they_are(place):
    for number in (2**64, 10**30, 10**39):  # the last one is infinite in float32
        compare(SCALARS[place], number, float(number))


def test_rounding_once():
    """What is nearest in float32, not nearest to what is nearest in something between."""
    for number in (2**24 + 1, 2**24 + 3, 2**53 - 1, 2**62 + 2**38 + 1):
        got = ff.accumulate_weighted(jnp.float32(0), jnp.float32(1), number)
        assert got == np.int64(number).astype(np.float32)
    assert ff.accumulate_weighted(jnp.float32(0), jnp.float32(1), np.float64(0.1)) == np.float32(0.1)


def test_float64_keeps_all_digits():
    with jax.enable_x64():
        x = np.array([[1.0], [0.0]])
        assert ff.weighted_sum(x, [2**52 + 1, 0]).tolist() == [2.0**52 + 1]
        assert ff.weighted_sum(x, [2**64, 0]).tolist() == [2.0**64]
        assert ff.quantized_weighted_sum(np.array([[1]], np.uint8), [2**40 + 1], [0], [1.0]).dtype == np.float32


def test_weights_that_were_cut():
    updates = jnp.array([[0.0], [1.0]])
    assert ff.weighted_mean(updates, np.array([3_000_000_000, 1_000_000_000])).tolist() == [0.25]
    assert ff.weighted_mean(updates, [2**32, 2**32]).tolist() == [0.5]


@pytest.mark.parametrize("form", [np.array, list, lambda v: np.array(v, np.uint64)], ids=["int64", "list", "uint64"])
def test_indices(form):
    """One beyond int32 is out of range, and so ignored with its value."""
    indices = form([[0, 2**32], [2**32 + 1, 2], [2**31, 2**40]])
    got = ff.topk_sparse_weighted_sum(np.ones((3, 2), np.float32), indices, [1.0, 1.0, 1.0], 4)
    assert got.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_indices_beyond_64_bits():
    got = ff.topk_sparse_weighted_sum([[1.0, 2.0]], [[1, 10**30]], [1.0], 2)
    assert got.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, -(2**32) + 1, 2**63 - 1])
def test_a_trim_count_in_an_array_leaves_nobody(number):
    assert np.isnan(ff.trimmed_mean(X, np.array(number))).all()


@pytest.mark.parametrize("codes", [[[256, 1, 2]] * 4, np.full((4, 3), 2**32), np.full((4, 3), 2**32 + 1, np.uint64)])
def test_codes_of_other_widths_are_refused(codes):
    with pytest.raises(TypeError, match=r"^quantized_weighted_sum: codes has dtype u?int64; it needs uint8 or int8"):
        ff.quantized_weighted_sum(codes, ONES, ONES, ONES)


@pytest.mark.parametrize("leaf", [2**32, 10**30, np.int64(2**32), np.array([2**40] * 4)])
def test_integer_leaves_are_refused(leaf):
    with pytest.raises(TypeError, match=r"^weighted_mean: updates\['w'\] has dtype .*; it needs floating-point"):
        ff.weighted_mean({"w": leaf})


def test_the_step_of_a_state():
    for form in (int, np.int64, np.uint64, np.int32):
        _, state = ff.fedadam_weighted_update(PARAMS, STATE._replace(step=form(7)), X, learning_rate=0.1)
        assert state.step.dtype == np.int32
        assert state.step == 8
    for number in (2**32, np.int64(2**32 + 1), 10**30):
        with pytest.raises(ValueError, match=r"^fedadam_weighted_update: state.step is \d+; it needs an int32 scalar"):
            ff.fedadam_weighted_update(PARAMS, STATE._replace(step=number), X, learning_rate=0.1)
