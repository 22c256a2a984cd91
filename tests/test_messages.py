"""Things that look like arguments and are none: refused by name, for a reason that is true."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_errors import REDUCTIONS, SERVER, STATE, TREE, UPDATES, X, check_refused, refusal

import fedfuse_jax as ff

MASKED = np.ma.masked_equal(np.arange(12, dtype=np.float32).reshape(4, 3), 5)


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("updates", [MASKED, {"w": MASKED}], ids=["array", "leaf"])
def test_masked_updates(operation, updates):
    argument = "updates" if updates is MASKED else "updates['w']"
    call = lambda: REDUCTIONS[operation](updates)  # noqa: E731
    check_refused(call, *refusal(TypeError, operation, argument, "masked array (float32[4,3])", "filled", "where"))


@pytest.mark.parametrize("value", [np.ma.masked_equal([1.0, 2.0, 3.0, 4.0], 2), [1.0, np.ma.masked, 3.0, 4.0]], ids=str)
def test_masked_weights(value):
    call = lambda: ff.weighted_sum(X, value)  # noqa: E731
    check_refused(call, *refusal(TypeError, "weighted_sum", "weights", "masked array", "filled"))


def test_masked_where():
    where = np.ma.masked_equal([True, True, False, True], False)
    call = lambda: ff.weighted_sum(X, np.ones(4), where=where)  # noqa: E731
    check_refused(call, *refusal(TypeError, "weighted_sum", "where", "masked array (bool[4])"))


@pytest.mark.parametrize("operation", SERVER)
@pytest.mark.parametrize("rate", [float("nan"), np.float32("nan"), np.array(np.nan)], ids=repr)
def test_a_rate_that_is_none(operation, rate):
    call = lambda: SERVER[operation](TREE, STATE, UPDATES, learning_rate=rate)  # noqa: E731
    check_refused(call, *refusal(ValueError, operation, "learning_rate", "is nan", "to be a number."))


@pytest.mark.parametrize("bound", [np.array(-1.0), np.array(np.nan, np.float16), jnp.bfloat16(-2)], ids=repr)
def test_the_range_of_numbers_in_arrays(bound):
    with pytest.raises(ValueError, match=r"^clipped_weighted_sum: max_norm is .*; it needs to be at least 0\."):
        ff.clipped_weighted_sum(X, np.ones(4), np.asarray(bound))


# --- Lists of numbers -------------------------------------------------------------------------------------------

LISTS = {"ragged": [[1.0, 2.0], [3.0]], "even": [[1.0, 2.0], [3.0, 4.0]], "flat": [1, 2.0], "tuple": ((1.0, 2.0), 3.0)}


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("updates", LISTS.values(), ids=LISTS)
def test_lists_of_numbers(operation, updates):
    call = lambda: REDUCTIONS[operation](updates)  # noqa: E731
    check_refused(
        call, *refusal(TypeError, operation, "updates", str(updates), "Python numbers", "arrays", "jnp.array")
    )


def test_a_client_that_is_a_list_of_numbers():
    call = lambda: ff.stack_clients([[1.0, 2.0], [3.0]])  # noqa: E731
    check_refused(call, *refusal(TypeError, "stack_clients", "updates[0]", "[1.0, 2.0]", "jnp.array"))


def test_numbers_that_are_leaves():
    """A number in a dictionary is a scalar parameter, and lists may hold arrays."""
    stacked = ff.stack_clients([{"b": 1.0}, {"b": 2.0}])
    assert stacked["b"].tolist() == [1.0, 2.0]
    assert ff.weighted_mean([X, X])[1].tolist() == [1.0] * 3


# --- Options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["clipped_weighted_sum", "clipped_noisy_weighted_sum"])
@pytest.mark.parametrize("value", ["no", 0, 1, None, np.array(True), jnp.array(True)], ids=repr)
def test_truth_values(operation, value):
    call = lambda: REDUCTIONS[operation](X, return_norms=value)  # noqa: E731
    check_refused(call, *refusal(TypeError, operation, "return_norms", "True or False"))


def test_truth_values_of_numpy():
    total, norms = ff.clipped_weighted_sum(X, np.ones(4), 1.0, return_norms=np.True_)
    assert (total.shape, norms.shape) == ((3,), (4,))


def test_every_option_that_is_true_or_false_is_asked_of():
    options = {
        (name, option.name)
        for name in ff.__all__
        if callable(getattr(ff, name)) and name != "ServerState"
        for option in inspect.signature(getattr(ff, name)).parameters.values()
        if isinstance(option.default, bool)
    }
    assert options == {("clipped_weighted_sum", "return_norms"), ("clipped_noisy_weighted_sum", "return_norms")}


# --- Names of mesh axes -----------------------------------------------------------------------------------------

NAMED = {
    name: call for name, call in REDUCTIONS.items() if "axis_name" in inspect.signature(getattr(ff, name)).parameters
}
NAMED |= {
    name: lambda updates, call=call, **options: call(
        jnp.zeros(3), ff.init_server_state(jnp.zeros(3)), updates, learning_rate=0.1, **options
    )
    for name, call in SERVER.items()
}  # fmt: skip
BAD_NAMES = {
    "number": (3, TypeError, "3"),
    "zero": (0, TypeError, "0"),
    "truth": (True, TypeError, "True"),
    "float": (1.5, TypeError, "1.5"),
    "empty": ("", ValueError, "''"),
    "unbound": ("nowhere", ValueError, "'nowhere'"),
    "one unbound": (("p", "nowhere"), ValueError, "('p', 'nowhere')"),
    "twice": (("p", "p"), ValueError, "('p', 'p')"),
    "number among names": (("p", 0), TypeError, "('p', 0)"),
    "dict": ({"p": 1}, TypeError, "{'p': 1}"),
}


def test_every_operation_with_names_is_here():
    takes_names = {
        name
        for name in ff.__all__
        if callable(getattr(ff, name)) and "axis_name" in inspect.signature(getattr(ff, name)).parameters
    }
    assert set(NAMED) == takes_names


@pytest.mark.parametrize("operation", NAMED)
@pytest.mark.parametrize("bad", BAD_NAMES)
def test_names_inside_a_shard_map(operation, bad):
    name, kind, got = BAD_NAMES[bad]
    call = lambda x: NAMED[operation](x, axis_name=name)  # noqa: E731
    mapped = jax.shard_map(
        call, mesh=jax.make_mesh((2,), ("p",), devices=jax.devices()[:2]), in_specs=P(), out_specs=P()
    )
    with pytest.raises(kind) as caught:
        jax.eval_shape(mapped, X)
    said = str(caught.value)
    assert said.startswith(f"{operation}: axis_name is {got}"), said
    assert "needs" in said, said
    assert "(here: 'p')" in said, said


@pytest.mark.parametrize("operation", NAMED)
@pytest.mark.parametrize("name", ["p", "", 0, ("p",)], ids=repr)
def test_names_outside(operation, name):
    kind = TypeError if name == 0 else ValueError
    call = lambda: NAMED[operation](X, axis_name=name)  # noqa: E731
    check_refused(call, *refusal(kind, operation, "axis_name", repr(name), "(here: none)"))


@pytest.mark.parametrize("operation", NAMED)
def test_names_one_in_a_tuple_and_in_a_list(operation):
    """And no names are no axes."""
    mesh = jax.make_mesh((2,), ("p",), devices=jax.devices()[:2])
    shapes_of = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    shapes = shapes_of(jax.eval_shape(lambda: NAMED[operation](X)))
    for name in ("p", ("p",), ["p"], ()):
        call = lambda x, name=name: NAMED[operation](x, axis_name=name)  # noqa: E731
        mapped = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        assert shapes_of(jax.eval_shape(mapped, X)) == shapes


def test_a_name_of_a_vmap():
    got = jax.vmap(lambda x: ff.squared_norms(x, axis_name="parts"), axis_name="parts")(jnp.ones((2, 4, 3)))
    assert got.tolist() == [[6.0] * 4] * 2
