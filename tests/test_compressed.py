"""Sparse and quantised updates: what the battery does not know of them."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from operations import has_kernel
from test_battery import assert_close, assert_same_bits

import fedfuse_jax as ff
from fedfuse_jax import reference

# --- Sparse sums ------------------------------------------------------------------------------------------------


def sparse_problem(seed, n_clients, k, num_params, arrange):
    generator = np.random.default_rng(seed)
    indices = generator.integers(-2, num_params + 2, (n_clients, k)).astype(np.int32)
    if arrange == "sorted":
        indices.sort(axis=1)
    elif arrange == "padded":
        indices.sort(axis=1)
        indices[:, k // 2 :] = -1
    elif arrange == "one place":
        indices[:] = num_params // 2
    elif arrange == "almost sorted" and k > 0:
        indices.sort(axis=1)
        indices[:, [0, -1]] = indices[:, [-1, 0]]
    values = generator.standard_normal((n_clients, k)).astype(np.float32)
    return values, indices, generator.uniform(0.5, 2, n_clients).astype(np.float32)


ARRANGEMENTS = ("any", "sorted", "padded", "one place", "almost sorted")


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize(
    ("k", "num_params"), [(1, 1), (7, 5), (300, 1), (50, 40_000), (9000, 3000), (5000, 2_200_000), (0, 9)]
)
def test_sparse_sum_of_many_sizes(arrange, k, num_params):
    """From one tile to dozens, every coordinate of some; the greatest has tiles of the greatest width."""
    values, indices, weights = sparse_problem(k, 3, k, num_params, arrange)
    got = ff.topk_sparse_weighted_sum(values, indices, weights, num_params)
    oracle.assert_matches(got, oracle.topk_sparse_weighted_sum(values, indices, weights, num_params))


def test_sparse_sum_into_nothing():
    assert ff.topk_sparse_weighted_sum(np.ones((2, 3), np.float32), np.zeros((2, 3), int), np.ones(2), 0).shape == (0,)


@pytest.mark.skipif(not has_kernel("topk_sparse_weighted_sum"), reason="promised of the kernel")
@pytest.mark.parametrize("spread", [1, 50_000], ids=["a cache full", "more"])
def test_the_order_of_addition_is_client_after_client_then_position(spread):
    """To the bit what a loop gives, whether rows are sorted or not."""
    values, indices, weights = sparse_problem(1, 6, 400, 50, "any")
    indices, num_params = indices * spread, 50 * spread
    wanted = np.zeros(num_params, np.float32)
    for client in range(6):
        for value, index in zip(values[client], indices[client], strict=True):
            if 0 <= index < num_params:
                wanted[index] += weights[client] * value
    got = ff.topk_sparse_weighted_sum(values, indices, weights, num_params)
    assert np.asarray(got).tobytes() == wanted.tobytes()
    order = np.argsort(indices, axis=1, kind="stable")
    by_index = [np.take_along_axis(x, order, 1) for x in (values, indices)]
    assert_same_bits(ff.topk_sparse_weighted_sum(*by_index, weights, num_params), got)


@pytest.mark.skipif(not has_kernel("topk_sparse_weighted_sum"), reason="promised of the kernel")
@pytest.mark.parametrize("num_params", [40_000, 3_000_000])
def test_a_last_index_out_of_order_is_added_in_its_client_s_turn(num_params):
    """(1 + 1e8) - 1e8 is 0 in float32; were the 1 added with its neighbours, after the rest, it would be 1."""
    middle, last = num_params // 2, num_params * 3 // 4
    indices = np.array([[middle, last, 5], [5, middle, last], [5, middle, last]], np.int32)
    values = np.array([[0, 0, 1], [1e8, 0, 0], [-1e8, 0, 0]], np.float32)
    assert ff.topk_sparse_weighted_sum(values, indices, np.ones(3, np.float32), num_params)[5] == 0


def added_in_order(values, indices, weights, num_params):
    total = np.zeros(num_params, np.float32)
    for own, at, weight in zip(values, indices, weights, strict=True):
        inside = (at >= 0) & (at < num_params)
        np.add.at(total, at[inside], weight * own[inside])
    return total


@pytest.mark.skipif(not has_kernel("topk_sparse_weighted_sum"), reason="promised of the kernel")
@pytest.mark.parametrize("num_params", [40_000, 3_000_000])
def test_rows_that_are_almost_sorted(num_params):
    """One index of one client out of order: at an end, among those out of range, beside a tile's end, anywhere."""
    generator = np.random.default_rng(num_params)
    k, limits = 3000, np.iinfo(np.int32)
    total_of = jax.jit(ff.topk_sparse_weighted_sum, static_argnums=3)
    for attempt in range(70):
        values, indices, weights = sparse_problem(attempt, 3, k, num_params, "sorted")
        indices[:, :300], indices[:, -300:] = -1, num_params
        client, outside = generator.integers(3), generator.integers(300)
        tile_end = generator.integers(num_params >> 11) << 11
        border = np.searchsorted(indices[client], tile_end)
        at = (0, k - 1, border - 1, border, generator.integers(k), outside, k - 1 - outside)[attempt % 7]
        stray = (-1, 0, tile_end, tile_end - 1, num_params - 1, num_params, limits.min, limits.max)
        indices[client, at] = generator.choice(stray)
        wanted = added_in_order(values, indices, weights, num_params)
        assert np.asarray(total_of(values, indices, weights, num_params)).tobytes() == wanted.tobytes(), attempt


@pytest.mark.skipif(not has_kernel("topk_sparse_weighted_sum"), reason="promised of the kernel")
@pytest.mark.parametrize("num_params", [40_000, 3_000_000])
def test_a_client_out_of_order_among_others(num_params):
    """One that is absent does not matter; one of one sum in a batch has all of them right."""
    values, indices, weights = sparse_problem(2, 4, 2000, num_params, "sorted")
    shuffled = indices.copy()
    np.random.default_rng(0).shuffle(shuffled[2])
    wanted = added_in_order(values, shuffled, weights, num_params)
    assert np.asarray(ff.topk_sparse_weighted_sum(values, shuffled, weights, num_params)).tobytes() == wanted.tobytes()
    where = np.array([True, True, False, True])
    masked = ff.topk_sparse_weighted_sum(values, shuffled, weights, num_params, where=where)
    assert (
        np.asarray(masked).tobytes()
        == added_in_order(values[where], shuffled[where], weights[where], num_params).tobytes()
    )
    both = jax.vmap(lambda at: ff.topk_sparse_weighted_sum(values, at, weights, num_params))(
        jnp.stack([indices, shuffled])
    )
    assert np.asarray(both[0]).tobytes() == added_in_order(values, indices, weights, num_params).tobytes()
    assert np.asarray(both[1]).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_indices_of_any_integer_dtype(dtype):
    """What int32 cannot hold is out of range, not another index."""
    limits = np.iinfo(dtype)
    indices = np.array([[0, 3, limits.max, limits.min], [3, 3, limits.max - 1, limits.max // 2 + 3]], dtype)
    values = np.array([[1, 2, 4, 8], [16, 32, 64, 128]], np.float32)
    wanted = [1.0 + (8.0 if limits.min == 0 else 0.0), 0.0, 0.0, 50.0, 0.0]
    for given in (indices, indices.tolist() if dtype not in ("int64", "uint64", "uint32") else indices):
        assert ff.topk_sparse_weighted_sum(values, given, np.ones(2), 5).tolist() == wanted
    with jax.enable_x64():
        assert jax.jit(ff.topk_sparse_weighted_sum, static_argnums=3)(values, indices, np.ones(2), 5).tolist() == wanted


def test_what_is_not_finite_stays_in_its_place():
    values = np.array([[np.nan, 1.0, np.inf], [2.0, -np.inf, 3.0]], np.float32)
    indices = np.array([[0, 1, 2], [1, 2, -1]])
    got = np.asarray(ff.topk_sparse_weighted_sum(values, indices, np.ones(2), 4))
    np.testing.assert_array_equal(got, [np.nan, 3.0, np.nan, 0.0])
    np.testing.assert_array_equal(
        ff.topk_sparse_weighted_sum(values, indices, np.ones(2), 4, where=np.array([False, True])),
        [0.0, 2.0, -np.inf, 0.0],
    )


# --- Top-k ------------------------------------------------------------------------------------------------------


def test_topk_sparsify_by_hand():
    values, indices, residual = ff.topk_sparsify(jnp.array([[3.0, -4.0], [4.0, 1.0]]), 2)
    assert (values.tolist(), indices.tolist(), indices.dtype) == ([-4.0, 4.0], [1, 2], np.int32)
    assert residual.tolist() == [[3.0, 0.0], [0.0, 1.0]]


def test_topk_sparsify_ties_and_nan():
    """Ties go to the lower index; NaN of either sign is the greatest; the two zeros are alike."""
    update = np.array([1.0, np.inf, np.nan, -1.0, np.copysign(np.nan, -1), -0.0, 0.0, 1.0], np.float32)
    for k, wanted in enumerate([[], [2], [2, 4], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]):
        assert ff.topk_sparsify(update, k)[1].tolist() == wanted
    assert ff.topk_sparsify(update, 7)[1].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert np.isfinite(ff.topk_sparsify(update, 3)[2]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("size", [1, 33, 1000])
def test_topk_sparsify_against_a_stable_sort(size, dtype):
    with jax.enable_x64(dtype == "float64"):
        generator = np.random.default_rng(size)
        update = jnp.asarray(generator.integers(-9, 9, size) * 0.25, dtype)
        accumulator = np.float64 if dtype == "float64" else np.float32
        old = jnp.asarray(generator.integers(-9, 9, size) * 0.25, accumulator)
        for k in sorted({0, 1, size // 3, size}):
            values, indices, residual = jax.jit(ff.topk_sparsify, static_argnums=1)(update, k, old)
            total = np.asarray(update, accumulator) + np.asarray(old)
            wanted = np.sort(np.argsort(-np.abs(total), kind="stable")[:k])
            assert indices.tolist() == wanted.tolist()
            assert values.dtype == residual.dtype == accumulator
            assert values.tolist() == total[wanted].tolist()
            total[wanted] = 0
            assert residual.tolist() == total.tolist()


def test_a_tree_is_one_vector():
    generator = np.random.default_rng(0)
    tree = {"b": generator.standard_normal((2, 3)).astype(np.float32), "a": jnp.bfloat16(1.5)}
    flat = np.concatenate([[1.5], tree["b"].ravel()]).astype(np.float32)
    values, indices, residual = ff.topk_sparsify(tree, 3)
    wanted = ff.topk_sparsify(flat, 3)
    assert (values.tolist(), indices.tolist()) == (wanted[0].tolist(), wanted[1].tolist())
    assert {name: leaf.shape for name, leaf in residual.items()} == {"a": (), "b": (2, 3)}
    assert residual["b"].ravel().tolist() == wanted[2][1:].tolist()
    assert_same_bits(ff.quantize(tree), ff.quantize(flat))


def test_clients_sparsify_and_the_server_sums():
    """In the end everything arrives: what error feedback holds back comes later."""
    generator = np.random.default_rng(3)
    n_clients, size, k = 4, 50, 10
    updates = generator.standard_normal((n_clients, size)).astype(np.float32)
    weights = generator.uniform(1, 2, n_clients).astype(np.float32)
    residual, total = np.zeros_like(updates), np.zeros(size, np.float32)
    sparsify = jax.jit(jax.vmap(functools.partial(ff.topk_sparsify, k=k)))
    for round_number in range(5):
        sent = updates if round_number == 0 else np.zeros_like(updates)
        values, indices, residual = sparsify(sent, residual=residual)
        total += ff.topk_sparse_weighted_sum(values, indices, weights, size)
    assert not np.any(residual)
    np.testing.assert_allclose(total, weights @ updates, rtol=1e-5, atol=1e-5)


def test_topk_sparsify_is_differentiable_where_it_chooses():
    update, old = jnp.array([1.0, -3.0, 2.0]), jnp.array([0.0, 0.0, 2.0])
    loss = lambda x, r: jnp.sum(ff.topk_sparsify(x, 1, r)[0] ** 2)  # noqa: E731
    assert [g.tolist() for g in jax.grad(loss, (0, 1))(update, old)] == [[0, 0, 8], [0, 0, 8]]


# --- Quantised sums ---------------------------------------------------------------------------------------------


def quantized_problem(seed, n_clients, num_params, num_bits, block_size, dtype="uint8", floats=np.float32):
    generator = np.random.default_rng(seed)
    num_bytes = num_params if num_bits == 8 else -(-num_params // 2)
    codes = generator.integers(0, 256, (n_clients, num_bytes), np.uint8).view(dtype)
    shape = (n_clients,) if block_size is None else (n_clients, -(-num_params // block_size))
    scales = generator.uniform(0.5, 2, shape).astype(floats)
    zero_points = generator.integers(-9, 9, shape).astype(floats)
    weights = generator.uniform(-1, 2, n_clients).astype(floats)
    where = np.arange(n_clients) % 3 != 1
    options = {"num_bits": num_bits, "num_params": num_params, "block_size": block_size}
    return (codes, scales, zero_points, weights), where, options


LAYOUTS = [
    (num_params, num_bits, block_size, dtype)
    for num_params, block_size in [
        (1, None), (37, None), (64, None), (48, 16), (48, 8), (50, 16), (33, 7), (21, 1), (20, 100), (9000, 4500),
        (9001, 3000), (1000, 131), (10_000, 32), (0, None), (0, 4),
    ]
    for num_bits in (8, 4)
    for dtype in ("uint8", "int8")
]  # fmt: skip
# Of each size the quick tier takes both numbers of bits and both dtypes, as two layouts of four.
every_layout = pytest.mark.parametrize(
    ("num_params", "num_bits", "block_size", "dtype"),
    [
        pytest.param(*layout, marks=[pytest.mark.full] if (i // 4 + i % 4 // 2 + i % 2) % 2 else [])
        for i, layout in enumerate(LAYOUTS)
    ],
)


@every_layout
def test_quantized_sum_of_every_layout(num_params, num_bits, block_size, dtype):
    for n_clients in (1, 3, 9, 17):
        values, where, options = quantized_problem(1, n_clients, num_params, num_bits, block_size, dtype)
        wanted = oracle.quantized_weighted_sum(*values, **options)
        oracle.assert_matches(ff.quantized_weighted_sum(*values, **options), wanted)
        oracle.assert_matches(jax.jit(functools.partial(reference.quantized_weighted_sum, **options))(*values), wanted)
    wanted = oracle.quantized_weighted_sum(*values, **options, where=where)
    oracle.assert_matches(ff.quantized_weighted_sum(*values, **options, where=where), wanted)


FEW_LAYOUTS = [(12, 8, 4, "uint8"), (12, 4, 4, "int8"), (13, 8, 5, "int8"), (13, 4, 5, "uint8"), (13, 4, None, "uint8"),
               (10, 4, 3, "uint8"), (201, 4, 67, "int8")]  # fmt: skip
few_layouts = pytest.mark.parametrize(("num_params", "num_bits", "block_size", "dtype"), FEW_LAYOUTS)


@few_layouts
def test_quantized_sum_in_float64(num_params, num_bits, block_size, dtype):
    with jax.enable_x64():
        values, where, options = quantized_problem(2, 5, num_params, num_bits, block_size, dtype, np.float64)
        got = jax.jit(functools.partial(ff.quantized_weighted_sum, **options))(*values, where=where)
        oracle.assert_matches(got, oracle.quantized_weighted_sum(*values, **options, where=where))


@few_layouts
def test_derivatives_of_every_layout(num_params, num_bits, block_size, dtype):
    with jax.enable_x64():
        (codes, *rest), where, options = quantized_problem(3, 4, num_params, num_bits, block_size, dtype, np.float64)
        call = lambda *rest: ff.quantized_weighted_sum(codes, *rest, **options, where=where)  # noqa: E731
        check_grads(jax.jit(call), rest, order=2, modes=("fwd", "rev"), eps=1e-3, atol=1e-5, rtol=1e-5)
        define = lambda *rest: reference.quantized_weighted_sum(codes, *rest, **options, where=where)  # noqa: E731
        cotangent = jnp.sin(jnp.arange(float(num_params)))
        assert_close(jax.vjp(call, *rest)[1](cotangent), jax.vjp(define, *rest)[1](cotangent))


@few_layouts
def test_vmap_of_every_layout(num_params, num_bits, block_size, dtype):
    problems = [quantized_problem(s, 4, num_params, num_bits, block_size, dtype) for s in range(3)]
    options = problems[0][2]
    batched = [np.stack(each) for each in zip(*(values for values, *_ in problems), strict=True)]
    call = functools.partial(ff.quantized_weighted_sum, **options)
    got = jax.jit(jax.vmap(call))(*batched)
    shared = jax.jit(jax.vmap(call, (None, 0, None, None)))(problems[0][0][0], batched[1], *problems[0][0][2:])
    for b, (values, *_) in enumerate(problems):
        oracle.assert_matches(got[b], oracle.quantized_weighted_sum(*values, **options))
        mixed = (problems[0][0][0], values[1], *problems[0][0][2:])
        oracle.assert_matches(shared[b], oracle.quantized_weighted_sum(*mixed, **options))


@every_layout
def test_one_call_and_no_dequantised_client(num_params, num_bits, block_size, dtype):
    if not has_kernel("quantized_weighted_sum") or num_params == 0:
        pytest.skip("nothing is compiled")
    values, _, options = quantized_problem(4, 20, num_params, num_bits, block_size, dtype)
    text = jax.jit(functools.partial(ff.quantized_weighted_sum, **options)).lower(*values).compile().as_text()
    assert hlo.custom_calls(text) == ["fedfuse.quantized_weighted_sum.v1"]
    assert not hlo.large_arrays(text, max(20 * num_params // 2, 200))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("num_params", "num_bits", "block_size", "spec", "allowed"),
    [
        (64, 8, None, P(None, "a"), set()),
        (64, 4, None, P(None, "a"), set()),
        (64, 8, 16, P(None, "a"), set()),
        (64, 8, 16, P("a", None), {"all-reduce"}),
        (63, 4, None, P("a", None), {"all-reduce"}),
        (64, 8, 10, P(None, "a"), {"all-gather", "all-reduce", "collective-permute", "all-to-all"}),
    ],
)
def test_sharded_codes(num_params, num_bits, block_size, spec, allowed, kind):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    values, where, options = quantized_problem(5, 8, num_params, num_bits, block_size)
    mesh = jax.make_mesh((4,), ("a",), (kind,))
    with jax.set_mesh(mesh):
        codes = jax.device_put(values[0], NamedSharding(mesh, spec))
        call = jax.jit(functools.partial(ff.quantized_weighted_sum, **options)).lower(codes, *values[1:], where=where)
        compiled = call.compile()
        got = compiled(codes, *values[1:], where=where)
    oracle.assert_matches(got, oracle.quantized_weighted_sum(*values, **options, where=where))
    assert set(hlo.collectives(compiled.as_text())) <= allowed


# --- Quantisation -----------------------------------------------------------------------------------------------


def dequantized(codes, scales, zero_points, num_bits, num_params, block_size):
    """What the server makes of one client."""
    stacked = [x[None] for x in (codes, scales, zero_points)]
    options = {"num_bits": num_bits, "num_params": num_params, "block_size": block_size}
    return np.asarray(ff.quantized_weighted_sum(*stacked, np.ones(1, np.float32), **options))


SIZES = [(1, None), (2, None), (100, None), (101, None), (100, 10), (101, 10), (7, 100), (33, 5)]


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize(("size", "block_size"), SIZES)
def test_quantize_to_the_nearest(size, block_size, num_bits):
    update = (np.random.default_rng(size).standard_normal(size) * 3 + 1).astype(np.float32)
    codes, scales, zero_points = ff.quantize(update, num_bits=num_bits, block_size=block_size)
    assert codes.dtype == np.uint8
    assert codes.shape == (size if num_bits == 8 else -(-size // 2),)
    assert scales.shape == zero_points.shape == (() if block_size is None else (-(-size // block_size),))
    got = dequantized(codes, scales, zero_points, num_bits, size, block_size)
    each = np.broadcast_to(scales, (size,)) if block_size is None else np.repeat(scales, block_size)[:size]
    assert (np.abs(got - update) <= each / 2 + 1e-5).all()
    top = 2**num_bits - 1
    for first in range(0, size, block_size or size):
        block = update[first : first + (block_size or size)]
        if len(block) > 1:
            np.testing.assert_allclose(each[first], (block.max() - block.min()) / top, rtol=1e-5)


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.3, 1e30, -3e38, 1e-30])
def test_equal_values_come_back_exactly(value, num_bits):
    update = np.full(5, value, np.float32)
    codes, scales, zero_points = ff.quantize(update, num_bits=num_bits, block_size=2)
    np.testing.assert_array_equal(dequantized(codes, scales, zero_points, num_bits, 5, 2), update)


def test_a_range_beyond_float32_does_not_overflow():
    update = np.array([-3e38, 0.0, 3e38, 1e38], np.float32)
    for key in (None, jax.random.key(0)):
        codes, scale, zero_point = ff.quantize(update, key=key)
        assert np.isfinite(scale)
        assert np.isfinite(zero_point)
        wide = np.asarray(scale, float) * (np.asarray(codes, float) - np.asarray(zero_point, float))
        assert np.abs(wide - update).max() <= 1.001 * float(scale)


def test_values_close_together_and_far_from_zero():
    """Where the range is but a few ulp, what comes back is off by an ulp of the values, no more."""
    update = np.float32(1) + np.arange(4, dtype=np.float32) * np.float32(2**-23)
    got = dequantized(*ff.quantize(update), 8, 4, None)
    assert np.abs(got - update).max() <= 2**-23


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_not_finite_poisons_its_block(bad, stochastic):
    update = np.arange(6, dtype=np.float32)
    update[1] = bad
    key = jax.random.key(0) if stochastic else None
    got = dequantized(*ff.quantize(update, block_size=3, key=key), 8, 6, 3)
    assert np.isnan(got).tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(got[3:], update[3:], atol=0.01)


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("block_size", [None, 7])
def test_stochastic_rounding_is_unbiased(num_bits, block_size):
    """The mean of many comes close to the update: off by 5 of its standard deviations at most, none beyond a scale."""
    size, draws = 20, 4000
    update = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), draws)
    codes, scales, zero_points = jax.jit(
        jax.vmap(lambda key: ff.quantize(update, num_bits=num_bits, block_size=block_size, key=key))
    )(keys)
    options = {"num_bits": num_bits, "num_params": size, "block_size": block_size}
    mean = ff.quantized_weighted_sum(codes, scales, zero_points, np.full(draws, 1 / draws, np.float32), **options)
    each = np.broadcast_to(scales[0], (size,)) if block_size is None else np.repeat(scales[0], block_size)[:size]
    assert (np.abs(mean - update) <= 5 * each * 0.5 / np.sqrt(draws) + 1e-4).all()
    one = dequantized(codes[0], scales[0], zero_points[0], num_bits, size, block_size)
    assert (np.abs(one - update) <= each * 1.001).all()
    assert not np.array_equal(codes[0], codes[1])


def test_keys_typed_and_raw_are_one():
    update = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    typed, raw = ff.quantize(update, key=jax.random.key(7)), ff.quantize(update, key=jax.random.PRNGKey(7))
    assert_same_bits(typed, raw)
    rotated = ff.hadamard_rotation(update, jax.random.key(7)), ff.hadamard_rotation(update, jax.random.PRNGKey(7))
    assert_same_bits(*rotated)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_quantize_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        update = jnp.asarray(np.random.default_rng(1).standard_normal((5, 4)), dtype)
        codes, scale, zero_point = jax.jit(ff.quantize)(update)
        assert scale.dtype == zero_point.dtype == (np.float64 if dtype == "float64" else np.float32)
        wide = np.asarray(update, np.float64).ravel()
        assert np.abs(np.asarray(scale * (codes - zero_point), np.float64) - wide).max() <= float(scale) / 2 * 1.001


@pytest.mark.parametrize("block_size", [None, 7])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_quantize_of_equal_values_is_exact_however_it_is_compiled(num_bits, block_size):
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32) * np.logspace(-30, 37, 300, dtype="f4")
    for quantize in (ff.quantize, jax.jit(ff.quantize, static_argnames=("num_bits", "block_size"))):
        for value in (*values, np.float32(3e38), np.float32(0)):
            update = np.full(20, value)
            codes, scales, zero_points = quantize(update, num_bits=num_bits, block_size=block_size)
            got = dequantized(codes, scales, zero_points, num_bits, 20, block_size)
            np.testing.assert_array_equal(got, update)
            assert np.all(np.asarray(scales) > 0)


def test_quantize_scales_are_positive_however_close_the_values():
    values = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    for quantize in (ff.quantize, jax.jit(ff.quantize)):
        for value in values:
            update = np.array([value, np.nextafter(value, np.float32(np.inf))])
            codes, scale, zero_point = quantize(update)
            assert scale > 0
            assert (
                np.abs(dequantized(codes, scale, zero_point, 8, 2, None) - update) <= 2 * np.spacing(abs(value))
            ).all()


def test_quantize_nothing():
    codes, scale, zero_point = ff.quantize(np.zeros((0, 3), np.float32))
    assert (codes.shape, scale.shape, zero_point.shape) == ((0,), (), ())
    assert [x.shape for x in ff.quantize(np.zeros(0, np.float32), num_bits=4, block_size=3)] == [(0,)] * 3


# --- Rotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 2048, 5000])
def test_rotation_against_the_matrix(size):
    import scipy.linalg

    update = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    key = jax.random.key(size)
    got = jax.jit(ff.hadamard_rotation)(update, key)
    padded = 1 << (size - 1).bit_length()
    assert got.shape == (padded,)
    if padded <= 4096:
        signs = np.asarray(jax.random.rademacher(key, (padded,)), float)
        wanted = scipy.linalg.hadamard(padded) @ (signs * np.pad(update.astype(float), (0, padded - size)))
        np.testing.assert_allclose(got, wanted / np.sqrt(padded), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(update), rtol=1e-5)
    back = jax.jit(lambda y: ff.inverse_hadamard_rotation(y, key, update))(got)
    np.testing.assert_allclose(back, update, rtol=1e-4, atol=1e-5)


def test_rotation_of_a_tree():
    """Leaf i of several has key i of a split; shapes come from anything that has one."""
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.bfloat16(2.5), "c": jnp.zeros((0, 2))}
    key = jax.random.key(1)
    rotated = ff.hadamard_rotation(tree, key)
    assert {name: leaf.shape for name, leaf in rotated.items()} == {"a": (8,), "b": (1,), "c": (0,)}
    assert_same_bits(rotated["a"], ff.hadamard_rotation(tree["a"], jax.random.split(key, 3)[0]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for like in (tree, shapes):
        back = ff.inverse_hadamard_rotation(rotated, key, like)
        for name in tree:
            assert back[name].shape == tree[name].shape
            assert back[name].dtype == np.float32
            np.testing.assert_allclose(back[name], tree[name], rtol=1e-5, atol=1e-5)


def test_the_server_rotates_back_once():
    """Clients rotate by one key and quantise; their mean, rotated back, is near the mean of their updates."""
    generator = np.random.default_rng(4)
    updates = (generator.standard_normal((6, 100)) * np.where(np.arange(100) == 3, 100, 1)).astype(np.float32)
    key = jax.random.key(5)
    codes, scales, zero_points = jax.vmap(lambda x: ff.quantize(ff.hadamard_rotation(x, key)))(updates)
    mean = ff.quantized_weighted_sum(codes, scales, zero_points, np.full(6, 1 / 6, np.float32))
    got = ff.inverse_hadamard_rotation(mean, key, updates[0])
    assert np.abs(got - updates.mean(0)).max() < 0.3  # the range of an unrotated update alone is about 400


# --- Several devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_a_sharded_update_is_gathered(kind):
    update = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    key = jax.random.key(2)
    like = jax.ShapeDtypeStruct((4, 8), np.float32)
    calls = (
        lambda x: ff.topk_sparsify(x, 3, x),
        lambda x: ff.quantize(x, block_size=5, key=key)[0],
        lambda x: ff.inverse_hadamard_rotation(ff.hadamard_rotation(x, key), key, like),
        jax.vmap(lambda x: ff.topk_sparsify(x, 3, x)),
    )
    mesh = jax.make_mesh((4,), ("a",), (kind,))
    for call in calls:
        wanted = jax.jit(call)(update)
        with jax.set_mesh(mesh):
            for spec in (P("a"), P(None, "a")):
                got = jax.jit(call)(jax.device_put(update, NamedSharding(mesh, spec)))
                assert_close(got, wanted)
