"""Under JAX's strict promotion of dtypes and ranks everything lowers, with kernels or without, and derivatives too."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import CASES, Problem, to_jax

import fedfuse_jax as ff

VARIABLE = "FEDFUSE_DISABLE_KERNELS"
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def differentiated(function, *primals):
    """Forwards and backwards, of all results that are floats."""

    def total(*primals):
        leaves = [leaf for leaf in jax.tree.leaves(function(*primals)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        # Not the sum of floats of several dtypes, which would be the caller's promotion.
        return [jnp.sum(leaf) for leaf in leaves]

    results, pull_back = jax.vjp(total, *primals)
    jax.jvp(total, primals, jax.tree.map(jnp.ones_like, primals))
    return pull_back(jax.tree.map(jnp.ones_like, results))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "mixed", "float64"])
def test_operations(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        values = to_jax(case.sample(Problem(dtype=dtype)))
        jax.jit(case.call).lower(*values)
        if case.differentiable:
            primals, with_these = case.split(values, case.differentiable)
            jax.jit(lambda *primals: differentiated(lambda *v: case.call(*with_these(*v)), *primals)).lower(*primals)


RULES = {
    "krum_scores": lambda x: ff.krum_scores(jnp.abs(x[:, :1] - x[:, :1].T), 1),
    "krum": lambda x: ff.krum(x, 1),
    "multi_krum": lambda x: ff.multi_krum(x, 1, weights=np.arange(7)),
    "bulyan": lambda x: ff.bulyan(x, 1),
    "nearest_neighbor_mixing": lambda x: ff.nearest_neighbor_mixing(x, 1),
    "bucketing": lambda x: ff.bucketing(KEY, x, 2),
    "geometric_median": lambda x: ff.geometric_median(x, np.arange(7)),
    "centered_clipping": lambda x: ff.centered_clipping(x, jnp.zeros_like(x[0]), 1),
    "krum of some": lambda x: ff.krum(x, 1, where=np.arange(7) != 3),
    "mean_around_median": lambda x: ff.mean_around_median(x, 2),
    "median of some": lambda x: ff.coordinate_median(x, where=np.arange(7) != 3),
    "trimmed_mean": lambda x: ff.trimmed_mean(x, where=np.arange(7) != 3),
    "adaptive_clip_norm": lambda x: ff.adaptive_clip_norm(1, x[:, 0], key=KEY, count_stddev=1),
    "weighted_mean of numbers": lambda x: ff.weighted_mean(x, list(range(7))),
    "clipped_noisy_weighted_sum": lambda x: ff.clipped_noisy_weighted_sum(KEY, x, np.ones(7), 1, 1),
    "noise of another generator": lambda x: ff.noisy_weighted_sum(jax.random.key(0, impl="rbg"), x, np.ones(7), 1),
    "topk_sparsify": lambda x: ff.topk_sparsify(x, 3, jnp.ones_like(x, ff.reference.accumulator_dtype(x.dtype))),
    "topk_sparse_weighted_sum": lambda x: ff.topk_sparse_weighted_sum(x, np.full((7, 5), 2), np.ones(7), 4),
    "quantize": ff.quantize,
    "quantize at random": lambda x: ff.quantize({"x": x}, key=KEY, num_bits=4, block_size=3),
    "quantized_weighted_sum": lambda x: ff.quantized_weighted_sum(
        np.ones((7, 9), np.uint8), x[:, :3], x[:, :3], np.arange(7), block_size=4
    ),
    "hadamard_rotation": lambda x: ff.hadamard_rotation({"a": x, "b": x}, KEY),
    "inverse_hadamard_rotation": lambda x: ff.inverse_hadamard_rotation(x.reshape(-1)[:32], KEY, jnp.ones((6, 5))),
    "init_server_state": lambda x: ff.init_server_state(x, tau=1),
    "fedyogi": lambda x: ff.fedyogi_weighted_update(x[0], ff.init_server_state(x[0]), x, learning_rate=1, b1=1),
}
NOT_DIFFERENTIABLE = {"quantize", "quantize at random"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_rules_and_what_runs_on_clients(rule, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(X, dtype)
        jax.jit(RULES[rule]).lower(x)
        if rule not in NOT_DIFFERENTIABLE:
            jax.jit(lambda x: differentiated(RULES[rule], x)).lower(x)


@pytest.mark.skipif(VARIABLE in os.environ, reason="this is that run")
def test_without_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, VARIABLE: "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
