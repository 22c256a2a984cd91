"""Every rule of the contract, for every operation of the table, against the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding
from jax.test_util import check_grads
from operations import CASES, DTYPES, USUAL, Kind, Problem, has_kernel, one_array, to_jax
from tiers import by_id, most_arguments_first, tiered, with_most_arguments

import fedfuse_jax as ff

every_case = pytest.mark.parametrize("case", CASES, ids=str)
MOST_ARGUMENTS = with_most_arguments(CASES)
fullest_case = most_arguments_first(CASES)
differentiable_case = pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=str)
fullest_differentiable_case = most_arguments_first([case for case in CASES if case.differentiable])
where_case = pytest.mark.parametrize("case", [case for case in CASES if "where" in case.names], ids=str)
rounding_case = pytest.mark.parametrize("case", [case for case in CASES if case.row.out_dtype], ids=str)
robust_case = pytest.mark.parametrize("case", [case for case in CASES if case.row.withstands_overflow], ids=str)
coordinate_wise_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.row.coordinate_wise and case.row.takes_trees], ids=str
)


WRITING_ROWS = ("stack_clients", "weighted_spread")  # each from what one client has

# What an absent client may fill with NaN.
PER_CLIENT = (Kind.STACKED, Kind.WEIGHTS, Kind.ENTRIES, Kind.FACTORS)


def batch_of(case, size, **changes):
    """Several problems' arguments, and the same stacked along a new leading axis."""
    values = [case.sample(Problem(seed=seed, **changes)) for seed in range(size)]
    return values, jax.tree.map(lambda *xs: np.stack(xs), *values)


def assert_same_bits(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# --- Transformations --------------------------------------------------------------------------------------------


@every_case
@pytest.mark.calls
def test_eager_and_jit(case):
    values = to_jax(case.sample(Problem()))
    eager, jitted = case.call(*values), jax.jit(case.call)(*values)
    case.check(eager, values)
    case.check(jitted, values)
    if has_kernel(case.row.operation):
        assert_same_bits(eager, jitted)


def offloaded(tree):
    """The tree in the host's memory, for which JAX has types of its own."""
    return jax.device_put(tree, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


@fullest_case
@pytest.mark.calls
def test_offloaded_to_the_host(case):
    """What was offloaded is read where it is, and results are in the device's memory."""
    values = to_jax(case.sample(Problem()))
    wanted = jax.jit(case.call)(*values)
    # JAX's own random bits need a key in the device's memory.
    first = next(i for i, name in enumerate(case.names) if case.row.arguments[name] != Kind.KEY)
    on_host = (*values[:first], offloaded(values[first]), *values[first + 1 :])
    for got in (case.call(*on_host), jax.jit(case.call)(*on_host)):
        assert_same_bits(got, wanted)
        assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(got))


@fullest_differentiable_case
def test_gradient_of_what_is_offloaded_to_the_host(case):
    """It is where its argument is."""
    function, _, primals = differentiable_part(case, Problem(values="apart"))
    cotangents = random_like(jax.eval_shape(function, *primals), 2)
    pull_back = jax.jit(lambda *primals: jax.vjp(function, *primals)[1](cotangents))
    got = pull_back(*offloaded(primals))
    assert all(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(got))
    assert_close(jax.device_get(got), jax.device_get(pull_back(*primals)))


def subsets(names, sizes):
    """Of these sizes; 0 stands for all."""
    sizes = sorted({min(size or len(names), len(names)) for size in sizes})
    return [subset for size in sizes for subset in itertools.combinations(range(len(names)), size)]


@tiered(
    lambda sizes, case: sizes == 0 and case in MOST_ARGUMENTS,
    sizes={"singles and all": (1, 0), "pairs": (2,)},
    case=by_id(CASES),
)
@pytest.mark.calls
def test_vmap(case, sizes):
    """Over singles, pairs and all of the arguments; the mapped axis first and last, going in and coming out."""
    size = 3
    single, stacked = batch_of(case, size)
    last = jax.tree.map(lambda x: np.moveaxis(x, 0, -1), stacked)
    for subset, axis in zip(subsets(case.names, sizes), itertools.cycle((0, -1)), strict=False):
        source = stacked if axis == 0 else last
        in_axes = tuple(axis if position in subset else None for position in range(len(case.names)))
        values = [source[i] if i in subset else single[0][i] for i in range(len(case.names))]
        got = jax.jit(jax.vmap(case.call, in_axes, out_axes=axis))(*to_jax(values))
        for b in range(size):
            arguments = [single[b if i in subset else 0][i] for i in range(len(case.names))]
            case.check(jax.tree.map(lambda x, b=b, axis=axis: jnp.take(x, b, axis), got), arguments)


@fullest_case
def test_nested_vmap(case):
    """The outer map over all of the arguments but the last, the inner one over all but the first."""
    if len(case.names) == 1:
        outer = inner = (0,)
    else:
        outer = (*[0] * (len(case.names) - 1), None)
        inner = (None, *[0] * (len(case.names) - 1))
    sizes = (2, 3)
    grid = [[case.sample(Problem(seed=10 * a + b)) for b in range(sizes[1])] for a in range(sizes[0])]
    values = []
    for i in range(len(case.names)):
        rows = [row if inner[i] == 0 else row[:1] for row in (grid if outer[i] == 0 else grid[:1])]
        value = jax.tree.map(lambda *xs: np.stack(xs), *[arguments[i] for row in rows for arguments in row])
        shape = tuple(size for size, axis in zip(sizes, (outer[i], inner[i]), strict=True) if axis == 0)
        values.append(jax.tree.map(lambda x, shape=shape: x.reshape(shape + x.shape[1:]), value))
    got = jax.jit(jax.vmap(jax.vmap(case.call, inner), outer))(*to_jax(values))
    for a, b in np.ndindex(sizes):
        arguments = [grid[a if outer[i] == 0 else 0][b if inner[i] == 0 else 0][i] for i in range(len(case.names))]
        case.check(jax.tree.map(lambda x, a=a, b=b: x[a, b], got), arguments)


@fullest_case
@pytest.mark.calls
def test_scan_and_cond(case):
    single, stacked = batch_of(case, 4)

    @jax.jit
    def every_second(stacked):
        def step(count, arguments):
            empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(case.call, *arguments))
            return count + 1, lax.cond(count % 2 == 0, case.call, lambda *_: empty, *arguments)

        return lax.scan(step, 0, stacked)[1]

    got = every_second(to_jax(stacked))
    for i, arguments in enumerate(single):
        result = jax.tree.map(lambda x, i=i: x[i], got)
        if i % 2 == 0:
            case.check(result, arguments)
        else:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


# --- Dtypes and shapes ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [*DTYPES[1:], "mixed"])
def test_dtypes(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        values = case.sample(Problem(dtype=dtype, n_clients=6))
        case.check(jax.jit(case.call)(*to_jax(values)), values)


@rounding_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_out_dtype(case, dtype):
    with jax.enable_x64():
        values = case.sample(Problem(dtype=dtype, n_clients=6))
        for out_dtype in DTYPES:
            got = jax.jit(functools.partial(case.call, out_dtype=out_dtype))(*to_jax(values))
            case.check(got, values, out_dtype=jnp.dtype(out_dtype))


ODD_SIZES = (
    ("empty", (0,)), ("scalar", ()), ("one", (1,)), ("hollow", (3, 0, 2)), ("power of two", (256,)),
    ("odd", (7, 5)), ("long", (1027,)),
)  # fmt: skip


@every_case
@pytest.mark.parametrize("n_clients", [1, 2, 3, 9])
def test_odd_sizes(case, n_clients):
    """A tree of leaves of all shapes, among them scalars per client and leaves without a coordinate."""
    values = case.sample(Problem(n_clients=n_clients, shapes=ODD_SIZES))
    case.check(jax.jit(case.call)(*to_jax(values)), values)


@every_case
def test_no_coordinates_at_all(case):
    values = case.sample(Problem(shapes=one_array(0)))
    case.check(jax.jit(case.call)(*to_jax(values)), values)


@coordinate_wise_case
def test_leaf_by_leaf_or_as_a_tree(case):
    """One call for a tree gives what one call a leaf gives, to the bit (XLA fuses the definitions as it likes)."""
    values = to_jax(case.sample(Problem()))
    whole = case.call(*values)
    for name, _ in USUAL:
        leaf = pick_leaf(values, name)
        alone = case.call(*leaf)
        case.check(alone, leaf)
        if has_kernel(case.row.operation):
            assert_same_bits(alone, whole[name])


def pick_leaf(values, name):
    """The arguments with every tree, and every tree in a list, replaced by its leaf of that name."""
    is_tree = lambda x: isinstance(x, dict)  # noqa: E731
    return jax.tree.map(lambda x: x[name] if is_tree(x) else x, values, is_leaf=is_tree)


@every_case
@pytest.mark.parametrize("n_clients", [33, 200, pytest.param(3000, marks=pytest.mark.full)])
def test_many_clients(case, n_clients):
    if "stack" in case.row.operation and n_clients > 200:
        n_clients = 500  # as many operands: the compiler, not the kernel, would be tested
    values = case.sample(Problem(n_clients=n_clients, shapes=(("w", (5,)), ("b", ()))))
    case.check(jax.jit(case.call)(*to_jax(values)), values)


@pytest.mark.parametrize("case", [case for case in CASES if case.row.operation in WRITING_ROWS], ids=str)
@pytest.mark.parametrize("shape", [(21, 5003), (3, 40_011), (2, 2**20 + 5)], ids=str)
def test_rows_cut_into_pieces(case, shape):
    """Several rows a piece, several pieces a row, and rows of which others' first part comes first."""
    n_clients, size = shape
    values = case.sample(Problem(n_clients=n_clients, shapes=(("w", (size,)), ("b", (3,)))))
    case.check(jax.jit(case.call)(*to_jax(values)), values)


# --- Numbers that are not ---------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_not_finite(case, dtype):
    """NaN of both signs, infinities of both signs, zeros of both signs, in every place."""
    for seed in range(2):
        values = case.sample(Problem(values="wild", n_clients=7, dtype=dtype, seed=seed))
        case.check(jax.jit(case.call)(*to_jax(values)), values)


@robust_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_on_the_way_only(case, dtype):
    """Numbers near the end of the range: where the result is in range, no step to it overflows."""
    if dtype == "float64" and not case.row.coordinate_wise:
        pytest.skip("the oracle itself overflows")
    with jax.enable_x64(dtype == "float64"):
        values = case.sample(Problem(values="huge", n_clients=6, dtype=dtype))
        case.check(jax.jit(case.call)(*to_jax(values)), values)


@every_case
def test_ties(case):
    values = case.sample(Problem(values="tied", n_clients=8))
    case.check(jax.jit(case.call)(*to_jax(values)), values)


# --- Participation ----------------------------------------------------------------------------------------------


@where_case
@pytest.mark.calls
def test_where_may_change_without_a_recompile(case):
    """From everybody over somebody to nobody; whoever is absent is full of NaN."""
    n_clients, traces = 6, 0

    @jax.jit
    def call(*arguments):
        nonlocal traces
        traces += 1
        return case.call(*arguments)

    values, at = case.sample(Problem(n_clients=n_clients)), case.names.index("where")
    for where in (
        np.ones(n_clients, bool), np.arange(n_clients) != 2, np.arange(n_clients) == 3, np.zeros(n_clients, bool),
    ):  # fmt: skip
        arguments = [
            filled(value, where) if case.row.arguments[name] in PER_CLIENT else value
            for name, value in zip(case.names, values, strict=True)
        ]
        arguments[at] = where
        case.check(call(*to_jax(arguments)), arguments)
    assert traces == 1


def filled(tree, where, fill=np.nan):
    """The fill, NaN say, for whoever is absent."""

    def fill_leaf(leaf):
        leaf = leaf.copy()
        leaf[~where] = fill
        return leaf

    return jax.tree.map(fill_leaf, tree)


@where_case
def test_absent_clients_leave_no_trace(case):
    """To the bit what the operation says when they hold zeros instead of NaN."""
    values, at = case.sample(Problem(n_clients=6)), case.names.index("where")
    call = jax.jit(case.call)
    results = []
    for fill in (np.nan, 0.0, -np.inf):
        arguments = [
            filled(value, values[at], fill) if case.row.arguments[name] in PER_CLIENT else value
            for name, value in zip(case.names, values, strict=True)
        ]
        results.append(call(*to_jax(arguments)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@where_case
def test_everybody_by_name(case):
    """`where` full of True is nobody left out."""
    values, at = to_jax(case.sample(Problem())), case.names.index("where")
    everybody = [*values[:at], jnp.ones(5, bool), *values[at + 1 :]]
    got = jax.jit(case.call)(*everybody)
    case.check(got, [*everybody[:at], None, *everybody[at + 1 :]])


# --- Derivatives ------------------------------------------------------------------------------------------------


def differentiable_part(case, problem):
    """The operation as a function of what it is differentiable in, and those arguments."""
    values = to_jax(case.sample(problem))
    primals, with_these = case.split(values, case.differentiable)
    function = lambda *varied: floats(case.call(*with_these(*varied)))  # noqa: E731
    definition = lambda *varied: floats(case.definition(*with_these(*varied)))  # noqa: E731
    return function, definition, primals


def floats(results):
    """The results that have a derivative."""
    return [leaf for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@differentiable_case
@pytest.mark.full
def test_derivatives_by_finite_differences(case):
    """Forwards and backwards, first and second order, in float64. Step 1e-4: error 1e-8 from curvature, 1e-12 from
    rounding; second order differentiates the first again. "Apart" numbers are .6 apart: no step changes an order."""
    with jax.enable_x64():
        function, _, primals = differentiable_part(case, Problem(dtype="float64", values="apart"))
        check_grads(jax.jit(function), primals, order=2, modes=("fwd", "rev"), eps=1e-4, atol=1e-6, rtol=1e-6)


# Five clients' numbers of order 1: some ten roundings of 6e-8 each, times the condition of a product of three.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def assert_close(got, wanted, **tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(oracle.widened(one), oracle.widened(other), **(tolerance or CLOSE))


def random_like(tree, seed):
    """Random numbers in the shapes of a tree, to push forwards or pull back."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape), x.dtype), tree)


@differentiable_case
@pytest.mark.calls
def test_derivatives_against_the_definition(case):
    """Where no values tie, our rules and JAX's own derivative of the definition agree."""
    function, definition, primals = differentiable_part(case, Problem(values="apart"))

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(function, primals, tangents, cotangents):
        value, pull_back = jax.vjp(function, *primals)
        return value, jax.jvp(function, primals, tangents)[1], pull_back(cotangents)

    tangents = random_like(primals, 1)
    cotangents = random_like(jax.eval_shape(function, *primals), 2)
    wanted = both_ways(definition, primals, tangents, cotangents)
    assert_close(both_ways(function, primals, tangents, cotangents), wanted)


@fullest_differentiable_case
def test_derivatives_of_low_precision(case):
    """Derivatives keep the arguments' dtypes; bfloat16 rounds once more, to 2⁻⁸."""
    function, definition, primals = differentiable_part(case, Problem(values="apart", dtype="mixed"))
    cotangents = random_like(jax.eval_shape(function, *primals), 2)
    pull_back = jax.jit(lambda f, ct: jax.vjp(f, *primals)[1](ct), static_argnums=0)
    assert_close(pull_back(function, cotangents), pull_back(definition, cotangents), rtol=2**-7, atol=2**-7)


@fullest_differentiable_case
def test_gradient_of_a_vmap_is_the_sum_of_gradients(case):
    """An operand shared along the mapped axis gets the sum of its cotangents; a mapped one gets each its own."""
    size = 3
    single, stacked = batch_of(case, size, values="apart")
    primals, _ = case.split(single[0], case.differentiable)
    for mapped in case.differentiable:
        at = case.names.index(mapped)
        in_axes = tuple(0 if i == at else None for i in range(len(case.names)))
        values = to_jax([stacked[i] if i == at else single[0][i] for i in range(len(case.names))])
        primals, with_these = case.split(values, case.differentiable)
        batched = lambda *varied, w=with_these, axes=in_axes: jax.vmap(case.call, axes)(*w(*varied))  # noqa: E731
        one_by_one = lambda *varied, w=with_these, at=at: jax.tree.map(  # noqa: E731
            lambda *xs: jnp.stack(xs),
            *[case.call(*[jax.tree.map(lambda x, b=b: x[b], v) if i == at else v for i, v in enumerate(w(*varied))])
              for b in range(size)],
        )  # fmt: skip
        cotangents = random_like(jax.eval_shape(batched, *primals), 3)
        pull_back = jax.jit(lambda f, p, ct: jax.vjp(f, *p)[1](ct), static_argnums=0)
        assert_close(pull_back(batched, primals, cotangents), pull_back(one_by_one, primals, cotangents))


@fullest_differentiable_case
@pytest.mark.calls
def test_vmap_of_a_gradient(case):
    size = 3
    single, stacked = batch_of(case, size, values="apart")
    cotangents = random_like(jax.eval_shape(jax.vmap(case.call), *to_jax(stacked)), 4)

    def pull_back(values, cotangents):
        primals, with_these = case.split(values, case.differentiable)
        return jax.vjp(lambda *varied: case.call(*with_these(*varied)), *primals)[1](cotangents)

    got = jax.jit(jax.vmap(pull_back))(to_jax(stacked), cotangents)
    one = jax.jit(pull_back)
    for b in range(size):
        wanted = one(to_jax(single[b]), jax.tree.map(lambda x, b=b: x[b], cotangents))
        assert_close(jax.tree.map(lambda x, b=b: x[b], got), wanted)


def test_one_array_as_updates_and_as_what_they_are_multiplied_by():
    """A batch may share the buffer that another operand is a row of: that does not make a product a square."""
    x = jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0], [0.0, -1.0, 5.0]])
    weights = jnp.ones(3)

    def products(cotangent):
        return jax.vjp(lambda w: ff.weighted_sum(x, w), weights)[1](cotangent)[0]

    for transformed in (jax.vmap(products), jax.jit(jax.vmap(products))):
        np.testing.assert_array_equal(transformed(x), x @ x.T)


@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable and "where" in case.names], ids=str)
def test_gradient_of_an_absent_client_is_zero(case):
    """Exactly 0, whatever is NaN, the cotangent included; and its own NaNs reach nobody else's gradient."""
    values = case.sample(Problem(n_clients=6))
    where = values[case.names.index("where")]
    spoiled = [
        filled(value, where) if case.row.arguments[name] in PER_CLIENT else value
        for name, value in zip(case.names, values, strict=True)
    ]
    primals, with_these = case.split(to_jax(spoiled), case.differentiable)
    function = lambda *varied: case.call(*with_these(*varied))  # noqa: E731
    pull_back = jax.jit(lambda p, ct: jax.vjp(function, *p)[1](ct))
    cotangents = random_like(jax.eval_shape(function, *primals), 5)
    for gradient in jax.tree.leaves(pull_back(primals, cotangents)):
        assert np.isfinite(gradient).all()
    gradients = pull_back(primals, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cotangents))
    for name, gradient in zip(case.differentiable, gradients, strict=True):
        for leaf in jax.tree.leaves(gradient):
            if case.row.arguments[name] in PER_CLIENT:
                assert not np.any(np.asarray(leaf)[~where])


# --- Same bits --------------------------------------------------------------------------------------------------


@coordinate_wise_case
def test_a_coordinate_is_computed_alike_wherever_it_stands(case):
    """Cut out of a large array, a few columns give the bits they gave inside."""
    if not has_kernel(case.row.operation):
        pytest.skip("XLA contracts the definition's products and sums differently for different sizes")
    size = 4099
    values = to_jax(case.sample(Problem(n_clients=11, shapes=one_array(size))))
    whole = np.asarray(jax.jit(case.call)(*values)["x"])
    for first, width in ((0, 1), (5, 3), (1000, 64), (4096, 3), (4098, 1), (17, 2049)):
        part = jax.tree.map(
            lambda x, first=first, width=width: x[..., first : first + width] if x.shape[-1:] == (size,) else x, values
        )
        got = np.asarray(jax.jit(case.call)(*part)["x"])
        assert got.tobytes() == np.ascontiguousarray(whole[..., first : first + width]).tobytes(), (first, width)


@every_case
def test_run_after_run(case):
    """Of an array that is worked on in several pieces."""
    values = to_jax(case.sample(Problem(n_clients=3, shapes=one_array(40_011))))
    call = jax.jit(case.call)
    first = call(*values)
    case.check(first, values)
    for _ in range(5):
        assert_same_bits(call(*values), first)
