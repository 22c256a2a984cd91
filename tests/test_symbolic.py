"""Exports of symbolic shapes, of rules and of what runs on clients: they run as the eager call does, or are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import fedfuse_jax as ff

KEY = jax.random.PRNGKey(3)


def exported(function, *arguments):
    return export.export(jax.jit(function), disabled_checks=ff.export_checks())(*arguments)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_bucketing():
    """In the eager call's random order, also where more clients take more rounds of sorting."""
    n, d = export.symbolic_shape("n, d")
    program = exported(lambda k, x: ff.bucketing(k, x, 2), jax.ShapeDtypeStruct((2,), jnp.uint32), floats(n, d))
    for n_clients in (1, 2, 7, 1625, 1626):
        x = numbers(n_clients, 2)
        np.testing.assert_array_equal(program.call(KEY, x), ff.bucketing(KEY, x, 2))


RULES = {
    "krum": lambda x: ff.krum(x, 1),
    "multi_krum": lambda x: ff.multi_krum(x, 1),
    "multi_krum, so many": lambda x: ff.multi_krum(x, 1, 3),
    "bulyan": lambda x: ff.bulyan(x, 1),
    "nearest_neighbor_mixing": lambda x: ff.nearest_neighbor_mixing(x, 1),
    "geometric_median": ff.geometric_median,
    "centered_clipping": lambda x: ff.centered_clipping(x, jnp.zeros(x.shape[1:]), 1.0),
    "krum_scores": lambda x: ff.krum_scores(ff.pairwise_squared_distances(x), 1),
    "adaptive_clip_norm": lambda x: ff.adaptive_clip_norm(1.0, ff.squared_norms(x)),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    n, d = export.symbolic_shape("n, d")
    program = exported(RULES[rule], floats(n, d))
    for shape in ((7, 3), (9, 5)):
        got, wanted = program.call(numbers(*shape)), jax.jit(RULES[rule])(numbers(*shape))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_trim_by_fraction_is_refused():
    (n,) = export.symbolic_shape("n")
    with pytest.raises(ValueError, match=r"^trimmed_mean: the number of clients is symbolic"):
        exported(ff.trimmed_mean, floats(n, 3))


def test_topk_sparsify():
    """Of as many entries as are known to be enough."""
    (d,) = export.symbolic_shape("d", constraints=["d >= 3"])
    program = exported(lambda x: ff.topk_sparsify(x, 2), floats(d))
    for size in (3, 8):
        x = numbers(size)
        for got, wanted in zip(program.call(x), ff.topk_sparsify(x, 2), strict=True):
            np.testing.assert_array_equal(got, wanted)
    (d,) = export.symbolic_shape("d")
    with pytest.raises(ValueError, match=r"^topk_sparsify: update has a symbolic number of entries, d; it needs"):
        exported(lambda x: ff.topk_sparsify(x, 2), floats(d))


@pytest.mark.parametrize("block_size", [None, 4])
def test_quantize(block_size):
    quantize = lambda x: ff.quantize(x, block_size=block_size)  # noqa: E731
    (d,) = export.symbolic_shape("d")
    program = exported(quantize, floats(d))
    for size in (3, 4, 11):
        for got, wanted in zip(program.call(numbers(size)), jax.jit(quantize)(numbers(size)), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_rotations_are_refused():
    (d,) = export.symbolic_shape("d")
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    with pytest.raises(ValueError, match=r"^hadamard_rotation: update\['w'\] has the symbolic shape \(d,\); it needs"):
        exported(ff.hadamard_rotation, {"w": floats(d)}, key)
    with pytest.raises(
        ValueError, match=r"^inverse_hadamard_rotation: like\['w'\] has the symbolic shape \(d,\); it ne"
    ):
        exported(ff.inverse_hadamard_rotation, {"w": floats(8)}, key, {"w": floats(d)})
