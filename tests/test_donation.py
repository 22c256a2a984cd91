"""What is donated is updated where it is: the streaming mean, and the server optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operations import has_kernel

import fedfuse_jax as ff

UPDATE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2), "low": jnp.ones(5, jnp.bfloat16)}


def zeros():
    return jax.tree.map(lambda x: jnp.zeros(x.shape), UPDATE)


@pytest.mark.skipif(not has_kernel("accumulate_weighted"), reason="XLA decides where a definition's result goes")
def test_a_donated_total_keeps_its_buffers():
    step = jax.jit(ff.accumulate_weighted, donate_argnums=0)
    total = zeros()
    before = {name: leaf.unsafe_buffer_pointer() for name, leaf in total.items()}
    after = step(total, UPDATE, 3.0)
    assert {name: leaf.unsafe_buffer_pointer() for name, leaf in after.items()} == before
    assert all(leaf.is_deleted() for leaf in total.values())
    oracle.assert_matches(after, oracle.accumulate_weighted(zeros(), UPDATE, 3.0))


def test_a_total_that_is_not_donated_stays():
    total = zeros()
    after = jax.jit(ff.accumulate_weighted)(total, UPDATE, 3.0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(total))
    oracle.assert_matches(after, oracle.accumulate_weighted(zeros(), UPDATE, 3.0))


def test_a_stream_of_low_precision_keeps_its_digits():
    """A thousand updates of 1.001 in bfloat16, where a bfloat16 sum ends at 256. One rounding a step: 1000 · 6e-8."""
    update = jnp.full(3, 1.001, jnp.bfloat16)
    total = jax.lax.fori_loop(0, 1000, lambda _, t: ff.accumulate_weighted(t, update, 0.5), jnp.zeros(3))
    np.testing.assert_allclose(total, 500 * float(update[0]), rtol=6e-5)


def test_the_total_may_be_the_update():
    """The same buffer twice, once donated: XLA must copy, and does."""
    value = jnp.arange(4.0)
    got = jax.jit(lambda x: ff.accumulate_weighted(x, x, 2.0), donate_argnums=0)(value)
    np.testing.assert_array_equal(got, 3 * np.arange(4.0))


def test_streaming_is_the_weighted_sum():
    updates = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    weights = np.arange(7, dtype=np.float32)
    total = jnp.zeros(50)
    for update, weight in zip(updates, weights, strict=True):
        total = ff.accumulate_weighted(total, update, weight)
    oracle.assert_matches(total, oracle.weighted_sum(updates, weights))


def many_leaves(count):
    """A server optimizer's arguments for a model of many small leaves."""
    params = {f"leaf {i}": jnp.full(4, 1.0 * i) for i in range(count)}
    updates = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params)
    return params, ff.init_server_state(params), updates


def fedadam(params, state, updates):
    return ff.fedadam_weighted_update(params, state, updates, learning_rate=0.1)


@pytest.mark.skipif(not has_kernel("fedadam_weighted_update"), reason="XLA decides where a definition's result goes")
def test_a_model_of_many_leaves_is_compiled_with_little_ado_and_updated_in_place():
    """Without the side effect, XLA takes the cube of the leaves to compile this: for 300, 4 s instead of 1."""
    params, state, updates = many_leaves(300)
    lowered = jax.jit(fedadam, donate_argnums=(0, 1)).lower(params, state, updates)
    (call,) = [line for line in lowered.as_text().splitlines() if "@fedfuse.fedadam_weighted_update.v1" in line]
    assert "has_side_effect = true" in call
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    after = lowered.compile()(params, state, updates)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_in_place_on_several_devices():
    """XLA's partitioner meets the calls of an export, and refuses what has side effects."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    arguments = many_leaves(3)
    wanted = jax.jit(fedadam)(*arguments)
    params, state, updates = (
        jax.tree.map(lambda x, lead=lead: jax.device_put(x, NamedSharding(mesh, lead if x.ndim else P())), tree)
        for tree, lead in zip(arguments, (P("x"), P("x"), P(None, "x")), strict=True)
    )
    program = export.export(jax.jit(fedadam), disabled_checks=ff.export_checks())(params, state, updates)
    assert program.nr_devices == 4
    for step in (jax.jit(fedadam), export.deserialize(program.serialize()).call):
        got = jax.jit(step)(params, state, updates)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
