"""Exported programs: they travel, and whatever buffers they bring, the handlers refuse rather than crash."""

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from operations import CASES, Problem, has_kernel, one_array, to_jax
from tiers import most_arguments_first

import fedfuse_jax as ff
from fedfuse_jax import _core
from fedfuse_jax._core.lowering import as_attribute

each_case = pytest.mark.parametrize("case", CASES, ids=str)
fullest_case = most_arguments_first(CASES)


def exported(function, *arguments, platforms=None):
    """A program, after a round trip through bytes."""
    make = export.export(jax.jit(function), platforms=platforms, disabled_checks=ff.export_checks())
    return export.deserialize(make(*arguments).serialize())


# --- Round trips ------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.calls
def test_round_trip(case):
    values = case.sample(Problem())
    case.check(exported(case.call, *to_jax(values)).call(*to_jax(values)), values)


@fullest_case
def test_one_program_for_cpu_and_cuda(case):
    values = to_jax(case.sample(Problem()))
    program = exported(case.call, *values, platforms=("cpu", "cuda"))
    assert set(program.platforms) == {"cpu", "cuda"}
    case.check(program.call(*values), values)


@fullest_case
@pytest.mark.calls
def test_symbolic_number_of_parameters(case):
    scope = export.SymbolicScope()
    symbol = export.symbolic_shape("d", scope=scope)[0]
    sampled = to_jax(case.sample(Problem(shapes=one_array(7))))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(tuple(symbol if n == 7 else n for n in x.shape), x.dtype), sampled
    )
    program = exported(case.call, *shapes)
    for size in (7, 1, 100):
        values = case.sample(Problem(shapes=one_array(size)))
        case.check(program.call(*to_jax(values)), values)


@most_arguments_first([case for case in CASES if case.row.operation != "stack_clients"])
def test_symbolic_number_of_clients(case):
    """But for a trim by fraction, which is a matter of Python numbers."""
    scope = export.SymbolicScope()
    n, d = export.symbolic_shape("n, d", scope=scope)
    sampled = to_jax(case.sample(Problem(n_clients=11, shapes=one_array(7))))
    symbols = {11: n, 12: n + 1, 7: d}
    if "_median" in str(case) and "coordinate" not in str(case):
        pytest.skip("as many clients are bad as can be: a number that is known where the program is made")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(tuple(symbols.get(k, k) for k in x.shape), x.dtype), sampled)
    if case.row.operation == "trimmed_mean" and "trim_count" not in case.names:
        with pytest.raises(ValueError, match="trimmed_mean: the number of clients is symbolic"):
            exported(case.call, *shapes)
        return
    program = exported(case.call, *shapes)
    for n_clients, size in ((11, 7), (1, 3), (2, 1), (6, 20)):
        values = case.sample(Problem(n_clients=n_clients, shapes=one_array(size)))
        case.check(program.call(*to_jax(values)), values)


def test_the_gradient_travels_too():
    updates = to_jax(CASES[0].sample(Problem(shapes=one_array(4))))[0]["x"]
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(ff.coordinate_median(x))))
    got = exported(gradient, updates).call(updates)
    np.testing.assert_array_equal(got, jax.jit(gradient)(updates))


def test_export_checks_name_every_operation():
    names = {check._impl.removeprefix("custom_call:") for check in ff.export_checks()}
    assert names == {f"fedfuse.{operation}.v1" for operation in _core.OPERATIONS}


def test_without_exemptions_export_refuses_our_calls():
    if not has_kernel("coordinate_median"):
        pytest.skip("no compiled kernel: nothing to refuse")
    with pytest.raises(ValueError, match=r"fedfuse\.coordinate_median\.v1"):
        export.export(jax.jit(ff.coordinate_median))(jnp.ones((3, 4)))


# --- Wrong buffers ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NativeCall:
    """A custom call by hand: target, buffers and attributes, right or wrong."""

    operation: str
    operands: tuple
    results: tuple
    attributes: dict

    def run(self):
        results = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.results)
        call = jax.ffi.ffi_call(f"fedfuse.{self.operation}.v1", results)
        return jax.block_until_ready(jax.jit(lambda *operands: call(*operands, **self.attributes))(*self.operands))


def native_call(case, batch=()):
    """The call the factory makes for the case, taken from the traced program."""
    values = jax.tree.map(
        lambda x: np.broadcast_to(x, (*batch, *np.shape(x))).copy(),
        case.sample(Problem(n_clients=5, shapes=(("kernel", (4, 3)), ("bias", ())))),
    )
    function = case.call
    for _ in batch:
        function = jax.vmap(function)
    closed = jax.make_jaxpr(function)(*to_jax(values))
    (equation,) = [e for e in closed.jaxpr.eqns if e.primitive.name == f"fedfuse_{case.row.operation}"]
    # The program's other equations prepare operands (weights of ones, a trim count); any values will do for those.
    avals = [v.aval for v in equation.invars]
    operands = tuple(jnp.ones(aval.shape, aval.dtype) for aval in avals)
    operation, layout = _core.OPERATIONS[case.row.operation], equation.params["layout"]
    results = tuple(
        (aval.shape, aval.dtype) for aval in operation._abstract_values_with_workspace(*avals, layout=layout)
    )
    attributes = {name: as_attribute(value) for name, value in layout.attributes}
    attributes |= {"batch_dims": np.int32(layout.batch_dims), "num_leaves": np.int32(layout.num_leaves)}
    for spec in operation.operands(layout.attributes):
        if spec.optional:
            attributes[f"has_{spec.name}"] = np.bool_(spec.name in layout.optional)
    return NativeCall(case.row.operation, operands, results, attributes)


def replaced(sequence, position, *new):
    return (*sequence[:position], *new, *sequence[position + 1 :])


def bent_shapes(shape):
    """A shape of more or fewer dimensions, and every size a little and much too large, and nothing."""
    yield from ((*shape, 2), (1, *shape))
    if shape:
        yield from (shape[1:], shape[:-1])
    for axis, size in enumerate(shape):
        for wrong in (size + 1, size - 1, 0):
            yield replaced(shape, axis, wrong)


OTHER_DTYPES = ("int32", "uint8", "bool", "float16", "complex64", "float8_e4m3fn")


def wrong_calls(call):
    """(what is wrong, the wrong call), one mistake at a time."""
    operands, results = call.operands, call.results
    yield "no operands", dataclasses.replace(call, operands=())
    for i, operand in enumerate(operands):
        yield f"without operand {i}", dataclasses.replace(call, operands=replaced(operands, i))
        for dtype in OTHER_DTYPES:
            if dtype != operand.dtype:
                bent = operand.astype(dtype)
                yield f"operand {i} of {dtype}", dataclasses.replace(call, operands=replaced(operands, i, bent))
        for shape in bent_shapes(operand.shape):
            bent = jnp.ones(shape, operand.dtype)
            yield f"operand {i} of shape {shape}", dataclasses.replace(call, operands=replaced(operands, i, bent))
    yield "an operand too many", dataclasses.replace(call, operands=(*operands, jnp.ones(3)))
    yield "a result too many", dataclasses.replace(call, results=(*results, ((3,), np.dtype("float32"))))
    for i, (shape, dtype) in enumerate(results):
        if len(results) > 1:  # without any, XLA drops the call
            yield f"without result {i}", dataclasses.replace(call, results=replaced(results, i))
        for bent in bent_shapes(shape):
            yield f"result {i} of shape {bent}", dataclasses.replace(call, results=replaced(results, i, (bent, dtype)))
        for other in OTHER_DTYPES:
            if other != dtype:
                wrong = (shape, jnp.dtype(other))
                yield f"result {i} of {other}", dataclasses.replace(call, results=replaced(results, i, wrong))
    for name, value in call.attributes.items():
        others = {k: v for k, v in call.attributes.items() if k != name}
        yield f"without attribute {name}", dataclasses.replace(call, attributes=others)
        wrong_values = [not value] if isinstance(value, np.bool_) else [
            np.int32(n) for n in (-2, -(2**31), 2**31 - 1, int(value) + 1) if n != value
        ]  # fmt: skip
        for wrong in [*wrong_values, "text", np.zeros(3, np.float32)]:
            yield f"attribute {name} = {wrong!r}", dataclasses.replace(call, attributes={**others, name: wrong})


# Changes that make another right call: another dtype of leaf, a mode, a workspace of more bytes, a trim that is not
# looked at since it is an operand, leaves of any shape where no other buffer has their coordinates, an empty result
# (for which XLA calls nobody).
LEAVES = r"(operand|result) [01] of float16"
TRIM = r"attribute trim = np.int32\(\d+\)"
AROUND = r"attribute around_median = (True|False)"
ANY_SHAPE = r"operand [01] of shape \(5.*\)"
LARGER = r"result [13] of shape \((80, 2|1, 80|81,|400, 2|1, 400|401,)\)"
# What kernels only count the elements of: dimensions of size 1 more or less, a vector of another length for the same
# indices, a block larger than what there is.
FLAT_RESULT = r"result 0 of shape \((1, 3001|1, 1, 13|13,|1, 1, 13, 2|13, 2|5,)\)"
EMPTY_RESULT = r"result 0 of shape \((0,.*|.*, 0|.*, 0, 2)\)"
ANY_VECTOR = r"operand 2 of shape .*"
ONE_BLOCK = r"attribute block_size = np.int32\(2147483647\)"
RIGHT_ALL_THE_SAME = {
    "weighted_sum": rf"{LEAVES}|attribute divide = True",
    "weighted_mean": rf"{LEAVES}|attribute divide = False",
    "weighted_spread": r"operand [12] of float16|result [01] of float16",
    "squared_norms": rf"{LEAVES}|{ANY_SHAPE}|{LARGER}",
    "finite_clients": rf"{LEAVES}|{ANY_SHAPE}|result 0 of shape \(0,\)",
    "accumulate_weighted": r"operand [23] of float16",
    "stack_clients": r"nothing",
    "coordinate_median": rf"{LEAVES}|{TRIM}",
    "trimmed_mean": rf"{LEAVES}|{TRIM}",
    "client_dots": rf"operand [0123] of float16|{LARGER}",
    "selected_mean": rf"result [01] of float16|{TRIM}|{AROUND}",
    "spread_to_selected": rf"operand [23] of float16|{TRIM}|{AROUND}",
    "mean_around_median": rf"{LEAVES}|{TRIM}|{AROUND}",
    "pairwise_squared_distances": rf"{LEAVES}|{ANY_SHAPE}|{LARGER}",
    "mix_clients": LEAVES,
    "step_toward_clients": rf"{LEAVES}|{LARGER}",
    "client_norms": rf"{LEAVES}|{ANY_SHAPE}|result 1 of shape \((160, 2|1, 160|161,)\)",
    "clipped_weighted_sum": r"operand [01] of float16|result 3 of shape \((240, 2|1, 240|241,)\)",
    "noisy_weighted_sum": r"operand [01] of float16",
    "clipped_noisy_weighted_sum": r"operand [01] of float16|result 3 of shape \((240, 2|1, 240|241,)\)",
    **dict.fromkeys(
        [f"fed{rule}_weighted_update" for rule in ("avgm", "adagrad", "adam", "yogi")],
        r"operand [78] of float16|attribute rule = np.int32\([0123]\)|result 7 of shape \(.*\)",
    ),
    "topk_sparse_weighted_sum": rf"operand 0 of float16|{FLAT_RESULT}|result 1 of shape .*",
    "sparse_spread": rf"result 0 of float16|{ANY_VECTOR}|{EMPTY_RESULT}",
    "sparse_dots": rf"operand 0 of float16|{ANY_VECTOR}|{EMPTY_RESULT}",
    "quantized_weighted_sum": rf"operand [12] of shape \(5,\)|{FLAT_RESULT}|{EMPTY_RESULT}|{ONE_BLOCK}",
    "quantized_dots": rf"operand (1 of shape \(5,|2 of shape (\(1, 1, |\()37,?)\)|{FLAT_RESULT}|{EMPTY_RESULT}|"
    + ONE_BLOCK,
}


FULLEST = [case for case in CASES if case.variant == case.row.variants[-1]]


def refusal(call):
    """What the handler says against a call; None if it runs."""
    try:
        call.run()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", FULLEST, ids=str)
@pytest.mark.parametrize("third", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [(), pytest.param((2,), marks=pytest.mark.full)], ids=["single", "batched"])
def test_wrong_buffers_are_refused(case, batch, third):
    """INVALID_ARGUMENT for each, naming the operation; a crash would end the tests.

    Each is a compile: the quick tier makes a third of them, of every operation another.
    """
    if not has_kernel(case.row.operation):
        pytest.skip(f"no compiled kernel of {case.row.operation}: nothing to refuse")
    call = native_call(case, batch)
    call.run()
    accepted = []
    first = (third + FULLEST.index(case)) % 3
    for what, wrong in itertools.islice(wrong_calls(call), first, None, 3):
        message = refusal(wrong)
        if message is None:
            accepted.append(what)
        else:
            assert "INVALID_ARGUMENT" in message, f"{what}: {message}"
            assert f"fedfuse {call.operation}: " in message, f"{what}: {message}"
    if not batch:  # shapes are named for the single call
        right = RIGHT_ALL_THE_SAME[case.row.operation]
        assert [what for what in accepted if not re.fullmatch(right, what)] == []


@pytest.mark.parametrize("num_bits", [8, 4])
def test_codes_that_are_too_few_for_their_coordinates_are_refused(num_bits):
    """Where the number of coordinates is said, the codes do not say it themselves."""
    if not has_kernel("quantized_weighted_sum"):
        pytest.skip("no compiled kernel: nothing to refuse")
    codes, per_client = np.ones((3, 37 * num_bits // 8 + (num_bits == 4)), np.uint8), np.ones(3, np.float32)
    options = {"num_bits": num_bits, "num_params": 37}
    case = types.SimpleNamespace(
        row=types.SimpleNamespace(operation="quantized_weighted_sum"),
        sample=lambda problem: (codes, per_client, per_client, per_client),
        call=lambda *arrays: ff.quantized_weighted_sum(*arrays, **options),
    )
    call = native_call(case)
    call.run()
    (place,) = [i for i, operand in enumerate(call.operands) if operand.dtype == np.uint8]
    short = call.operands[place][..., :-1]
    message = refusal(dataclasses.replace(call, operands=replaced(call.operands, place, short)))
    assert message is not None
    assert "do not fit together" in message


@pytest.mark.parametrize("case", FULLEST, ids=str)
def test_a_batch_that_is_too_small_is_refused(case):
    """Each operand has all of the batch or one element for all of it; a kernel would read past anything between."""
    if not has_kernel(case.row.operation):
        pytest.skip(f"no compiled kernel of {case.row.operation}: nothing to refuse")
    call = native_call(case, batch=(3,))
    call.run()
    for i, operand in enumerate(call.operands):
        if operand.shape[0] == 1:  # a constant, shared by the whole batch
            continue
        message = refusal(dataclasses.replace(call, operands=replaced(call.operands, i, operand[:2])))
        assert message is not None, f"operand {i}"
        assert "INVALID_ARGUMENT" in message, f"operand {i}: {message}"


@pytest.mark.skipif(not has_kernel("noisy_weighted_sum"), reason="no handler to refuse")
@pytest.mark.parametrize("shape", [(1, 0, 3), (1, 2, 3)], ids=["no levels", "nothing but zeros"])
def test_blocks_that_say_nothing_are_refused(shape):
    """What is read from data is looked at where it is used: divided by, these numbers ended the process."""
    keys, blocks = jnp.zeros((1, 2), np.uint32), jnp.zeros(shape, np.uint32)
    operands = (jnp.ones((3, 4)), jnp.ones(3), keys, jnp.float32(1), blocks)
    flags = {"clip": False, "noise": True, "has_where": False, "has_blocks": True}
    attributes = {"batch_dims": np.int32(0), "num_leaves": np.int32(1), **flags}
    said = refusal(NativeCall("noisy_weighted_sum", operands, (((4,), np.dtype(np.float32)),), attributes))
    assert said.startswith("INVALID_ARGUMENT: fedfuse noisy_weighted_sum: blocks")
