"""Bad input: the right exception, with a message that names operation, argument, what it got and what it needs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import ROWS, Kind
from test_table import RULES

import fedfuse_jax as ff

X = jnp.ones((4, 3))
KEY = jax.random.key(0)

REDUCTIONS = {
    "weighted_sum": lambda updates, **options: ff.weighted_sum(updates, options.pop("weights", np.ones(4)), **options),
    "weighted_mean": ff.weighted_mean,
    "squared_norms": ff.squared_norms,
    "finite_clients": ff.finite_clients,
    "coordinate_median": ff.coordinate_median,
    "trimmed_mean": ff.trimmed_mean,
    "mean_around_median": lambda updates, **options: ff.mean_around_median(updates, 1, **options),
    "pairwise_squared_distances": ff.pairwise_squared_distances,
    "krum": lambda updates, **options: ff.krum(updates, 1, **options),
    "multi_krum": lambda updates, **options: ff.multi_krum(updates, 1, **options),
    "bulyan": lambda updates, **options: ff.bulyan(updates, 0, **options),
    "nearest_neighbor_mixing": lambda updates, **options: ff.nearest_neighbor_mixing(updates, 1, **options),
    "bucketing": lambda updates, **options: ff.bucketing(KEY, updates, 2, **options),
    "geometric_median": ff.geometric_median,
    "centered_clipping": lambda updates, **options: ff.centered_clipping(updates, jnp.zeros(3), 1.0, **options),
    "clipped_weighted_sum": lambda updates, **options: ff.clipped_weighted_sum(
        updates, options.pop("weights", np.ones(4)), options.pop("max_norm", 1.0), **options
    ),
    "noisy_weighted_sum": lambda updates, **options: ff.noisy_weighted_sum(
        options.pop("key", KEY), updates, options.pop("weights", np.ones(4)), options.pop("stddev", 1.0), **options
    ),
    "clipped_noisy_weighted_sum": lambda updates, **options: ff.clipped_noisy_weighted_sum(
        options.pop("key", KEY),
        updates,
        options.pop("weights", np.ones(4)),
        options.pop("max_norm", 1.0),
        options.pop("stddev", 1.0),
        **options,
    ),
}
WITH_WHERE = [name for name in REDUCTIONS if name != "finite_clients"]
WITHOUT_OUT_DTYPE = {
    "squared_norms", "pairwise_squared_distances", "clipped_weighted_sum", "noisy_weighted_sum",
    "clipped_noisy_weighted_sum",
}  # fmt: skip
WITH_OUT_DTYPE = [name for name in WITH_WHERE if name not in WITHOUT_OUT_DTYPE]


def refusal(kind, operation, argument, *fragments):
    """Expects an exception whose message names operation and argument and says what it got and needs."""
    return kind, (f"{operation}: {argument}", "needs", *fragments)


def check_refused(call, kind, fragments):
    """Refused alike eagerly and while tracing."""
    for attempt in (call, lambda: jax.eval_shape(call)):
        with pytest.raises(kind) as caught:
            attempt()
        assert type(caught.value) is kind
        missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
        assert not missing, f"{missing} not in: {caught.value}"


# Updates that no reduction over clients takes: (updates, exception, argument, got and needed).
BAD_UPDATES = {
    "integer leaf": ({"w": X, "count": jnp.ones(4, int)}, TypeError, "updates['count']", "int32", "floating-point"),
    "bool leaf": (jnp.ones((4, 3), bool), TypeError, "updates", "bool", "floating-point"),
    "complex leaf": (jnp.ones((4, 3), complex), TypeError, "updates", "complex64", "floating-point"),
    "float8 leaf": (jnp.ones((4, 3), jnp.float8_e4m3fn), TypeError, "updates", "float8_e4m3fn", "floating-point"),
    "key": (jax.random.split(KEY, 4), TypeError, "updates", "key", "floating-point"),
    "text": ({"w": "weights"}, TypeError, "updates['w']", "str 'weights'", "floating-point"),
    "object": ({"w": object()}, TypeError, "updates['w']", "object", "floating-point"),
    "scalar leaf": ({"w": X, "b": jnp.float32(1)}, ValueError, "updates['b']", "(float32[])", "stack_clients"),
    "mismatched": ({"a": X, "w": jnp.ones((5, 3))}, ValueError, "updates['w']", "5 clients", "['a'] has 4"),
    "no clients": (jnp.ones((0, 3)), ValueError, "updates", "no clients", "float32[0,3]"),
    "no leaves": ({}, ValueError, "updates", "no leaves", "one array"),
    "None": (None, ValueError, "updates", "no leaves", "one array"),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("bad", BAD_UPDATES)
def test_updates(operation, bad):
    updates, kind, argument, *fragments = BAD_UPDATES[bad]
    check_refused(lambda: REDUCTIONS[operation](updates), *refusal(kind, operation, argument, *fragments))


BAD_WHERE = {
    "too long": (np.ones(5, bool), ValueError, "(5,)", "(4,)"),
    "too short": (np.ones(1, bool), ValueError, "(1,)", "(4,)"),
    "scalar": (True, ValueError, "()", "(4,)"),
    "matrix": (np.ones((4, 3), bool), ValueError, "(4, 3)", "(4,)"),
    "integers": (np.ones(4, np.int32), TypeError, "int32", "bool"),
    "floats": ([1.0, 0.0, 1.0, 1.0], TypeError, "float64", "bool"),
    "key": (jax.random.split(KEY, 4), TypeError, "key", "bool"),
    "text": ("everybody", TypeError, "everybody", "bool"),
}


@pytest.mark.parametrize("operation", WITH_WHERE)
@pytest.mark.parametrize("bad", BAD_WHERE)
def test_where(operation, bad):
    where, kind, *fragments = BAD_WHERE[bad]
    check_refused(lambda: REDUCTIONS[operation](X, where=where), *refusal(kind, operation, "where", *fragments))


BAD_WEIGHTS = {
    "too long": (np.ones(5), ValueError, "(5,)", "(4,)"),
    "scalar": (1.0, ValueError, "()", "(4,)"),
    "matrix": (np.ones((4, 1)), ValueError, "(4, 1)", "(4,)"),
    "complex": (np.ones(4, complex), TypeError, "complex128", "real"),
    "key": (jax.random.split(KEY, 4), TypeError, "key", "real"),
    "text": ("equal", TypeError, "equal", "real"),
}


WITH_WEIGHTS = [
    "weighted_sum", "weighted_mean", "clipped_weighted_sum", "noisy_weighted_sum", "clipped_noisy_weighted_sum",
]  # fmt: skip


@pytest.mark.parametrize("operation", WITH_WEIGHTS)
@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_weights(operation, bad):
    weights, kind, *fragments = BAD_WEIGHTS[bad]
    check_refused(lambda: REDUCTIONS[operation](X, weights=weights), *refusal(kind, operation, "weights", *fragments))


@pytest.mark.parametrize("operation", WITH_OUT_DTYPE)
@pytest.mark.parametrize(
    "out_dtype", ["int32", "complex64", "bool", "float8_e4m3fn", "nonsense", ("a", "tuple")], ids=str
)
def test_out_dtype(operation, out_dtype):
    got = out_dtype if isinstance(out_dtype, str) else "tuple"
    check_refused(
        lambda: REDUCTIONS[operation](X, out_dtype=out_dtype),
        *refusal(TypeError, operation, "out_dtype", got, "float32"),
    )


BAD_TRIMS = {
    "nobody left": ({"trim_count": 2}, ValueError, "trim_count", "is 2", "4 clients"),
    "far too many": ({"trim_count": 10**30}, ValueError, "trim_count", "at most 2147483647"),
    "negative": ({"trim_count": -1}, ValueError, "trim_count", "-1", "at least 0"),
    "NumPy, nobody left": ({"trim_count": np.int64(2)}, ValueError, "trim_count", "is 2", "4 clients"),
    "float": ({"trim_count": 1.0}, TypeError, "trim_count", "float 1.0", "integer"),
    "bool": ({"trim_count": True}, TypeError, "trim_count", "bool True", "integer"),
    "text": ({"trim_count": "1"}, TypeError, "trim_count", "str '1'", "integer"),
    "traced float": ({"trim_count": jnp.float32(1)}, TypeError, "trim_count", "float32", "integer"),
    "vector": ({"trim_count": jnp.ones(2, int)}, ValueError, "trim_count", "(2,)", "scalar"),
    "key": ({"trim_count": KEY}, TypeError, "trim_count", "key", "integer"),
    "fraction half": ({"trim_fraction": 0.5}, ValueError, "trim_fraction", "0.5", "drops 2", "4 clients"),
    "fraction one": ({"trim_fraction": 1.0}, ValueError, "trim_fraction", "1.0", "less than 1"),
    "fraction negative": ({"trim_fraction": -0.1}, ValueError, "trim_fraction", "-0.1", "at least 0"),
    "fraction NaN": ({"trim_fraction": float("nan")}, ValueError, "trim_fraction", "nan", "less than 1"),
    "fraction text": ({"trim_fraction": "0.1"}, TypeError, "trim_fraction", "'0.1'", "Python number"),
    "fraction traced": ({"trim_fraction": jnp.float32(0.1)}, TypeError, "trim_fraction", "float32[]", "Python number"),
    "fraction None": ({"trim_fraction": None}, TypeError, "trim_fraction", "None", "Python number"),
    "fraction bool": ({"trim_fraction": False}, TypeError, "trim_fraction", "False", "Python number"),
}


@pytest.mark.parametrize("bad", BAD_TRIMS)
def test_trims(bad):
    options, kind, argument, *fragments = BAD_TRIMS[bad]
    check_refused(lambda: ff.trimmed_mean(X, **options), *refusal(kind, "trimmed_mean", argument, *fragments))


TREE = {"w": jnp.ones(3), "b": jnp.ones(())}
LOW = jnp.ones(3, jnp.bfloat16)
BAD_STEPS = {
    "structure": ((TREE, {"w": jnp.ones(3)}, 1.0), ValueError, "update", "PyTreeDef"),
    "shape": ((TREE, {"w": jnp.ones(4), "b": jnp.ones(())}, 1.0), ValueError, "update['w']", "(4,)", "(3,)"),
    "low total": ((LOW, LOW, 1.0), TypeError, "total", "bfloat16", "float32"),
    "integer update": ((jnp.ones(3), jnp.ones(3, int), 1.0), TypeError, "update", "int32", "floating-point"),
    "integer total": ((jnp.ones(3, int), jnp.ones(3), 1.0), TypeError, "total", "int32", "floating-point"),
    "weight vector": ((TREE, TREE, jnp.ones(2)), ValueError, "weight", "(2,)", "scalar"),
    "weight complex": ((TREE, TREE, 1j), TypeError, "weight", "complex128", "real"),
    "weight key": ((TREE, TREE, KEY), TypeError, "weight", "key", "real"),
    "weight text": ((TREE, TREE, "one"), TypeError, "weight", "'one'", "real"),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_accumulate_weighted(bad):
    arguments, kind, argument, *fragments = BAD_STEPS[bad]
    call = lambda: ff.accumulate_weighted(*arguments)  # noqa: E731
    check_refused(call, *refusal(kind, "accumulate_weighted", argument, *fragments))


BAD_STACKS = {
    "nobody": ([], ValueError, "updates", "no clients", "at least one"),
    "an array": (X, TypeError, "updates", "float32[4,3]", "list"),
    "a dict": ({"w": X}, TypeError, "updates", "dict", "list"),
    "text": ("clients", TypeError, "updates", "'clients'", "list"),
    "structure": ([TREE, {"w": jnp.ones(3)}], ValueError, "updates[1]", "PyTreeDef"),
    "shape": ([jnp.ones(3), jnp.ones(4)], ValueError, "updates[1]", "float32[4]", "float32[3]"),
    "dtype": ([jnp.ones(3), LOW], ValueError, "updates[1]", "bfloat16[3]", "float32[3]"),
    "integers": ([jnp.ones(3, int)], TypeError, "updates[0]", "int32", "floating-point"),
    "key": ([KEY], TypeError, "updates[0]", "key", "floating-point"),
    "no leaves": ([{}], ValueError, "updates[0]", "no leaves", "one array"),
}


@pytest.mark.parametrize("bad", BAD_STACKS)
def test_stack_clients(bad):
    updates, kind, argument, *fragments = BAD_STACKS[bad]
    check_refused(lambda: ff.stack_clients(updates), *refusal(kind, "stack_clients", argument, *fragments))


# Private sums: what a bound, a deviation and a key may not be.
BAD_AMOUNTS = {
    "negative": (-1.0, ValueError, "-1", "at least 0"),
    "negative integer": (-1, ValueError, "-1", "at least 0"),
    "negative NumPy": (np.float32(-0.5), ValueError, "-0.5", "at least 0"),
    "NaN": (float("nan"), ValueError, "nan", "at least 0"),
    "vector": (jnp.ones(4), ValueError, "(4,)", "scalar"),
    "complex": (1j, TypeError, "complex128", "real"),
    "text": ("large", TypeError, "'large'", "real"),
    "key": (KEY, TypeError, "key", "real"),
    "None": (None, TypeError, "None", "real"),
}
BAD_KEYS = {
    "seed": (0, TypeError, "int 0", "jax.random.key"),
    "None": (None, TypeError, "None", "jax.random.key"),
    "text": ("key", TypeError, "'key'", "jax.random.key"),
    "floats": (jnp.ones(2), TypeError, "float32[2]", "uint32[2]"),
    "signed": (jnp.ones(2, jnp.int32), TypeError, "int32[2]", "uint32[2]"),
    "three words": (jnp.ones(3, jnp.uint32), ValueError, "uint32[3]", "uint32[2]"),
    "several": (jax.random.split(KEY, 2), ValueError, "(2,)", "one JAX key"),
    "several, raw": (jnp.ones((2, 2), jnp.uint32), ValueError, "uint32[2,2]", "uint32[2]"),
}


@pytest.mark.parametrize(
    ("operation", "argument"),
    [
        ("clipped_weighted_sum", "max_norm"), ("clipped_noisy_weighted_sum", "max_norm"),
        ("noisy_weighted_sum", "stddev"), ("clipped_noisy_weighted_sum", "stddev"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", BAD_AMOUNTS)
def test_bounds_and_deviations(operation, argument, bad):
    value, kind, *fragments = BAD_AMOUNTS[bad]
    call = lambda: REDUCTIONS[operation](X, **{argument: value})  # noqa: E731
    check_refused(call, *refusal(kind, operation, argument, *fragments))


@pytest.mark.parametrize("operation", ["noisy_weighted_sum", "clipped_noisy_weighted_sum"])
@pytest.mark.parametrize("bad", BAD_KEYS)
def test_keys(operation, bad):
    key, kind, *fragments = BAD_KEYS[bad]
    call = lambda: REDUCTIONS[operation](X, key=key)  # noqa: E731
    check_refused(call, *refusal(kind, operation, "key", *fragments))


BAD_ADAPTATIONS = {
    "negative bound": ({"clip_norm": -1.0}, ValueError, "clip_norm", "-1.0", "at least 0"),
    "bound vector": ({"clip_norm": jnp.ones(2)}, ValueError, "clip_norm", "(2,)", "scalar"),
    "norms matrix": ({"norms": X}, ValueError, "norms", "(4, 3)", "(n_clients,)"),
    "no norms": ({"norms": jnp.ones(0)}, ValueError, "norms", "(0,)", "one client"),
    "complex norms": ({"norms": jnp.ones(4, complex)}, TypeError, "norms", "complex64", "real"),
    "quantile": ({"target_quantile": 1.5}, ValueError, "target_quantile", "1.5", "from 0 to 1"),
    "rate": ({"learning_rate": -0.1}, ValueError, "learning_rate", "-0.1", "at least 0"),
    "deviation": ({"count_stddev": -1.0, "key": KEY}, ValueError, "count_stddev", "-1.0", "at least 0"),
    "no key": ({"count_stddev": 1.0}, ValueError, "key", "None", "needs a key"),
    "key": ({"key": 0, "count_stddev": 1.0}, TypeError, "key", "int 0", "jax.random.key"),
    "where": ({"where": np.ones(3, bool)}, ValueError, "where", "(3,)", "(4,)"),
}


@pytest.mark.parametrize("bad", BAD_ADAPTATIONS)
def test_adaptive_clip_norm(bad):
    options, kind, argument, *fragments = BAD_ADAPTATIONS[bad]
    arguments = {"clip_norm": 1.0, "norms": jnp.ones(4)} | options
    call = lambda: ff.adaptive_clip_norm(**arguments)  # noqa: E731
    check_refused(call, *refusal(kind, "adaptive_clip_norm", argument, *fragments))


# Server optimizers: parameters, state and updates have to fit each other.
SERVER = {
    "fedavgm_weighted_update": ff.fedavgm_weighted_update,
    "fedadagrad_weighted_update": ff.fedadagrad_weighted_update,
    "fedadam_weighted_update": ff.fedadam_weighted_update,
    "fedyogi_weighted_update": ff.fedyogi_weighted_update,
}
STATE = ff.init_server_state(TREE)
UPDATES = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
BAD_ROUNDS = {
    "integer parameters": ({"params": {"w": jnp.ones(3, int), "b": 1.0}}, TypeError, "params['w']", "int32", "float"),
    "structure": ({"params": {"w": jnp.ones(3)}}, ValueError, "state.first_moment", "PyTreeDef"),
    "shape": ({"params": {**TREE, "w": jnp.ones(2)}}, ValueError, "state.first_moment['w']", "(3,)", "(2,)"),
    "no state": ({"state": None}, TypeError, "state", "None", "init_server_state(params)"),
    "another state": ({"state": (0, TREE, TREE)}, TypeError, "state", "tuple", "init_server_state(params)"),
    "step": ({"state": STATE._replace(step=1.5)}, TypeError, "state.step", "float64", "int32"),
    "steps": ({"state": STATE._replace(step=jnp.ones(2, int))}, ValueError, "state.step", "(2,)", "scalar"),
    "moment structure": (
        {"state": STATE._replace(second_moment={"w": jnp.ones(3)})}, ValueError, "state.second_moment", "PyTreeDef",
    ),
    "low moment": (
        {"state": STATE._replace(first_moment=jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE))},
        TypeError, "state.first_moment['b']", "bfloat16", "float32",
    ),
    "updates structure": ({"updates": {"w": X}}, ValueError, "updates", "PyTreeDef"),
    "updates shape": ({"updates": {**UPDATES, "w": jnp.ones((4, 2))}}, ValueError, "updates['w']", "(4, 2)", "(4, 3)"),
    "updates of one": ({"updates": TREE}, ValueError, "updates['b']", "scalar"),
    "integer updates": ({"updates": {**UPDATES, "b": jnp.ones(4, int)}}, TypeError, "updates['b']", "int32", "float"),
    "weights": ({"weights": jnp.ones(3)}, ValueError, "weights", "(3,)", "(4,)"),
    "where": ({"where": jnp.ones(4)}, TypeError, "where", "float32", "bool"),
    "rate": ({"learning_rate": jnp.ones(2)}, ValueError, "learning_rate", "(2,)", "scalar"),
    "NaN rate": ({"learning_rate": float("nan")}, ValueError, "learning_rate", "nan"),
}  # fmt: skip


@pytest.mark.parametrize("operation", SERVER)
@pytest.mark.parametrize("bad", BAD_ROUNDS)
def test_server_rounds(operation, bad):
    options, kind, argument, *fragments = BAD_ROUNDS[bad]
    arguments = {"params": TREE, "state": STATE, "updates": UPDATES, "learning_rate": 0.1} | options
    call = lambda: SERVER[operation](**arguments)  # noqa: E731
    check_refused(call, *refusal(kind, operation, argument, *fragments))


@pytest.mark.parametrize(
    ("operation", "argument", "value"),
    [
        ("fedavgm_weighted_update", "momentum", -0.1), ("fedavgm_weighted_update", "momentum", 1.5),
        ("fedadagrad_weighted_update", "tau", -1e-3), ("fedadam_weighted_update", "b1", 2),
        ("fedadam_weighted_update", "b2", -1), ("fedyogi_weighted_update", "b2", float("nan")),
        ("fedyogi_weighted_update", "tau", -1.0),
    ],
)  # fmt: skip
def test_server_rates(operation, argument, value):
    call = lambda: SERVER[operation](TREE, STATE, UPDATES, learning_rate=0.1, **{argument: value})  # noqa: E731
    check_refused(call, *refusal(ValueError, operation, argument, str(value)))


def test_server_state():
    check_refused(
        lambda: ff.init_server_state({"n": jnp.ones(2, int)}),
        *refusal(TypeError, "init_server_state", "params['n']", "int32", "floating-point"),
    )
    check_refused(
        lambda: ff.init_server_state(TREE, tau=-1.0), *refusal(ValueError, "init_server_state", "tau", "-1.0")
    )


def test_every_public_operation_is_refused_something_here():
    elsewhere = {"topk_sparse_weighted_sum", "quantized_weighted_sum"}  # in test_compressed_errors.py
    tested = {*REDUCTIONS, *SERVER, *elsewhere, "accumulate_weighted", "stack_clients"} - RULES
    assert tested == {row.operation for row in ROWS if row.public}
    assert {*WITH_WHERE, *SERVER, *elsewhere} - RULES == {
        row.operation for row in ROWS if row.public and Kind.WHERE in row.arguments.values()
    }
    assert set(WITH_OUT_DTYPE) - RULES == {row.operation for row in ROWS if row.out_dtype}


# --- Values decide no error -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [-1, 2, 3, 2**31 - 1, -(2**31)])
def test_a_traced_trim_that_leaves_nobody_gives_nan(trim):
    got = jax.jit(ff.trimmed_mean)(X, jnp.int32(trim))
    assert np.isnan(got).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int16"])
def test_a_traced_trim_of_any_integer_dtype(dtype):
    assert np.asarray(jax.jit(ff.trimmed_mean)(X, jnp.asarray(1, dtype))).tolist() == [1.0, 1.0, 1.0]


def test_a_traced_trim_beyond_int32_gives_nan():
    with jax.enable_x64():
        for trim in (2**32, 2**32 + 1, -(2**32), 2**63 - 1):
            assert np.isnan(jax.jit(ff.trimmed_mean)(X, jnp.asarray(trim, jnp.int64))).all(), trim
        assert np.isnan(jax.jit(ff.trimmed_mean)(X, jnp.asarray(2**64 - 1, jnp.uint64))).all()
    assert np.isnan(jax.jit(ff.trimmed_mean)(X, jnp.uint32(2**32 - 1))).all()


def test_weights_that_cancel_give_no_silent_model():
    got = ff.weighted_mean(X, np.array([1.0, -1.0, 2.0, -2.0]))
    assert not np.isfinite(got).any()


def test_integer_weights_count_examples():
    updates = np.arange(12, dtype=np.float32).reshape(4, 3)
    for weights in ([3, 1, 0, 2], np.array([3, 1, 0, 2], np.uint8), jnp.array([True, False, True, True])):
        wanted = np.asarray(weights, np.float32) @ updates
        np.testing.assert_array_equal(ff.weighted_sum(updates, weights), wanted)


def test_zero_times_nan_is_nan():
    updates = X.at[1, 2].set(jnp.nan)
    for operation in (ff.weighted_sum, ff.weighted_mean):
        assert np.isnan(operation(updates, np.array([1.0, 0.0, 1.0, 1.0]))).tolist() == [False, False, True]


# --- The environment --------------------------------------------------------------------------------------------


def python(code, **environment):
    """Runs code in a fresh interpreter, with or without variables of the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDFUSE_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )


LOWERED = """
import jax, jax.numpy as jnp, fedfuse_jax as ff
for f in (ff.coordinate_median, ff.squared_norms):
    text = jax.jit(f).lower(jnp.ones((4, 3))).as_text()
    print(f.__name__, "custom call" if "fedfuse." in text else "definition", jnp.shape(f(jnp.ones((4, 3)))))
"""


def test_an_unknown_name_is_refused_at_import():
    done = python("import fedfuse_jax", FEDFUSE_DISABLE_KERNELS="coordinate_median,median")
    assert done.returncode != 0
    assert "ValueError: fedfuse_jax: FEDFUSE_DISABLE_KERNELS names 'median', which is no operation" in done.stderr
    assert "needs 1 or names out of: accumulate_weighted, client_dots, " in done.stderr


@pytest.mark.parametrize("value", ["1", "coordinate_median, squared_norms"])
def test_kernels_are_switched_off(value):
    done = python(LOWERED, FEDFUSE_DISABLE_KERNELS=value, PYTHONWARNINGS="error::UserWarning")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["coordinate_median definition (3,)", "squared_norms definition (4,)"]


def test_one_kernel_is_switched_off_and_the_other_is_not():
    from operations import has_kernel

    if not has_kernel("squared_norms"):
        pytest.skip("no compiled kernel to be left on")
    done = python(LOWERED, FEDFUSE_DISABLE_KERNELS="coordinate_median")
    said = done.stdout.splitlines()
    assert said == ["coordinate_median definition (3,)", "squared_norms custom call (4,)"], done.stderr


def test_show_versions(capsys):
    ff.show_versions()
    said = capsys.readouterr().out
    for word in ("fedfuse-jax", "python", "jax", "jaxlib", "numpy", "XLA FFI API", "cpu kernels", "cuda kernels"):
        assert any(line.startswith(word + " ") for line in said.splitlines()), f"{word}: {said}"
    assert jax.__version__ in said
    if "cpu kernels  loaded" in " ".join(said.split()) or "loaded, " in said:
        assert "instruction set" in said


def test_show_versions_says_what_is_disabled():
    done = python("import fedfuse_jax as ff; ff.show_versions()", FEDFUSE_DISABLE_KERNELS="trimmed_mean")
    assert done.stdout.splitlines()[-1].split() == ["FEDFUSE_DISABLE_KERNELS", "trimmed_mean"], done.stderr


def test_every_name_promised_is_there():
    assert all(hasattr(ff, name) for name in ff.__all__)
    assert ff.__all__ == sorted(ff.__all__)
