"""Bad input to the compressed operations; see test_errors.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import check_refused, refusal

import fedfuse_jax as ff

KEY = jax.random.key(0)
VALUES, INDICES, WEIGHTS = jnp.ones((4, 3)), jnp.zeros((4, 3), int), jnp.ones(4)


def topk_sum(values=VALUES, indices=INDICES, weights=WEIGHTS, num_params=5, where=None):
    return ff.topk_sparse_weighted_sum(values, indices, weights, num_params, where=where)


BAD_SPARSE = {
    "integer values": ({"values": INDICES}, TypeError, "values", "int32", "floating-point"),
    "float8 values": ({"values": VALUES.astype(jnp.float8_e4m3fn)}, TypeError, "values", "float8", "float32"),
    "key values": ({"values": jax.random.split(KEY, 4)}, TypeError, "values", "key", "floating-point"),
    "text values": ({"values": "x"}, TypeError, "values", "'x'", "floating-point"),
    "flat values": ({"values": jnp.ones(3)}, ValueError, "values", "(3,)", "(n_clients, k)"),
    "no clients": ({"values": jnp.ones((0, 3))}, ValueError, "values", "no clients", "one at least"),
    "float indices": ({"indices": VALUES}, TypeError, "indices", "float32", "integers"),
    "bool indices": ({"indices": VALUES > 0}, TypeError, "indices", "bool", "integers"),
    "short indices": ({"indices": INDICES[:, :2]}, ValueError, "indices", "(4, 2)", "(4, 3)"),
    "few rows": ({"indices": INDICES[:2]}, ValueError, "indices", "(2, 3)", "(4, 3)"),
    "weights": ({"weights": jnp.ones(3)}, ValueError, "weights", "(3,)", "(4,)"),
    "complex weights": ({"weights": jnp.ones(4, complex)}, TypeError, "weights", "complex64", "real"),
    "where": ({"where": np.ones(3, bool)}, ValueError, "where", "(3,)", "(4,)"),
    "where of integers": ({"where": np.ones(4, int)}, TypeError, "where", "int64", "bool"),
    "float size": ({"num_params": 5.0}, TypeError, "num_params", "float 5.0", "Python integer"),
    "traced size": ({"num_params": jnp.int32(5)}, TypeError, "num_params", "int32[]", "Python integer"),
    "bool size": ({"num_params": True}, TypeError, "num_params", "bool True", "Python integer"),
    "negative size": ({"num_params": -1}, ValueError, "num_params", "-1", "at least 0"),
    "size beyond int32": ({"num_params": 2**31}, ValueError, "num_params", str(2**31), "at most"),
}


@pytest.mark.parametrize("bad", BAD_SPARSE)
def test_topk_sparse_weighted_sum(bad):
    options, kind, argument, *fragments = BAD_SPARSE[bad]
    check_refused(lambda: topk_sum(**options), *refusal(kind, "topk_sparse_weighted_sum", argument, *fragments))


UPDATE = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}
BAD_TOPK = {
    "too many": ((UPDATE, 8), ValueError, "k", "is 8", "7"),
    "negative": ((UPDATE, -1), ValueError, "k", "-1", "at least 0"),
    "float": ((UPDATE, 1.0), TypeError, "k", "float 1.0", "Python integer"),
    "traced": ((UPDATE, jnp.int32(1)), TypeError, "k", "int32[]", "Python integer"),
    "integers": (({"w": jnp.ones(3, int)}, 1), TypeError, "update['w']", "int32", "floating-point"),
    "nothing": (({}, 0), ValueError, "update", "no leaves", "one array"),
    "structure": ((UPDATE, 1, {"w": UPDATE["w"]}), ValueError, "residual", "PyTreeDef"),
    "shape": ((UPDATE, 1, {**UPDATE, "w": jnp.ones(6)}), ValueError, "residual['w']", "(6,)", "(2, 3)"),
    "dtype": ((UPDATE, 1, {**UPDATE, "b": jnp.bfloat16(1)}), TypeError, "residual['b']", "bfloat16", "float32"),
}


@pytest.mark.parametrize("bad", BAD_TOPK)
def test_topk_sparsify(bad):
    arguments, kind, argument, *fragments = BAD_TOPK[bad]
    check_refused(lambda: ff.topk_sparsify(*arguments), *refusal(kind, "topk_sparsify", argument, *fragments))


CODES = jnp.ones((4, 6), jnp.uint8)


def quantized_sum(codes=CODES, scales=WEIGHTS, zero_points=WEIGHTS, weights=WEIGHTS, **options):
    return ff.quantized_weighted_sum(codes, scales, zero_points, weights, **options)


BLOCKS = jnp.ones((4, 3))
BAD_CODES = {
    "float codes": ({"codes": CODES.astype(float)}, TypeError, "codes", "float32", "uint8 or int8"),
    "wide codes": ({"codes": CODES.astype(jnp.uint16)}, TypeError, "codes", "uint16", "uint8 or int8"),
    "key codes": ({"codes": jax.random.split(KEY, 4)}, TypeError, "codes", "key", "uint8 or int8"),
    "flat codes": ({"codes": CODES[0]}, ValueError, "codes", "(6,)", "(n_clients, num_params)"),
    "no clients": ({"codes": CODES[:0]}, ValueError, "codes", "no clients", "one at least"),
    "num_bits 2": ({"num_bits": 2}, ValueError, "num_bits", "2", "8 or 4"),
    "num_bits 16": ({"num_bits": 16}, ValueError, "num_bits", "16", "8 or 4"),
    "num_bits float": ({"num_bits": 8.0}, TypeError, "num_bits", "float 8.0", "8 or 4"),
    "num_bits traced": ({"num_bits": jnp.int32(8)}, TypeError, "num_bits", "int32[]", "8 or 4"),
    "num_params": ({"num_params": 5}, ValueError, "codes", "(4, 6)", "(4, 5)", "8 bits"),
    "num_params of halves": ({"num_bits": 4, "num_params": 10}, ValueError, "codes", "(4, 6)", "(4, 5)", "4 bits"),
    "num_params too large": ({"num_bits": 4, "num_params": 13}, ValueError, "codes", "(4, 6)", "(4, 7)", "4 bits"),
    "num_params traced": ({"num_params": jnp.int32(6)}, TypeError, "num_params", "int32[]", "Python integer"),
    "block_size 0": ({"block_size": 0}, ValueError, "block_size", "0", "at least 1"),
    "block_size negative": ({"block_size": -2}, ValueError, "block_size", "-2", "at least 1"),
    "block_size float": ({"block_size": 2.0}, TypeError, "block_size", "float 2.0", "Python integer"),
    "scales too many": ({"scales": BLOCKS}, ValueError, "scales", "(4, 3)", "(4,)", "block_size"),
    "scales too few": ({"block_size": 2}, ValueError, "scales", "(4,)", "(4, 3)"),
    "scales of other blocks": ({"block_size": 3, "scales": BLOCKS}, ValueError, "scales", "(4, 3)", "(4, 2)"),
    "scales of bytes": (
        {"block_size": 2, "num_bits": 4, "scales": BLOCKS}, ValueError, "scales", "(4, 3)", "(4, 6)"),
    "zero_points": ({"block_size": 2, "scales": BLOCKS}, ValueError, "zero_points", "(4,)", "(4, 3)"),
    "complex scales": ({"scales": WEIGHTS.astype(complex)}, TypeError, "scales", "complex64", "real"),
    "key zero_points": ({"zero_points": jax.random.split(KEY, 4)}, TypeError, "zero_points", "key", "real"),
    "scalar zero_points": ({"zero_points": 0}, ValueError, "zero_points", "()", "(4,)"),
    "weights": ({"weights": jnp.ones(3)}, ValueError, "weights", "(3,)", "(4,)"),
    "where": ({"where": np.ones(3, bool)}, ValueError, "where", "(3,)", "(4,)"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CODES)
def test_quantized_weighted_sum(bad):
    options, kind, argument, *fragments = BAD_CODES[bad]
    check_refused(lambda: quantized_sum(**options), *refusal(kind, "quantized_weighted_sum", argument, *fragments))


BAD_KEYS = {
    "text": ("key", TypeError, "'key'", "JAX key"),
    "number": (7, TypeError, "int32", "JAX key"),
    "floats": (np.ones(2, np.float32), TypeError, "float32[2]", "JAX key"),
    "raw of another kind": (np.ones(4, np.uint32), ValueError, "uint32[4]", "uint32[2]"),
    "several": (jax.random.split(KEY, 2), ValueError, "[2]", "one JAX key"),
    "several raw": (np.ones((3, 2), np.uint32), ValueError, "uint32[3,2]", "one JAX key"),
}


@pytest.mark.parametrize("bad", BAD_KEYS)
@pytest.mark.parametrize("operation", ["quantize", "hadamard_rotation", "inverse_hadamard_rotation"])
def test_keys(operation, bad):
    key, kind, *fragments = BAD_KEYS[bad]
    x = jnp.ones(4)
    call = {
        "quantize": lambda: ff.quantize(x, key=key),
        "hadamard_rotation": lambda: ff.hadamard_rotation(x, key),
        "inverse_hadamard_rotation": lambda: ff.inverse_hadamard_rotation(x, key, x),
    }[operation]
    check_refused(call, *refusal(kind, operation, "key", *fragments))


BAD_QUANTIZE = {
    "integers": (({"w": jnp.ones(3, int)},), {}, TypeError, "update['w']", "int32", "floating-point"),
    "num_bits": ((UPDATE,), {"num_bits": 3}, ValueError, "num_bits", "3", "8 or 4"),
    "block_size": ((UPDATE,), {"block_size": 0}, ValueError, "block_size", "0", "at least 1"),
    "block_size traced": ((UPDATE,), {"block_size": jnp.int32(2)}, TypeError, "block_size", "int32[]", "Python"),
}


@pytest.mark.parametrize("bad", BAD_QUANTIZE)
def test_quantize(bad):
    arguments, options, kind, argument, *fragments = BAD_QUANTIZE[bad]
    check_refused(lambda: ff.quantize(*arguments, **options), *refusal(kind, "quantize", argument, *fragments))


BAD_ROTATED = {
    "length": ((jnp.ones(8), KEY, jnp.ones(3)), ValueError, "rotated", "(8,)", "(4,)"),
    "structure": (({"w": jnp.ones(4)}, KEY, jnp.ones(3)), ValueError, "like", "PyTreeDef"),
    "integers": ((jnp.ones(4, int), KEY, jnp.ones(3)), TypeError, "rotated", "int32", "floating-point"),
}


@pytest.mark.parametrize("bad", BAD_ROTATED)
def test_inverse_hadamard_rotation(bad):
    arguments, kind, argument, *fragments = BAD_ROTATED[bad]
    call = lambda: ff.inverse_hadamard_rotation(*arguments)  # noqa: E731
    check_refused(call, *refusal(kind, "inverse_hadamard_rotation", argument, *fragments))


def test_a_rotation_of_integers_is_refused():
    check_refused(
        lambda: ff.hadamard_rotation({"w": jnp.ones(3, int)}, KEY),
        *refusal(TypeError, "hadamard_rotation", "update['w']", "int32", "floating-point"),
    )
