"""Four devices: the right value, and no collective but those that rule 4 of the contract allows.

The layouts shard parameters, clients or both, over one mesh axis or several, leaves differently.
"""

import contextlib
import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from operations import CASES, Kind, Problem, has_kernel, to_jax
from test_battery import assert_close, assert_same_bits
from tiers import by_id, checkerboard, tiered, with_most_arguments

import fedfuse_jax as ff
from fedfuse_jax import _core
from fedfuse_jax import _jax_internals as internals

SHAPES = (("kernel", (8, 4)), ("wide", (12,)), ("bias", ()))
PROBLEM = Problem(n_clients=8, shapes=SHAPES, values="apart")

# Each operation with the fewest and with the most of its arguments.
ENDS = [case for case in CASES if case.variant in (case.row.variants[0], case.row.variants[-1])]
FULL = [case for case in CASES if case.variant == case.row.variants[-1]]
each_operation = pytest.mark.parametrize("case", FULL, ids=str)
DIFFERENTIABLE = [case for case in FULL if case.differentiable]
MOST_ARGUMENTS = with_most_arguments(ENDS)

KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


ROWS_OF_CLIENTS = (Kind.WEIGHTS, Kind.WHERE, Kind.ENTRIES, Kind.INDICES, Kind.CODES, Kind.LEVELS, Kind.FACTORS)


def leaf_name(path):
    """The parameter that a leaf stands for; None for a whole array, or a number of the whole tree."""
    return getattr(path[-1], "key", None) if path else None


@dataclasses.dataclass(frozen=True)
class Layout:
    mesh_shape: tuple[int, ...]
    clients: object = None
    kernel: tuple = ()
    wide: tuple = ()

    def spec(self, kind, leaf=None):
        parameters = {"kernel": self.kernel, "wide": self.wide}.get(leaf, ())
        return {
            Kind.STACKED: P(self.clients, *parameters),
            **dict.fromkeys(ROWS_OF_CLIENTS, P(self.clients)),
            Kind.MIXING: P(None, self.clients),
        }.get(kind, P(*parameters))

    def specs(self, case, values):
        """A tree of specs like the arguments."""
        return tuple(
            jax.tree_util.tree_map_with_path(
                lambda path, _, name=name: self.spec(case.row.arguments[name], leaf_name(path)), value
            )
            for name, value in zip(case.names, values, strict=True)
        )


PARAMETERS = {
    "one axis": Layout((4,), kernel=("a",), wide=("a",)),
    "some leaves": Layout((4,), kernel=(None, "a")),
    "two axes": Layout((2, 2), kernel=("a", "b"), wide=(("a", "b"),)),
    "leaves differently": Layout((2, 2), kernel=("a", None), wide=("b",)),
}
CLIENTS = {
    "clients": Layout((4,), clients="a"),
    "clients over two axes": Layout((2, 2), clients=("a", "b")),
    "clients and parameters": Layout((2, 2), clients="a", kernel=("b",), wide=("b",)),
}
ANY = PARAMETERS | CLIENTS


@contextlib.contextmanager
def mesh_of(layout, kind=AxisType.Auto):
    if jax.device_count() < 4:
        pytest.skip("needs four devices: XLA was started before tests/conftest.py")
    mesh = jax.make_mesh(layout.mesh_shape, ("a", "b")[: len(layout.mesh_shape)], (kind,) * len(layout.mesh_shape))
    with jax.set_mesh(mesh):
        yield mesh


def place(mesh, layout, case, values):
    specs = layout.specs(case, values)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), values, specs)


def check_collectives(text, case, layout):
    found = hlo.collectives(text)
    if layout.clients is None:
        assert found == dict.fromkeys(case.row.collectives, 1)
    elif "clients" not in _core.OPERATIONS[case.row.operation].whole_axes and case.row.public:
        assert set(found) <= {"all-reduce"}


# --- Shardings that XLA or types say ----------------------------------------------------------------------------


def in_the_quick_tier(case, layout, kind):
    """With the most arguments every layout, on one kind of mesh each; with the fewest one layout, on both kinds."""
    return (case + layout + kind) % 2 == 0 if case in MOST_ARGUMENTS else case % len(ANY) == layout


@tiered(in_the_quick_tier, case=by_id(ENDS), layout=ANY, kind=KINDS)
@pytest.mark.calls
def test_jit(case, layout, kind):
    values = case.sample(PROBLEM)
    with mesh_of(layout, kind) as mesh:
        sharded = place(mesh, layout, case, values)
        compiled = jax.jit(case.call).lower(*sharded).compile()
        check_collectives(compiled.as_text(), case, layout)
        got = compiled(*sharded)
    case.check(got, values)
    if has_kernel(case.row.operation) and case.row.coordinate_wise and layout.clients is None:
        assert_same_bits(got, jax.jit(case.call)(*to_jax(values)))


@checkerboard(case=by_id(FULL), name=by_id(["two axes", "clients and parameters"]), kind=KINDS)
@pytest.mark.calls
def test_eager(case, name, kind):
    layout, values = ANY[name], case.sample(PROBLEM)
    with mesh_of(layout, kind) as mesh:
        case.check(case.call(*place(mesh, layout, case, values)), values)


@checkerboard(
    case=by_id(DIFFERENTIABLE),
    name=by_id(["leaves differently", "clients and parameters"]),
    kind=KINDS,
)
@pytest.mark.calls
def test_derivatives(case, name, kind):
    """The pull-back of sharded arguments gives what it gives on one device, without gathering any."""
    layout, values = ANY[name], case.sample(PROBLEM)

    def pull_back(values):
        primals, with_these = case.split(values, case.differentiable)
        results, pull = jax.vjp(lambda *varied: case.call(*with_these(*varied)), *primals)
        return pull(jax.tree.map(lambda x: x / (1 + abs(x)), results))

    wanted = jax.jit(pull_back)(to_jax(values))
    with mesh_of(layout, kind) as mesh:
        sharded = place(mesh, layout, case, values)
        compiled = jax.jit(pull_back).lower(sharded).compile()
        got = compiled(sharded)
    assert_close(got, wanted)
    if layout.clients is None:
        assert set(hlo.collectives(compiled.as_text())) <= {"all-reduce"}


@checkerboard(case=by_id(FULL), kind=KINDS)
def test_vmap_of_sharded_parameters(case, kind):
    """Mapped over the first argument alone: the others are shared, and stay as they are sharded."""
    layout, size = PARAMETERS["one axis"], 3
    samples = [case.sample(dataclasses.replace(PROBLEM, seed=seed)) for seed in range(size)]
    first = jax.tree.map(lambda *xs: np.stack(xs), *[values[0] for values in samples])
    rest = samples[0][1:]
    call = jax.vmap(case.call, (0, *[None] * len(rest)))
    with mesh_of(layout, kind) as mesh:
        specs = layout.specs(case, samples[0])
        first_specs = jax.tree.map(lambda spec: P(None, *spec), specs[0])
        sharded = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (first, *rest), (first_specs, *specs[1:])
        )
        compiled = jax.jit(call).lower(*sharded).compile()
        got = compiled(*sharded)
    assert hlo.collectives(compiled.as_text()) == dict.fromkeys(case.row.collectives, 1)
    for b in range(size):
        case.check(jax.tree.map(lambda x, b=b: x[b], got), (samples[b][0], *rest))


@pytest.mark.parametrize("case", [case for case in FULL if case.row.order_statistic], ids=str)
def test_order_statistics_of_sharded_clients_gather_nothing(case):
    """They move to a sharding of the parameters: no device ever holds all of the updates."""
    problem = Problem(n_clients=8, shapes=(("kernel", (64, 16)),))
    values, layout = case.sample(problem), CLIENTS["clients"]
    with mesh_of(layout) as mesh:
        sharded = place(mesh, layout, case, values)
        compiled = jax.jit(case.call).lower(*sharded).compile()
        case.check(compiled(*sharded), values)
    assert not hlo.large_arrays(compiled.as_text(), 8 * 64 * 16)


@each_operation
def test_uneven_shards(case):
    """Sizes that the mesh does not divide: XLA pads such arrays, and no sum may see the padding."""
    problem = Problem(n_clients=6, shapes=(("kernel", (7, 3)), ("wide", (5,)), ("bias", ())), values="apart")
    layout, values = Layout((4,)), case.sample(problem)
    uneven = {Kind.STACKED: P(None, "a"), Kind.CLIENTS: P("a"), Kind.CLIENT: P("a"), Kind.TOTAL: P("a")}

    def constrained(*values):
        def constrain(kind, x):
            spec = uneven.get(kind, P())
            return jax.lax.with_sharding_constraint(x, spec) if len(spec) <= x.ndim else x

        return case.call(
            *[
                jax.tree.map(functools.partial(constrain, case.row.arguments[name]), value)
                for name, value in zip(case.names, values, strict=True)
            ]
        )

    with mesh_of(layout):
        case.check(jax.jit(constrained)(*to_jax(values)), values)


# --- The user's own shard_map -----------------------------------------------------------------------------------


def result_specs(case, layout, values):
    """Where the results of parameter-sharded arguments lie."""
    results = jax.eval_shape(case.call, *to_jax(values))
    kind = Kind.STACKED if case.row.operation in ("stack_clients", "spread_to_selected") else Kind.CLIENT
    return jax.tree_util.tree_map_with_path(
        lambda path, _: layout.spec(kind, leaf_name(path)) if leaf_name(path) else P(), results
    )


# Blocks have the same noise unless the caller folds the shard's index into the key.
PUBLIC = [case for case in FULL if case.row.public and not case.row.random]
ALL_SHARDED = Problem(n_clients=8, shapes=SHAPES[:2], values="apart")


def call_in_shard_map(case, layout, mesh, values):
    options = {} if case.row.coordinate_wise else {"axis_name": tuple(mesh.axis_names)}
    return jax.shard_map(
        lambda *blocks: case.call(*blocks, **options),
        mesh=mesh,
        in_specs=layout.specs(case, values),
        out_specs=result_specs(case, layout, values),
        check_vma=True,
    )


@checkerboard(case=by_id(PUBLIC), name=by_id(["one axis", "two axes"]), kind=KINDS)
@pytest.mark.calls
def test_within_shard_map(case, name, kind):
    layout, values = PARAMETERS[name], case.sample(ALL_SHARDED)
    with mesh_of(layout, kind) as mesh:
        sharded = place(mesh, layout, case, values)
        compiled = jax.jit(call_in_shard_map(case, layout, mesh, values)).lower(*sharded).compile()
        case.check(compiled(*sharded), values)
    assert hlo.collectives(compiled.as_text()) == dict.fromkeys(case.row.collectives, 1)


@pytest.mark.parametrize("case", [case for case in PUBLIC if case.differentiable], ids=str)
@pytest.mark.calls
def test_gradient_within_and_of_shard_map(case):
    """Both ways round, the gradient of the sum of everybody's results is the gradient on one device."""
    layout, values = PARAMETERS["one axis"], case.sample(ALL_SHARDED)

    def loss_of(call):
        def loss(*varied, with_these):
            results = call(*with_these(*varied))
            return sum(jnp.sum(jnp.sqrt(1 + leaf**2)) for leaf in jax.tree.leaves(results))

        return loss

    def gradient(call, values):
        primals, with_these = case.split(values, case.differentiable)
        return jax.grad(functools.partial(loss_of(call), with_these=with_these), range(len(primals)))(*primals)

    wanted = jax.jit(functools.partial(gradient, case.call))(to_jax(values))
    with mesh_of(layout) as mesh:
        sharded = place(mesh, layout, case, values)
        outside = jax.jit(lambda *v: gradient(call_in_shard_map(case, layout, mesh, values), v))(*sharded)
        assert_close(outside, wanted)
        if not case.row.coordinate_wise:
            return  # every device would count the summed norms once more
        specs = layout.specs(case, values)
        varied_specs, _ = case.split(specs, case.differentiable)
        inside = jax.shard_map(
            lambda *blocks: gradient(case.call, blocks), mesh=mesh, in_specs=specs, out_specs=varied_specs
        )
        assert_close(jax.jit(inside)(*sharded), wanted)


@pytest.mark.parametrize("case", [case for case in PUBLIC if case.row.coordinate_wise], ids=str)
@pytest.mark.calls
def test_one_axis_manual_and_the_other_automatic(case):
    """The value only: XLA gathers over the automatic axis before it asks us."""
    layout, values = PARAMETERS["two axes"], case.sample(Problem(n_clients=8, shapes=SHAPES[:1], values="apart"))
    manual = Layout((2, 2), kernel=("a",))
    with mesh_of(layout) as mesh:
        sharded = place(mesh, layout, case, values)
        mapped = jax.shard_map(
            case.call, mesh=mesh, in_specs=manual.specs(case, values), out_specs=result_specs(case, manual, values),
            axis_names={"a"},
        )  # fmt: skip
        case.check(jax.jit(mapped)(*sharded), values)


@pytest.mark.parametrize("rule", ["weighted_sum", "clipped_weighted_sum", "noisy_weighted_sum"])
def test_one_mesh_axis_asked_for_twice(rule):
    """One leaf's clients lie where another leaf's parameters do: both the sum and its pull-back find a plan."""
    import fedfuse_jax as ff

    generator = np.random.default_rng(0)
    updates = {name: generator.standard_normal((4, 8)).astype(np.float32) for name in "xy"}
    weights = np.arange(1, 5, dtype=np.float32)
    call = {
        "weighted_sum": ff.weighted_sum,
        "clipped_weighted_sum": functools.partial(ff.clipped_weighted_sum, max_norm=1.0),
        "noisy_weighted_sum": lambda x, w: ff.noisy_weighted_sum(jax.random.key(0), x, w, 0.5),
    }[rule]

    def loss(*arguments):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(call(*arguments)))

    wanted = jax.value_and_grad(loss, (0, 1))(updates, weights)
    with mesh_of(Layout((2, 2))) as mesh:
        specs = {"x": P(("a", "b")), "y": P(None, "a")}
        sharded = {name: jax.device_put(updates[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}
        assert_close(jax.jit(jax.value_and_grad(loss, (0, 1)))(sharded, weights), wanted)


def test_clients_of_a_shard_map_may_be_summed_by_hand():
    """What docs recommend for clients spread over devices: sum here, psum there."""
    import fedfuse_jax as ff

    updates = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    weights = np.arange(8, dtype=np.float32)
    with mesh_of(Layout((4,))) as mesh:
        mapped = jax.shard_map(
            lambda x, w: jax.lax.psum(ff.weighted_sum(x, w), "a"), mesh=mesh, in_specs=(P("a"), P("a")), out_specs=P()
        )
        got = jax.jit(mapped)(updates, weights)
    oracle.assert_matches(got, oracle.weighted_sum(updates, weights))


def test_within_another_primitives_lowering():
    """JAX does not look for operations there, and does not say which devices there are: the operands are gathered."""
    inner = internals.Primitive("mean_of_clients")
    inner.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[1:], x.dtype))
    internals.mlir.register_lowering(inner, internals.mlir.lower_fun(ff.weighted_mean, multiple_results=False))
    updates = jnp.arange(40.0).reshape(5, 8)
    mesh = jax.make_mesh((4,), ("a",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(updates, NamedSharding(mesh, P(None, "a")))
        np.testing.assert_array_equal(jax.jit(lambda x: inner.bind(x))(sharded), updates.mean(0))
