"""The optimized programs: one custom call an operation, and around it nothing as large as the updates."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import CASES, Kind, Problem, has_kernel, one_array, to_jax
from tiers import by_id, checkerboard, most_arguments_first

fullest_case = most_arguments_first(CASES)

# Leaves of the same size, so that "as large as the updates" means any of them.
N_CLIENTS, SIZE = 8, 600
TREE = Problem(n_clients=N_CLIENTS, shapes=(("a", (20, 30)), ("b", (600,)), ("c", (3, 2, 100))))
ARRAY = Problem(n_clients=N_CLIENTS, shapes=one_array(SIZE))


@pytest.fixture(autouse=True)
def _kernel(case):
    if not has_kernel(case.row.operation):
        pytest.skip(f"no compiled kernel of {case.row.operation}: build the package to read its programs")


def compiled_text(function, values):
    return jax.jit(function).lower(*to_jax(values)).compile().as_text()


def check_program(text, case, least=N_CLIENTS * SIZE):
    assert hlo.custom_calls(text) == [f"fedfuse.{case.row.operation}.v1"]
    assert not hlo.large_arrays(text, least)


def stacked(case, problem, *batch):
    """The arguments with leading batch axes."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (*batch, *np.shape(x))).copy(), case.sample(problem))


@checkerboard(problem={"tree": TREE, "array": ARRAY}, case=by_id(CASES))
@pytest.mark.calls
def test_one_call_for_the_whole_tree(case, problem):
    check_program(compiled_text(case.call, case.sample(problem)), case)


@checkerboard(dtype=by_id(["bfloat16", "mixed"]), case=by_id(CASES))
def test_no_conversion_around_the_call(case, dtype):
    check_program(compiled_text(case.call, case.sample(Problem(N_CLIENTS, TREE.shapes, dtype))), case)


@fullest_case
@pytest.mark.calls
def test_one_call_under_vmap(case):
    check_program(compiled_text(jax.vmap(case.call), stacked(case, TREE, 3)), case)


@fullest_case
def test_one_call_under_nested_vmap(case):
    check_program(compiled_text(jax.vmap(jax.vmap(case.call)), stacked(case, TREE, 2, 3)), case)


@fullest_case
def test_shared_arguments_are_not_broadcast(case):
    """With all arguments but the first shared, nothing of the batch's size is made of them."""
    if len(case.names) == 1:
        pytest.skip("it has one argument")
    single, batched = case.sample(TREE), stacked(case, TREE, 3)
    in_axes = (0, *[None] * (len(case.names) - 1))
    # Where the first argument is large, its size; else that of the shared updates, which must not be copied.
    check_program(compiled_text(jax.vmap(case.call, in_axes), (batched[0], *single[1:])), case)


@fullest_case
def test_shared_updates_are_not_broadcast(case):
    """Mapped over everything but the updates: they are read where they are, again and again."""
    kinds = [case.row.arguments[name] for name in case.names]
    large = (Kind.STACKED, Kind.CLIENTS, Kind.ENTRIES, Kind.INDICES, Kind.CODES, Kind.LEVELS)
    mapped = [kind not in large for kind in kinds]
    if not any(mapped):
        pytest.skip("it has no other argument")
    single, batched = case.sample(TREE), stacked(case, TREE, 3)
    values = [batched[i] if mapped[i] else single[i] for i in range(len(kinds))]
    in_axes = tuple(0 if m else None for m in mapped)
    check_program(compiled_text(jax.vmap(case.call, in_axes), values), case)


@fullest_case
def test_only_a_mapped_axis_is_moved(case):
    """Mapped over their last axis, the leaves are transposed, once each, and nothing else is made."""
    batched = jax.tree.map(lambda x: np.moveaxis(x, 0, -1), stacked(case, ARRAY, 3))
    text = compiled_text(jax.vmap(case.call, -1), batched)
    assert hlo.custom_calls(text) == [f"fedfuse.{case.row.operation}.v1"]
    large_operands = sum(np.size(leaf) >= 3 * SIZE for leaf in jax.tree.leaves(batched))
    large = hlo.large_arrays(text, 3 * SIZE)
    assert len(large) <= large_operands, large


@most_arguments_first([case for case in CASES if case.differentiable])
@pytest.mark.calls
def test_the_pull_back_makes_the_cotangents_and_nothing_else(case):
    """Rule 9: no array as large as the updates but the cotangents of the large arguments."""
    values = to_jax(case.sample(ARRAY))

    def pull_back(cotangents, *values):
        primals, with_these = case.split(values, case.differentiable)
        return jax.vjp(lambda *varied: case.call(*with_these(*varied)), *primals)[1](cotangents)

    results = jax.eval_shape(case.call, *values)
    cotangents = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), results)
    text = jax.jit(pull_back).lower(cotangents, *values).compile().as_text()
    primals, _ = case.split(values, case.differentiable)
    large = [leaf for leaf in jax.tree.leaves(primals) if leaf.size >= N_CLIENTS * SIZE]
    assert len(hlo.large_arrays(text, N_CLIENTS * SIZE)) <= len(large)
