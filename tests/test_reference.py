"""The definitions against the oracle, on whatever hypothesis thinks of; and against SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from operations import CASES, Problem, to_jax

import fedfuse_jax as ff
from fedfuse_jax import _native, reference

# The definitions run op by op here, or compiled once a shape: few shapes, many values.
thorough = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

SHAPES = ((1, 3), (2, 3), (5, 3), (6, 1))
# Without subnormal numbers, which XLA flushes to zero on a CPU.
any_float = st.floats(width=32, allow_subnormal=False)
few_floats = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan"), 3e38, -3e38])


@st.composite
def clients(draw, numbers=any_float | few_floats):
    shape = draw(st.sampled_from(SHAPES))
    updates = draw(hnp.arrays(np.float32, shape, elements=numbers))
    signs = draw(hnp.arrays(bool, shape))
    updates = np.where(np.isnan(updates) & signs, np.copysign(np.float32("nan"), np.float32(-1)), updates)
    where = draw(hnp.arrays(bool, shape[0]))
    return updates, where


jitted = functools.cache(lambda function, **options: jax.jit(functools.partial(function, **options)))


@thorough
@given(clients())
def test_median_of_anything(case):
    updates, where = case
    oracle.assert_matches(jitted(reference.coordinate_median)(updates), oracle.coordinate_median(updates))
    got = jitted(reference.coordinate_median)(updates, where=where)
    oracle.assert_matches(got, oracle.coordinate_median(updates, where))


@thorough
@given(clients(), st.integers(-1, 4))
def test_trimmed_mean_of_anything(case, trim_count):
    updates, where = case
    got = jitted(reference.trimmed_mean)(updates, np.int32(trim_count), where=where)
    oracle.assert_matches(got, oracle.trimmed_mean(updates, trim_count, where=where))


# Sums that overflow on the way depend on the order, which a definition leaves open: numbers to 1e30.
in_range = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
moderate = st.one_of(in_range, st.sampled_from([float("nan"), float("inf"), -float("inf")]))


@thorough
@given(clients(moderate), st.integers(0, 9))
def test_sums_of_anything(case, seed):
    updates, where = case
    weights = np.random.default_rng(seed).integers(-2, 4, len(updates))
    got = jitted(reference.weighted_sum)(updates, weights, where=where)
    oracle.assert_matches(got, oracle.weighted_sum(updates, weights, where))


@thorough
@given(clients())
def test_finite_clients_of_anything(case):
    updates, _ = case
    oracle.assert_matches(jitted(reference.finite_clients)(updates), oracle.finite_clients(updates))


@thorough
@given(clients(), st.integers(-1, 4))
def test_selection_of_anything(case, trim_count):
    """Who is selected, by rank and then by index, wherever values tie."""
    updates, where = case
    cotangent = np.arange(1, updates.shape[1] + 1, dtype=np.float32)
    got = jitted(reference.spread_to_selected)(updates, cotangent, np.int32(trim_count), where=where)
    oracle.assert_matches(got, oracle.spread_to_selected(updates, cotangent, trim_count, where))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("values", ["normal", "tied", "wild"])
def test_definitions(case, values):
    """Each definition by itself, kernels or no kernels."""
    arguments = case.sample(Problem(values=values, n_clients=6))
    got = jax.jit(case.definition)(*to_jax(arguments))
    expected = case.expect(*arguments)
    if not case.row.coordinate_wise and case.row.collectives:
        # It sums 13 products in float32, where a kernel uses float64.
        expected = jax.tree.map(
            lambda leaf: leaf._replace(roundings=leaf.roundings and leaf.roundings + 16),
            expected,
            is_leaf=oracle.is_expected,
        )
    oracle.assert_matches(got, expected, str(case))


# --- How many are trimmed ---------------------------------------------------------------------------------------

FRACTIONS = (0.0, 0.1, 0.2, 0.25, 0.29, 0.3, 1 / 3, 0.4, 0.45, 0.49, 0.4999)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_trim_counts_are_python_s(fraction):
    """Python's own `int(f * m)`, whose float64 product is what SciPy and Flower compute: int(0.29 * 100) is 28."""
    counts = reference.trim_counts(fraction, 200)
    assert counts.tolist() == [int(fraction * m) for m in range(201)]


def test_the_famous_28():
    updates = np.arange(100, dtype=np.float32)[:, None] ** 2
    assert reference.trim_counts(0.29, 100)[100] == 28
    wanted = scipy.stats.trim_mean(updates.astype(np.float64), 0.29)
    np.testing.assert_allclose(ff.trimmed_mean(updates, trim_fraction=0.29), wanted, rtol=1e-6)
    assert abs(np.float32(0.29) * np.float32(100) - 29) < 1e-5  # what float32 would have made of it


@pytest.mark.parametrize("fraction", [np.float16(0.1), np.float32(0.29), np.float64(0.29)])
def test_a_numpy_fraction_is_multiplied_in_its_own_precision(fraction):
    """As SciPy does: float32(0.29) * 100 is 29. Nor may it matter whether `where` names everybody."""
    updates = np.arange(100, dtype=np.float32)[:, None] ** 2
    wanted = scipy.stats.trim_mean(updates.astype(np.float64), fraction)
    for where in (None, np.ones(100, bool)):
        np.testing.assert_allclose(ff.trimmed_mean(updates, trim_fraction=fraction, where=where), wanted, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.29, 0.45])
def test_scipy_agrees_for_every_number_of_participants(fraction):
    """All m up to 200 with one compiled program: m is traced. 1e-5: 200 roundings of 6e-8 at most."""
    n_clients = 200
    updates = np.random.default_rng(1).standard_normal((n_clients, 2)).astype(np.float32)
    call = jax.jit(functools.partial(ff.trimmed_mean, trim_fraction=fraction))
    for m in range(1, n_clients + 1):
        got = call(updates, where=np.arange(n_clients) < m)
        wanted = scipy.stats.trim_mean(updates[:m].astype(np.float64), fraction)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=str(m))


@pytest.mark.parametrize("n_clients", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.45])
def test_scipy_agrees_with_static_counts(n_clients, fraction):
    updates = np.random.default_rng(2).standard_normal((n_clients, 4)).astype(np.float32)
    wanted = scipy.stats.trim_mean(updates.astype(np.float64), fraction)
    np.testing.assert_allclose(ff.trimmed_mean(updates, trim_fraction=fraction), wanted, rtol=1e-5, atol=1e-5)


# --- Many coordinates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_many_coordinates_keep_their_digits(dtype):
    """A float32 running sum of a million ones-and-a-bit squared would lose five digits."""
    size = 3_000_017
    updates = jnp.full((1, size), 1.01, dtype)
    wanted = size * float(updates[0, 0]) ** 2
    # The kernel adds in float64 and rounds once. The definition sums blocks of 512 in float32, so 3 · 512 roundings of
    # 6e-8 at the very most; in fact far fewer.
    rtol = 1e-7 if _native.has_kernel("squared_norms", "cpu") else 2e-5
    np.testing.assert_allclose(jax.jit(ff.squared_norms)(updates)[0], wanted, rtol=rtol)
