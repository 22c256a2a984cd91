"""FedJAX's compression aggregators: leaf by leaf what FedJAX's own functions give, unbiased, and as many bits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

fedjax = pytest.importorskip("fedjax")

from fedjax.aggregators import compression, walsh_hadamard  # noqa: E402

from fedfuse_jax import fedjax as ours  # noqa: E402
from fedfuse_jax.fedjax import compression as inner  # noqa: E402

KEY = jax.random.PRNGKey(3)
TREE = {
    "a": np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32),
    "b": np.arange(4, dtype=np.float32),
    "c": np.full(3, 2.5, np.float32),
}
MAKERS = {
    "uniform": lambda rng: ours.uniform_stochastic_quantizer(5, rng),
    "rotated": lambda rng: ours.rotated_uniform_stochastic_quantizer(5, rng),
    "drive": ours.structured_drive_quantizer,
    "terngrad": ours.terngrad_quantizer,
}
BITS_PER_PARAMETER = {"uniform": math.log2(5), "rotated": math.log2(5), "drive": 1, "terngrad": math.log2(3)}
every_maker = pytest.mark.parametrize("name", MAKERS)


def assert_close(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- Leaf by leaf, with the same key ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 3, 16, 257])
def test_uniform_levels(num_levels):
    wanted = compression.uniform_stochastic_quantize_pytree(TREE, num_levels, KEY)
    assert_close(inner._quantized_uniformly(TREE, num_levels, KEY), wanted)


def test_rotation():
    wanted, shapes = walsh_hadamard.structured_rotation_pytree(TREE, KEY)
    got = inner._rotated(TREE, KEY)
    assert_close(got, wanted)
    back = walsh_hadamard.inverse_structured_rotation_pytree(wanted, KEY, shapes)
    assert_close(inner._rotated_back(got, KEY, TREE), back)


def test_drive():
    rotated, shapes = walsh_hadamard.structured_rotation_pytree(TREE, KEY)
    wanted = walsh_hadamard.inverse_structured_rotation_pytree(compression.drive_pytree(rotated), KEY, shapes)
    assert_close(inner._driven(TREE, KEY), wanted)


def test_terngrad():
    varied = {name: TREE[name] for name in ("a", "b")}
    assert_close(inner._terngraded(varied, KEY), compression.terngrad_quantize_pytree(varied, KEY))


# --- The aggregators ----------------------------------------------------------------------------------------------


@every_maker
def test_bits_and_state(name):
    aggregator = MAKERS[name](KEY)
    state = aggregator.init()
    assert isinstance(state, compression.CompressionState)
    clients = [(i, TREE, i + 1) for i in range(3)]
    once = BITS_PER_PARAMETER[name] * 42 + 64 * 3
    for rounds in (1, 2):
        mean, state = aggregator.apply(iter(clients), state)
        assert state.num_bits == pytest.approx(rounds * once)
    assert jax.tree.map(jnp.shape, mean) == jax.tree.map(jnp.shape, TREE)
    again, _ = aggregator.apply(clients, aggregator.init())
    first, _ = aggregator.apply(clients, aggregator.init())
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True))
    assert any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(mean), strict=True))


def test_arithmetic_bits():
    """The mean over the clients of FedJAX's own count."""
    aggregator = ours.uniform_stochastic_quantizer(5, KEY, "arithmetic")
    _, state = aggregator.apply([("a", TREE["a"], 1), ("b", TREE["a"] + 1, 1)], aggregator.init())
    use = jax.random.split(KEY)[1]
    each = [
        compression.arithmetic_encoding_num_bits(
            inner._quantized_uniformly(TREE["a"] + i, 5, jax.random.fold_in(use, i))
        )
        for i in range(2)
    ]
    assert float(state.num_bits) == pytest.approx(float(sum(each)) / 2)


@every_maker
def test_unbiased(name):
    """The mean over many clients of one update comes close to it: off by 5 standard errors at most."""
    update = np.random.default_rng(1).uniform(-1, 1, 32).astype(np.float32)  # none beyond 2.5 deviations
    num_clients = 600
    aggregator = MAKERS[name](KEY)
    mean, _ = aggregator.apply(((i, update, 1.0) for i in range(num_clients)), aggregator.init())
    deviation = {"uniform": 0.25, "rotated": 0.5, "drive": 1.0, "terngrad": 0.6}[name]
    assert np.abs(mean - update).max() < 5 * deviation / math.sqrt(num_clients)


@every_maker
def test_weights_and_dtypes(name):
    """A client of all the weight is all there is; low precision comes back as it came."""
    update = jnp.asarray([1.0, -1.0, 1.0, -1.0], jnp.bfloat16)
    aggregator = MAKERS[name](KEY)
    mean, _ = aggregator.apply([("a", update, 2.0), ("b", 100 * update, 0.0)], aggregator.init())
    assert mean.dtype == jnp.bfloat16
    assert np.abs(np.asarray(mean, np.float32)).max() <= 2.1


def test_a_leaf_of_zeros_stays_one():
    aggregator = ours.structured_drive_quantizer(KEY)
    mean, _ = aggregator.apply([("a", jnp.zeros(5), 1)], aggregator.init())
    assert mean.tolist() == [0.0] * 5


@every_maker
def test_a_leaf_without_coordinates(name):
    aggregator = MAKERS[name](KEY)
    mean, _ = aggregator.apply([("a", {"empty": jnp.zeros((0, 3)), "w": jnp.ones(4)}, 1)], aggregator.init())
    assert mean["empty"].shape == (0, 3)
    assert mean["w"].shape == (4,)


# --- Errors -------------------------------------------------------------------------------------------------------


@every_maker
def test_bad_clients(name):
    aggregator = MAKERS[name](KEY)
    with pytest.raises(ValueError, match="clients_params_and_weights is empty"):
        aggregator.apply([], aggregator.init())
    with pytest.raises(ValueError, match="needs triples"):
        aggregator.apply([1], aggregator.init())
    with pytest.raises(TypeError, match="needs one JAX key"):
        MAKERS[name]("key")


@pytest.mark.parametrize("make", [ours.uniform_stochastic_quantizer, ours.rotated_uniform_stochastic_quantizer])
def test_bad_levels(make):
    with pytest.raises(ValueError, match="num_levels is 1; it needs to be at least 2"):
        make(1, KEY)
    with pytest.raises(TypeError, match="num_levels is float"):
        make(2.0, KEY)


def test_bad_encoding():
    with pytest.raises(ValueError, match="encode_algorithm is 'huffman'; it needs None or 'arithmetic'"):
        ours.uniform_stochastic_quantizer(2, KEY, "huffman")
