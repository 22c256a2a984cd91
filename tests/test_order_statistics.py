"""Medians and trimmed means of any number of clients: every kernel path there is, against the oracle.

Paths change with the number of clients (networks of many sizes, then radix selection), with the trim (the default
fraction has networks of its own) and with whether trim and participation are known to the compiler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from operations import numbers
from tiers import by_id, checkerboard

import fedfuse_jax as ff

N_CLIENTS = (1, 2, 3, 5, 8, 10, 31, 32, 33, 64, 96, 100, 128, 129, 160, 161, 192, 193, 200, 1000)
SIZE = 70  # a whole vector of any kind and a rest of one


def updates_of(n_clients, dtype, kinds=("normal", "tied", "wild", "huge")):
    """Columns of every kind of number side by side."""
    generator = np.random.default_rng(n_clients)
    columns = [numbers(kind, generator, (n_clients, SIZE // len(kinds) + 1), jnp.dtype(dtype)) for kind in kinds]
    return np.concatenate(columns, axis=1)[:, :SIZE]


def trims_of(n_clients):
    generator = np.random.default_rng(n_clients)
    most = (n_clients - 1) // 2
    return sorted({0, most, int(0.2 * n_clients), *generator.integers(0, most + 1, 2).tolist()})


def check_static(n_clients, dtype):
    updates = updates_of(n_clients, dtype)
    oracle.assert_matches(jax.jit(ff.coordinate_median)(updates), oracle.coordinate_median(updates))
    oracle.assert_matches(jax.jit(ff.trimmed_mean)(updates), oracle.trimmed_mean(updates))
    for trim in trims_of(n_clients):
        got = jax.jit(functools.partial(ff.trimmed_mean, trim_count=trim))(updates)
        oracle.assert_matches(got, oracle.trimmed_mean(updates, trim), f"trim {trim}")


def check_traced(n_clients, dtype):
    """One program for all trims and all participations."""
    updates, generator = updates_of(n_clients, dtype), np.random.default_rng(n_clients)
    median, trimmed = jax.jit(ff.coordinate_median), jax.jit(ff.trimmed_mean)
    for trim in trims_of(n_clients):
        oracle.assert_matches(trimmed(updates, np.int32(trim)), oracle.trimmed_mean(updates, trim), f"trim {trim}")
    for share in (0.1, 0.5, 0.9):
        where = generator.random(n_clients) < share
        oracle.assert_matches(median(updates, where=where), oracle.coordinate_median(updates, where), "median")
        trim = int(generator.integers(0, max(1, where.sum() // 2 + 1)))
        got = trimmed(updates, np.int32(trim), where=where)
        wanted = oracle.trimmed_mean(updates, trim, where=where)
        oracle.assert_matches(got, wanted, f"{where.sum()} take part, trim {trim}")


@pytest.mark.parametrize("n_clients", N_CLIENTS)
def test_float32_static(n_clients):
    check_static(n_clients, "float32")


@pytest.mark.parametrize("n_clients", N_CLIENTS)
def test_float32_traced(n_clients):
    check_traced(n_clients, "float32")


@pytest.mark.parametrize("n_clients", [3, 10, 33, 100, 129, 200])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype, n_clients):
    with jax.enable_x64(dtype == "float64"):
        check_static(n_clients, dtype)
        check_traced(n_clients, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("n_clients", [*range(1, 201), 255, 256, 257, 3000])
def test_every_number_of_clients(n_clients, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_static(n_clients, dtype)
        check_traced(n_clients, dtype)


@pytest.mark.parametrize("n_clients", [4, 9, 32, 130, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_follow_the_selected_client(n_clients, dtype):
    """At ties the smaller value, then the lower index; NaN counts as the greatest; the others get exactly 0."""
    updates = updates_of(n_clients, dtype, ("tied", "wild"))
    cotangents = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    where = np.arange(n_clients) % 3 != 1

    def pull_back(function, updates):
        return jax.vjp(function, updates)[1](cotangents)[0]

    median = (int(n_clients) - 1) // 2
    got = jax.jit(functools.partial(pull_back, ff.coordinate_median))(updates)
    oracle.assert_matches(got, oracle.spread_to_selected(updates, cotangents, median))
    trimmed = functools.partial(ff.trimmed_mean, trim_count=1, where=where)
    got = jax.jit(functools.partial(pull_back, trimmed))(updates)
    oracle.assert_matches(got, oracle.spread_to_selected(updates, cotangents, 1, where))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_clients", [5, 7, 129, 201])
def test_selection_is_exact_to_the_bit(n_clients, dtype):
    """An odd count's median is one of the values, whichever values those are: every bit pattern but NaN's."""
    bits = np.random.default_rng(n_clients).integers(0, 2 ** (8 * jnp.dtype(dtype).itemsize), (n_clients, 4000))
    updates = bits.astype(f"uint{8 * jnp.dtype(dtype).itemsize}").view(jnp.dtype(dtype))
    widened = oracle.widened(updates)
    normal = np.isnan(widened) | (np.abs(widened) >= float(jnp.finfo(np.float32).tiny))
    updates = np.where(normal, updates, np.ones((), updates.dtype))  # XLA flushes subnormal float32 to zero
    got = np.asarray(jax.jit(functools.partial(ff.coordinate_median, out_dtype=dtype))(updates))
    np.testing.assert_array_equal(oracle.widened(got), np.sort(oracle.widened(updates), axis=0)[n_clients // 2])


def test_a_robust_rule_bears_what_it_can():
    """A minority of NaN clients moves no median beyond the honest values; a majority makes it NaN."""
    honest = np.random.default_rng(0).standard_normal((5, 20)).astype(np.float32)
    for bad, survives in ((1, True), (4, True), (5, False), (6, False)):
        for sign in (1.0, -1.0):
            poison = np.full((bad, 20), np.copysign(np.nan, sign), np.float32)
            median = np.asarray(ff.coordinate_median(np.concatenate([poison, honest])))
            assert np.isfinite(median).all() == survives, bad
            if survives:
                assert (honest.min(0) <= median).all()
                assert (median <= honest.max(0)).all()


@pytest.mark.parametrize("size", [1, 64, 1024, 4096, 8192])
def test_row_strides_of_a_power_of_two(size):
    """Rows whose distance in memory is a multiple of a page, and what lies around them."""
    updates = np.random.default_rng(size).standard_normal((33, size)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(ff.coordinate_median)(updates), np.sort(updates, axis=0)[16])


@checkerboard(present={str(count): count for count in (200, 130, 100)}, dtype=by_id(["float32", "float16"]))
def test_many_rows_a_large_power_of_two_apart(dtype, present):
    """Such rows are copied to where caches have room for them, and give the same bits as rows that are not."""
    size = 2**18 // np.dtype(dtype).itemsize
    updates = np.random.default_rng(size).standard_normal((200, size)).astype(dtype)
    where = np.arange(200) < present
    apart = np.pad(updates, ((0, 0), (0, 96)))
    for rule in (ff.coordinate_median, ff.trimmed_mean):

        def mean_and_derivative(rows, rule=rule):
            return jax.jvp(functools.partial(rule, where=where), (rows,), (rows,))

        def gradient(rows, rule=rule):
            return jax.grad(lambda rows: rule(rows, where=where)[:size].sum())(rows)

        for function in (mean_and_derivative, gradient):
            results = [jax.tree.leaves(function(rows)) for rows in (updates, apart)]
            for together, padded in zip(*results, strict=True):
                assert np.asarray(together).tobytes() == np.asarray(padded)[..., :size].tobytes()
