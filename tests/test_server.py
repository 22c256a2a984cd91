"""Server optimizers: rounds that do not count, buffers in place, published numbers, sharding."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operations import has_kernel
from test_battery import assert_same_bits

import fedfuse_jax as ff
from fedfuse_jax import reference
from fedfuse_jax._core import OPERATIONS

RULES = [
    ff.fedavgm_weighted_update, ff.fedadagrad_weighted_update, ff.fedadam_weighted_update, ff.fedyogi_weighted_update,
]  # fmt: skip
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)

PARAMS = {
    "w": jnp.linspace(-1, 1, 5003),
    "low": jnp.ones((3, 7), jnp.bfloat16),
    "none": jnp.ones((0,)),
    "b": jnp.ones(()),
}


def updates_of(n_clients, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), (n_clients, *x.shape)).astype(x.dtype), PARAMS)


def some_state(rule):
    """A state after two rounds."""
    params, state = PARAMS, ff.init_server_state(PARAMS)
    for seed in range(2):
        params, state = rule(params, state, updates_of(3, seed), learning_rate=0.1)
    return params, state


# --- Rounds that do not count -----------------------------------------------------------------------------------


def bad_rounds():
    good = updates_of(3)
    spoiled = lambda leaf, value: {**good, leaf: good[leaf].at[(1,) + (0,) * (good[leaf].ndim - 1)].set(value)}  # noqa: E731
    yield "NaN", spoiled("w", jnp.nan), {}
    yield "inf in another leaf", spoiled("b", jnp.inf), {}
    yield "low precision", spoiled("low", -jnp.inf), {}
    yield "nobody", good, {"where": jnp.zeros(3, bool)}
    yield "weights cancel", good, {"weights": jnp.array([1.0, -1.0, 0.0])}
    yield "NaN weight", good, {"weights": jnp.array([1.0, jnp.nan, 1.0])}
    yield "overflow", {**good, "w": jnp.full((3, 5003), 3e38)}, {}
    # A mean that is finite, but not what is made of it: the square, and without one the step.
    yield "square or step", spoiled("b", 1e30), {"learning_rate": 1e20}
    yield "infinite rate", good, {"learning_rate": jnp.inf}
    yield "NaN rate", good, {"learning_rate": jnp.nan}


@each_rule
@pytest.mark.parametrize("bad", list(bad_rounds()), ids=lambda bad: bad[0])
def test_a_bad_round_changes_nothing(rule, bad):
    params, state = some_state(rule)
    _, updates, options = bad
    step = jax.jit(rule, donate_argnums=(0, 1))  # in place: nothing may be written before all is judged
    got = step(*jax.tree.map(jnp.copy, (params, state)), updates, **{"learning_rate": 0.1, **options})
    assert_same_bits(got, (params, state))
    assert int(got[1].step) == 2
    assert_same_bits(
        jax.jit(rule_of(reference, rule))(params, state, updates, **{"learning_rate": 0.1, **options}), got
    )


def rule_of(module, rule):
    return getattr(module, rule.__name__)


@each_rule
@pytest.mark.parametrize(("dtype", "rate"), [(jnp.float16, 1e5), (jnp.bfloat16, 3.397e38)])
def test_a_parameter_that_overflows_as_it_is_rounded_is_refused(rule, dtype, rate):
    params, updates = jnp.zeros(300, dtype), jnp.zeros((1, 300)).at[0, 298].set(1)
    rates = {"tau": 0.0} if rule is not ff.fedavgm_weighted_update else {}
    rates |= {"b1": 0.0} if rates else {}
    rates |= {"b2": 0.0} if rule in (ff.fedadam_weighted_update, ff.fedyogi_weighted_update) else {}
    state = ff.init_server_state(params, tau=0.0)
    for scale, moves in ((1, False), (0.5, True)):
        new, after = rule(params, state, updates, learning_rate=scale * rate, **rates)
        assert (int(after.step), bool(new[298] > 0)) == (moves, moves)
        assert bool(jnp.all(jnp.isfinite(new)))


@each_rule
@pytest.mark.parametrize("spoiled", ["params", "first_moment", "second_moment"])
def test_what_is_not_finite_already_lets_no_round_through(rule, spoiled):
    params, state = jnp.ones(9).at[4].set(jnp.inf if spoiled == "params" else 1), ff.init_server_state(jnp.ones(9))
    if spoiled != "params":
        state = state._replace(**{spoiled: jnp.ones(9).at[4].set(jnp.nan)})
    got = rule(params, state, jnp.ones((3, 9)), learning_rate=0.1)
    assert_same_bits(got, (params, state))


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", [ff, reference], ids=["fedfuse", "definition"])
def test_a_huge_update_does_not_stop_a_coordinate_for_good(rule, module):
    step = rule_of(module, rule)
    params = jnp.zeros(2)
    state = ff.init_server_state(params)
    params, state = step(params, state, jnp.array([[1.0, 2e20]]), learning_rate=0.1)
    assert (params.tolist(), int(state.step)) == ([0, 0], 0)
    params, state = step(params, state, jnp.ones((1, 2)), learning_rate=0.1)
    assert int(state.step) == 1
    assert bool(jnp.all(params > 0))


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", [ff, reference], ids=["fedfuse", "definition"])
def test_without_tau_what_does_not_move_stays_where_it_is(rule, module):
    params, updates = jnp.arange(300.0), jnp.zeros((2, 300)).at[:, 7].set(1).at[:, 11].set(1e-30)
    for dtype in (jnp.float32, jnp.bfloat16):
        start = params.astype(dtype)
        state = ff.init_server_state(start, tau=0.0)
        got, after = rule_of(module, rule)(start, state, updates, learning_rate=1.0, tau=0.0)
        assert int(after.step) == 1
        assert np.flatnonzero(got != start).tolist() == [7]  # the square of 1e-30 is 0 as well


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", [ff, reference], ids=["fedfuse", "definition"])
@pytest.mark.parametrize("tau", [0.0, 1e-3])
def test_gradients_are_finite_where_nothing_has_moved_yet(rule, module, tau):
    params, updates = jnp.ones(3), jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    state = ff.init_server_state(params, tau=0.0)

    def loss(params, state, updates, rate, tau):
        of_state = ff.ServerState(jnp.zeros((), jnp.int32), *state)
        new, after = rule_of(module, rule)(params, of_state, updates, learning_rate=rate, tau=tau, b1=0.0)
        return jnp.sum(new) + jnp.sum(after.second_moment)

    gradients = jax.grad(loss, (0, 1, 2, 3, 4))(params, tuple(state[1:]), updates, 0.5, tau)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients))
    # At τ the step is linear at 0: η / τ for the mean of two.
    np.testing.assert_allclose(gradients[2][:, :2], 0.5 / tau / 2 if tau else 0.0, rtol=1e-5)


@each_rule
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_rounds_of_a_batch_are_judged_one_by_one(rule, shared):
    """Where all rounds start from one model, no result can take the place of its operand."""
    params, state = some_state(rule)
    rounds = [updates_of(3, 1), jax.tree.map(lambda x: x.at[1].set(jnp.nan), updates_of(3, 2)), updates_of(3, 3)]
    step = jax.jit(functools.partial(rule, learning_rate=0.1))
    for order in ((0, 1, 2), (1, 0, 2)):
        updates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[rounds[i] for i in order])
        start = (params, state) if shared else jax.tree.map(lambda x: jnp.stack([x] * 3), (params, state))
        got = jax.jit(jax.vmap(step, in_axes=(None if shared else 0,) * 2 + (0,)))(*start, updates)
        for place, i in enumerate(order):
            one = jax.tree.map(lambda x, place=place: x[place], got)
            assert_same_bits(one, (params, state) if i == 1 else step(params, state, rounds[i]))


@each_rule
def test_an_absent_client_s_nan_does_not_matter(rule):
    params, state = some_state(rule)
    updates = jax.tree.map(lambda x: x.at[1].set(jnp.nan), updates_of(3))
    where = jnp.array([True, False, True])
    kept = jax.tree.map(lambda x: x[jnp.array([0, 2])], updates)
    got = rule(params, state, updates, learning_rate=0.1, where=where)
    wanted = rule(params, state, kept, learning_rate=0.1)
    assert int(got[1].step) == 3
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-5)


def test_gradients_of_a_bad_round_are_finite():
    params, state = some_state(ff.fedadam_weighted_update)
    _, updates, _ = next(bad_rounds())

    def loss(params, updates, rate):
        new, _ = ff.fedadam_weighted_update(params, state, updates, learning_rate=rate)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(new))

    for_params, _, for_rate = jax.grad(loss, (0, 1, 2))(params, updates, 0.1)
    assert all(np.all(np.asarray(leaf, np.float32) == 1) for leaf in jax.tree.leaves(for_params))
    assert for_rate == 0


# --- Published numbers ------------------------------------------------------------------------------------------


def test_one_step_of_the_paper_s_adam():
    params, state = ff.fedadam_weighted_update(
        jnp.zeros(3), ff.init_server_state(jnp.zeros(3)), jnp.array([[0.5, -0.1, 1e-4]]), learning_rate=0.1
    )
    v = 0.99e-6 + 0.01 * np.array([0.5, 0.1, 1e-4]) ** 2
    np.testing.assert_allclose(params, 0.1 * 0.1 * np.array([0.5, -0.1, 1e-4]) / (np.sqrt(v) + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(state.second_moment, v, rtol=1e-5)


def test_momentum_has_no_second_moment():
    _, state = some_state(ff.fedavgm_weighted_update)
    assert_same_bits(state.second_moment, ff.init_server_state(PARAMS).second_moment)


def test_hyper_parameters_are_traced():
    traces = 0

    @jax.jit
    def step(params, state, updates, rates):
        nonlocal traces
        traces += 1
        return ff.fedadam_weighted_update(
            params, state, updates, learning_rate=rates[0], b1=rates[1], b2=rates[2], tau=rates[3]
        )

    params, state = PARAMS, ff.init_server_state(PARAMS)
    for rate in (0.1, 0.2):
        params, state = step(params, state, updates_of(2), jnp.array([rate, 0.9, 0.99, 1e-3]))
    assert traces == 1


def test_low_precision_parameters_are_rounded_once():
    params = jnp.full(64, 1.0, jnp.bfloat16)
    state = ff.init_server_state(params)
    assert state.first_moment.dtype == state.second_moment.dtype == jnp.float32
    updates = jnp.linspace(-0.01, 0.01, 64)[None]  # updates may be wider than the parameters
    got, _ = ff.fedavgm_weighted_update(params, state, updates, learning_rate=1.0)
    np.testing.assert_array_equal(got, (1.0 + updates[0]).astype(jnp.bfloat16))


# --- Memory -----------------------------------------------------------------------------------------------------


@each_rule
def test_donated_buffers_are_updated_in_place(rule):
    if not has_kernel(rule.__name__):
        pytest.skip("XLA decides where a definition's result goes")
    step = jax.jit(functools.partial(rule, learning_rate=0.1), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, some_state(rule))
    wanted = rule(params, state, updates_of(3, 5), learning_rate=0.1)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state)) if leaf.size]
    after = step(params, state, updates_of(3, 5))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after) if leaf.size] == before
    assert_same_bits(after, wanted)


@each_rule
def test_results_with_memory_of_their_own(rule, monkeypatch):
    """What a program gets that calls the handler without giving it the operands' buffers for the results."""
    if not has_kernel(rule.__name__):
        pytest.skip("no compiled kernel")
    params, state = some_state(rule)
    rounds = [updates_of(3, 1), jax.tree.map(lambda x: x.at[1].set(jnp.nan), updates_of(3, 2)), updates_of(3, 3)]
    arguments = params, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)

    def compiled():
        step = jax.vmap(functools.partial(rule, learning_rate=0.1), in_axes=(None, None, 0))
        return jax.jit(step).lower(*arguments).compile()

    with monkeypatch.context() as patch:
        patch.setattr(OPERATIONS[rule.__name__], "aliased", ())
        apart = compiled()
    in_place = compiled()
    assert ["output_to_operand_aliasing" in program.as_text() for program in (apart, in_place)] == [False, True]
    assert_same_bits(apart(*arguments), in_place(*arguments))


def test_one_call_for_the_whole_tree():
    if not has_kernel("fedadam_weighted_update"):
        pytest.skip("no compiled kernel")
    state = ff.init_server_state(PARAMS)
    step = jax.jit(functools.partial(ff.fedadam_weighted_update, learning_rate=0.1))
    text = step.lower(PARAMS, state, updates_of(3)).compile().as_text()
    assert hlo.custom_calls(text) == ["fedfuse.fedadam_weighted_update.v1"]


@each_rule
def test_a_coordinate_is_stepped_alike_wherever_it_stands(rule):
    if not has_kernel(rule.__name__):
        pytest.skip("XLA contracts products and sums differently for different sizes")
    params, updates = jax.random.normal(jax.random.key(0), (4099,)), jax.random.normal(jax.random.key(1), (3, 4099))
    state = ff.init_server_state(params)
    whole, _ = rule(params, state, updates, learning_rate=0.3)
    for first, width in ((0, 1), (5, 3), (1000, 64), (4096, 3), (17, 2049)):
        part = slice(first, first + width)
        cut_state = ff.ServerState(state.step, state.first_moment[part], state.second_moment[part])
        got, _ = rule(params[part], cut_state, updates[:, part], learning_rate=0.3)
        np.testing.assert_array_equal(got, whole[part])


# --- Several devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [None, jnp.nan, 1e30], ids=["good", "NaN", "square"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_every_device_hears_of_a_bad_coordinate(kind, spoil):
    """One NaN or overflow in one shard of one leaf: no device moves. The cost is one all-reduce."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(12)}
    updates = {"w": jnp.ones((3, 8, 4)), "b": jnp.full((3, 12), 2.0)}
    if spoil is not None:
        updates["b"] = updates["b"].at[1, 11].set(spoil)
    state = ff.init_server_state(params)
    wanted = ff.fedadam_weighted_update(params, state, updates, learning_rate=0.1)
    mesh = jax.make_mesh((4,), ("a",), (kind,))
    with jax.set_mesh(mesh):
        put = lambda tree, *lead: jax.tree.map(  # noqa: E731
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*lead, "a") if x.ndim else P())), tree
        )
        step = jax.jit(functools.partial(ff.fedadam_weighted_update, learning_rate=0.1))
        arguments = put(params), put(state), put(updates, None)
        compiled = step.lower(*arguments).compile()
        got = jax.device_get(compiled(*arguments))
    assert hlo.collectives(compiled.as_text()) == {"all-reduce": 1}
    assert int(got[1].step) == (1 if spoil is None else 0)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@each_rule
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_sharded_parameters_step_to_the_same_bits(kind, rule):
    if not has_kernel(rule.__name__):
        pytest.skip("XLA contracts products and sums differently for different sizes")
    updates = jax.random.normal(jax.random.key(1), (5, 64))
    params = 3 * updates[0]
    step = jax.jit(functools.partial(rule, learning_rate=0.1))
    params, state = step(params, ff.init_server_state(params), updates)
    wanted = jax.device_get(step(params, state, updates))
    mesh = jax.make_mesh((4,), ("a",), (kind,))
    with jax.set_mesh(mesh):
        put = lambda tree, *lead: jax.tree.map(  # noqa: E731
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*lead, "a") if x.ndim else P())), tree
        )
        assert_same_bits(jax.device_get(step(put(params), put(state), put(updates, None))), wanted)


def test_within_a_users_own_shard_map():
    params, updates = jnp.ones(8), jnp.ones((3, 8)).at[0, 7].set(jnp.inf)
    state = ff.init_server_state(params)
    mesh = jax.make_mesh((4,), ("a",), (AxisType.Auto,))
    specs = ff.ServerState(P(), P("a"), P("a"))
    step = jax.shard_map(
        lambda p, s, x: ff.fedavgm_weighted_update(p, s, x, learning_rate=1.0, axis_name="a"),
        mesh=mesh, in_specs=(P("a"), specs, P(None, "a")), out_specs=(P("a"), specs),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        for bad in (updates, updates.at[0, 7].set(3.4e38)):  # with Δ finite, the parameter alone overflows
            got, after = jax.jit(step)(params.at[7].set(3e38), state, bad)
            assert (np.asarray(got)[:7].tolist(), int(after.step)) == ([1.0] * 7, 0)
        got, after = jax.jit(step)(params, state, jnp.ones((3, 8)))
        assert (np.asarray(got).tolist(), int(after.step)) == ([2.0] * 8, 1)


@pytest.mark.parametrize("rule", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_the_greatest_step_stays(rule):
    """2³¹ − 1 and one more is no step before the first."""
    params, last = jnp.ones(4), np.int32(2**31 - 1)
    state = ff.init_server_state(params)._replace(step=jnp.asarray(last))
    update = getattr(ff, f"{rule}_weighted_update")
    moved, after = jax.jit(lambda p, s, u: update(p, s, u, learning_rate=1.0))(params, state, jnp.ones((2, 4)))
    assert after.step == last
    assert np.all(moved != params)
    mesh = jax.make_mesh((4,), ("a",), (AxisType.Auto,))
    here = jax.shard_map(
        lambda p, s, u: update(p, s, u, learning_rate=1.0, axis_name="a")[1].step,
        mesh=mesh,
        in_specs=(P("a"), ff.ServerState(P(), P("a"), P("a")), P(None, "a")),
        out_specs=P(),
    )
    assert here(params, state, jnp.ones((2, 4))) == last
