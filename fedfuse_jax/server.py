"""Server optimizers, fused: average the clients' updates, step the state, step the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax._primitive import Axis, BoundCall, MeshAxes, Operand, Operands, Operation, coordinates_of_leaves
from fedfuse_jax.reduce import WEIGHTED_MEAN, linear_partitioned

PyTree = Any


class ServerState(NamedTuple):
    """The state of a server optimizer, a pytree.

    Attributes:
      step: How many rounds moved the parameters, an int32 scalar.
      first_moment: A tree like the parameters, float32 (float64 for float64 parameters).
      second_moment: Another.
    """

    step: Array
    first_moment: PyTree
    second_moment: PyTree


# So that an exported program may take and return one.
export.register_namedtuple_serialization(ServerState, serialized_name="fedfuse_jax.ServerState")


# --- Operations -----------------------------------------------------------------------------------------------


def init_server_state(params: PyTree, *, tau: Any = 1e-3) -> ServerState:
    """Makes the state that a server optimizer starts from.

    .. math:: t = 0, \\qquad m = 0, \\qquad v = \\tau^2

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves.
      tau: τ, a real scalar, at least 0.

    Returns:
      A ``ServerState``; its moments are float32 (float64 for float64 parameters).

    Raises:
      TypeError: A leaf is not floating point, or ``tau`` is not a real number.
      ValueError: There are no leaves, or ``tau`` is a Python number below 0, or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> state = ff.init_server_state({"w": jnp.ones(2, jnp.bfloat16)}, tau=0.5)
      >>> int(state.step), state.first_moment["w"].tolist(), state.second_moment["w"].tolist()
      (0, [0.0, 0.0], [0.25, 0.25])

    Source:
      Reddi et al. 2021, https://arxiv.org/abs/2003.00295: v may start at τ² or above.

    Notes:
      *Differentiability*: in ``tau``. *Sharding*: as the parameters are. *Determinism*: exact.
    """
    name = "init_server_state"
    leaves = checks.float_leaves(name, "params", params)
    # (τ rounded once, to the dtype of the whole tree.)
    root = checks.bounded_scalar(name, "tau", tau, checks.tree_accumulator(leaves.arrays))

    def like(value: Any) -> PyTree:
        moments = [jnp.full_like(leaf, value, dtype=reference.accumulator_dtype(leaf.dtype)) for leaf in leaves.arrays]
        return leaves.unflatten(moments)

    return ServerState(jnp.zeros((), np.int32), like(0), like(root * root))


def fedavgm_weighted_update(
    params: PyTree,
    state: ServerState,
    updates: PyTree,
    weights: Any = None,
    *,
    learning_rate: Any,
    momentum: Any = 0.9,
    where: Any = None,
    axis_name: Any = None,
) -> tuple[PyTree, ServerState]:
    """Steps the server's parameters along the clients' weighted mean, with momentum.

    .. math:: \\Delta = \\sum_i w_i x_i \\Big/ \\sum_i w_i, \\qquad m \\leftarrow \\beta m + \\Delta, \\qquad
        \\theta \\leftarrow \\theta + \\eta m

    Updates are client − server, so that parameters move along them. When nobody takes part, or Δ is not finite
    anywhere in the tree, parameters and state come back unchanged, and ``step`` does not advance.

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves; computed with in float32 (float64), rounded
        once.
      state: A ``ServerState`` that ``init_server_state(params)`` or an earlier update made. Donate it and the
        parameters to a jitted caller, and their buffers are updated in place. ``second_moment`` stays as it is.
      updates: Client-stacked pytree like ``params``, of leaves ``(n_clients, *shape)`` of any floating dtype.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. ``None``: the plain mean.
      learning_rate: η, a real scalar, which may change from round to round.
      momentum: β, a real scalar from 0 to 1.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether Δ is finite is asked of all of them.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: A leaf is not floating point, the state's dtypes are not those of ``init_server_state(params)``, or
        another argument is not what it needs to be.
      ValueError: Parameters, state and updates differ in structure or shapes, ``weights`` or ``where`` have the
        wrong shape, or a Python number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state, updates = ff.init_server_state(params), {"w": jnp.array([[0.5, 0.0], [1.5, 1.0]])}
      >>> for _ in range(2):
      ...     params, state = ff.fedavgm_weighted_update(params, state, updates, learning_rate=1.0, momentum=0.5)
      >>> params["w"].tolist(), state.first_moment["w"].tolist(), int(state.step)
      ([3.5, 3.25], [1.5, 0.75], 2)

    Source:
      Hsu et al. 2019, https://arxiv.org/abs/1909.06335.

    Notes:
      *Differentiability*: in everything but ``step`` and ``where``.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; sharded clients are summed
      where they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    scalars = {"learning_rate": learning_rate, "b1": momentum}
    return _update(FEDAVGM, params, state, updates, weights, where, axis_name, scalars, {"b1": "momentum"})


def fedadagrad_weighted_update(
    params: PyTree,
    state: ServerState,
    updates: PyTree,
    weights: Any = None,
    *,
    learning_rate: Any,
    b1: Any = 0.0,
    tau: Any = 1e-3,
    where: Any = None,
    axis_name: Any = None,
) -> tuple[PyTree, ServerState]:
    """Steps the server's parameters along the clients' weighted mean, by Adagrad.

    .. math:: \\Delta = \\sum_i w_i x_i \\Big/ \\sum_i w_i, \\qquad
        m \\leftarrow \\beta_1 m + (1 - \\beta_1) \\Delta, \\qquad v \\leftarrow v + \\Delta^2, \\qquad
        \\theta \\leftarrow \\theta + \\eta \\frac{m}{\\sqrt v + \\tau}

    Updates are client − server, so that parameters move along them. When nobody takes part, or Δ is not finite
    anywhere in the tree, parameters and state come back unchanged, and ``step`` does not advance.

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves; computed with in float32 (float64), rounded
        once.
      state: A ``ServerState`` that ``init_server_state(params)`` or an earlier update made. Donate it and the
        parameters to a jitted caller, and their buffers are updated in place.
      updates: Client-stacked pytree like ``params``, of leaves ``(n_clients, *shape)`` of any floating dtype.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. ``None``: the plain mean.
      learning_rate: η, a real scalar, which may change from round to round.
      b1: β₁, a real scalar from 0 to 1; 0, as usual, keeps no momentum.
      tau: τ, a real scalar, at least 0: how adaptive the step is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether Δ is finite is asked of all of them.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: A leaf is not floating point, the state's dtypes are not those of ``init_server_state(params)``, or
        another argument is not what it needs to be.
      ValueError: Parameters, state and updates differ in structure or shapes, ``weights`` or ``where`` have the
        wrong shape, or a Python number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> params, updates = jnp.array([1.0, 1.0]), jnp.array([[3.0, -4.0]])
      >>> state = ff.init_server_state(params, tau=0.0)
      >>> params, state = ff.fedadagrad_weighted_update(params, state, updates, learning_rate=0.5, tau=0.0)
      >>> params.tolist(), state.second_moment.tolist()
      ([1.5, 0.5], [9.0, 16.0])

    Source:
      FedAdagrad of Reddi et al. 2021, https://arxiv.org/abs/2003.00295.

    Notes:
      *Differentiability*: in everything but ``step`` and ``where``.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; sharded clients are summed
      where they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    scalars = {"learning_rate": learning_rate, "b1": b1, "tau": tau}
    return _update(FEDADAGRAD, params, state, updates, weights, where, axis_name, scalars)


def fedadam_weighted_update(
    params: PyTree,
    state: ServerState,
    updates: PyTree,
    weights: Any = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Any = None,
    axis_name: Any = None,
) -> tuple[PyTree, ServerState]:
    """Steps the server's parameters along the clients' weighted mean, by Adam as federated averaging has it.

    .. math:: \\Delta = \\sum_i w_i x_i \\Big/ \\sum_i w_i, \\qquad
        m \\leftarrow \\beta_1 m + (1 - \\beta_1) \\Delta, \\qquad v \\leftarrow \\beta_2 v + (1 - \\beta_2) \\Delta^2,
        \\qquad \\theta \\leftarrow \\theta + \\eta \\frac{m}{\\sqrt v + \\tau}

    The rule is that of the paper: no bias correction, and τ outside the root. Updates are client − server, so that
    parameters move along them. When nobody takes part, or Δ is not finite anywhere in the tree, parameters and state
    come back unchanged, and ``step`` does not advance.

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves; computed with in float32 (float64), rounded
        once.
      state: A ``ServerState`` that ``init_server_state(params)`` or an earlier update made. Donate it and the
        parameters to a jitted caller, and their buffers are updated in place.
      updates: Client-stacked pytree like ``params``, of leaves ``(n_clients, *shape)`` of any floating dtype.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. ``None``: the plain mean.
      learning_rate: η, a real scalar, which may change from round to round.
      b1: β₁, a real scalar from 0 to 1.
      b2: β₂, a real scalar from 0 to 1.
      tau: τ, a real scalar, at least 0: how adaptive the step is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether Δ is finite is asked of all of them.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: A leaf is not floating point, the state's dtypes are not those of ``init_server_state(params)``, or
        another argument is not what it needs to be.
      ValueError: Parameters, state and updates differ in structure or shapes, ``weights`` or ``where`` have the
        wrong shape, or a Python number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> params, updates = jnp.zeros(3), jnp.array([[0.5, -0.1, 1e-4]])
      >>> state = ff.init_server_state(params)
      >>> params, state = ff.fedadam_weighted_update(params, state, updates, learning_rate=0.1)
      >>> [round(x, 4) for x in params.tolist()], int(state.step)
      ([0.098, -0.0905, 0.0005], 1)

    Source:
      FedAdam of Reddi et al. 2021, https://arxiv.org/abs/2003.00295.

    Notes:
      *Differentiability*: in everything but ``step`` and ``where``.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; sharded clients are summed
      where they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    scalars = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "tau": tau}
    return _update(FEDADAM, params, state, updates, weights, where, axis_name, scalars)


def fedyogi_weighted_update(
    params: PyTree,
    state: ServerState,
    updates: PyTree,
    weights: Any = None,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    where: Any = None,
    axis_name: Any = None,
) -> tuple[PyTree, ServerState]:
    """Steps the server's parameters along the clients' weighted mean, by Yogi.

    .. math:: \\Delta = \\sum_i w_i x_i \\Big/ \\sum_i w_i, \\qquad
        m \\leftarrow \\beta_1 m + (1 - \\beta_1) \\Delta, \\qquad
        v \\leftarrow v - (1 - \\beta_2) \\Delta^2 \\operatorname{sign}(v - \\Delta^2), \\qquad
        \\theta \\leftarrow \\theta + \\eta \\frac{m}{\\sqrt v + \\tau}

    Updates are client − server, so that parameters move along them. When nobody takes part, or Δ is not finite
    anywhere in the tree, parameters and state come back unchanged, and ``step`` does not advance.

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves; computed with in float32 (float64), rounded
        once.
      state: A ``ServerState`` that ``init_server_state(params)`` or an earlier update made. Donate it and the
        parameters to a jitted caller, and their buffers are updated in place.
      updates: Client-stacked pytree like ``params``, of leaves ``(n_clients, *shape)`` of any floating dtype.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. ``None``: the plain mean.
      learning_rate: η, a real scalar, which may change from round to round.
      b1: β₁, a real scalar from 0 to 1.
      b2: β₂, a real scalar from 0 to 1.
      tau: τ, a real scalar, at least 0: how adaptive the step is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether Δ is finite is asked of all of them.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: A leaf is not floating point, the state's dtypes are not those of ``init_server_state(params)``, or
        another argument is not what it needs to be.
      ValueError: Parameters, state and updates differ in structure or shapes, ``weights`` or ``where`` have the
        wrong shape, or a Python number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> params, updates = jnp.zeros(2), jnp.array([[1.0, -2.0]])
      >>> state = ff.init_server_state(params, tau=0.0)
      >>> params, state = ff.fedyogi_weighted_update(
      ...     params, state, updates, learning_rate=1.0, b1=0.0, b2=0.75, tau=0.0)
      >>> params.tolist(), state.second_moment.tolist()
      ([2.0, -2.0], [0.25, 1.0])

    Source:
      FedYogi of Reddi et al. 2021, https://arxiv.org/abs/2003.00295.

    Notes:
      *Differentiability*: almost everywhere, in everything but ``step`` and ``where``.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; sharded clients are summed
      where they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    scalars = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "tau": tau}
    return _update(FEDYOGI, params, state, updates, weights, where, axis_name, scalars)


# --- From arguments to operands ---------------------------------------------------------------------------------

SCALARS = ("learning_rate", "b1", "b2", "tau")
RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"least": float("-inf")},
    "b1": {"most": 1.0},
    "b2": {"most": 1.0},
    "tau": {},
}


def _update(
    operation: Operation,
    params: PyTree,
    state: ServerState,
    updates: PyTree,
    weights: Any,
    where: Any,
    axis_name: Any,
    scalars: dict[str, Any],
    names: dict[str, str] | None = None,
) -> tuple[PyTree, ServerState]:
    name = operation.name
    old = checks.float_leaves(name, "params", params)
    step, moments = _check_state(name, state, old)
    new, n_clients = checks.client_stacked_like(name, updates, old)
    weight_dtype = checks.tree_accumulator(new.arrays)
    if weights is None:
        weights = jnp.ones((n_clients,), weight_dtype)
    dtype = checks.tree_accumulator(old.arrays)
    operands: Operands = {
        "step": step,
        "params": old.arrays,
        "first_moment": moments[0],
        "second_moment": moments[1],
        "updates": new.arrays,
        "weights": checks.per_client(name, "weights", weights, n_clients, weight_dtype),
        "where": checks.participation(name, where, n_clients),
    }
    for scalar in SCALARS:
        argument = (names or {}).get(scalar, scalar)
        operands[scalar] = checks.bounded_scalar(name, argument, scalars.get(scalar, 0), dtype, **RANGES[scalar])
    if axis_name is not None:
        results = _compose(operands, RULE_OF[name], 0, _mean_here, _sum_over(axis_name))
    else:
        of_moments = [moment.dtype.name for moment in moments[0]]
        dtypes = ("int32", *(x.dtype.name for x in old.arrays), *of_moments, *of_moments)
        results = operation.bind(operands, dtypes, rule=reference.SERVER_RULES.index(RULE_OF[name]))
    count = len(old.arrays)
    trees = [old.unflatten(results[1 + i * count : 1 + (i + 1) * count]) for i in range(3)]
    return trees[0], ServerState(results[0], *trees[1:])


def _check_state(name: str, state: Any, params: checks.Leaves) -> tuple[Array, list[list[Array]]]:
    """The step and the leaves of both moments of a state that fits the parameters."""
    needed = "a ServerState of init_server_state(params)"
    if not isinstance(state, ServerState):
        raise TypeError(f"{name}: state is {checks.describe(state)}; it needs {needed}.")
    step = checks.as_array(name, "state.step", state.step, "an int32 scalar")
    if step.dtype != np.int32:
        raise TypeError(f"{name}: state.step has dtype {step.dtype}; it needs an int32 scalar.")
    if step.shape != ():
        raise ValueError(f"{name}: state.step has shape {step.shape}; it needs an int32 scalar.")
    moments = []
    for part in ("first_moment", "second_moment"):
        tree = checks.float_leaves(name, f"state.{part}", getattr(state, part))
        if tree.treedef != params.treedef:
            got = f"the structure {tree.treedef}"
            raise ValueError(f"{name}: state.{part} has {got}; it needs that of params, {params.treedef}.")
        for leaf, param, path in zip(tree.arrays, params.arrays, tree.paths, strict=True):
            if leaf.shape != param.shape:
                raise ValueError(f"{name}: {path} has shape {leaf.shape}; it needs that of params, {param.shape}.")
            if leaf.dtype != reference.accumulator_dtype(param.dtype):
                dtype = reference.accumulator_dtype(param.dtype)
                raise TypeError(f"{name}: {path} has dtype {leaf.dtype}; it needs {dtype}, for {param.dtype} params.")
        moments.append(tree.arrays)
    return step, moments


# --- The rule, composed of a weighted mean and arithmetic: for derivatives, and shard_map ---------------------------


def _mean_here(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
    linear = {name: operands[name] for name in ("updates", "weights", "where")}
    return WEIGHTED_MEAN.bind(linear, dtypes, divide=True)


def _checked_mean(
    operands: Operands,
    batch_dims: int,
    mean: Callable[[Operands, tuple[str, ...]], list[Array]],
    over_parameters: Callable[[Array], Array] = lambda count: count,
    over_clients: Callable[[Array], Array] = lambda count: count,
) -> tuple[list[Array], Array]:
    """Δ by ``mean``, in the moments' dtypes, and whether it is to be taken.

    The last two arguments sum over devices that share a dimension.
    """
    updates, where = operands["updates"], operands["where"]
    deltas = mean(operands, tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in updates))
    deltas = [delta.astype(first.dtype) for delta, first in zip(deltas, operands["first_moment"], strict=True)]
    bad: Array = jnp.zeros((), np.int32)
    for delta in deltas:
        axes = tuple(range(batch_dims, delta.ndim))
        bad = bad + jnp.any(~jnp.isfinite(delta), axis=axes).astype(np.int32)
    good = over_parameters(bad) == 0
    if where is not None:
        good = good & (over_clients(jnp.sum(where, axis=-1, dtype=np.int32)) > 0)
    return deltas, good


def _compose(
    operands: Operands,
    rule: str,
    batch_dims: int,
    mean: Callable[[Operands, tuple[str, ...]], list[Array]],
    over_parameters: Callable[[Array], Array] = lambda count: count,
) -> list[Array]:
    """The update by ``mean`` and elementwise arithmetic."""
    deltas, good = _checked_mean(operands, batch_dims, mean, over_parameters)

    def spread(value: Array, ndim: int) -> Array:
        return value.reshape(value.shape + (1,) * (ndim - value.ndim))

    stepped = []
    for param, first, second, delta in zip(
        operands["params"], operands["first_moment"], operands["second_moment"], deltas, strict=True
    ):
        ndim = param.ndim
        scalars = [spread(operands[name].astype(first.dtype), ndim) for name in SCALARS]
        accepted = spread(good, ndim)
        # Derivatives of what is not taken must be finite as well.
        new = reference.server_step(rule, param, first, second, jnp.where(accepted, delta, 0), *scalars)
        stepped.append([jnp.where(accepted, y, x) for y, x in zip(new, (param, first, second), strict=True)])
    step = operands["step"] + good.astype(np.int32)
    return [step, *(leaf for part in zip(*stepped, strict=True) for leaf in part)]


def _jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    """The derivative of the composition, along the arguments that have a tangent."""
    is_none = lambda x: x is None  # noqa: E731
    leaves, structure = jax.tree.flatten(primals, is_leaf=is_none)
    slopes = jax.tree.leaves(tangents, is_leaf=is_none)
    moving = [i for i, slope in enumerate(slopes) if slope is not None]

    def mean(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
        linear = {name: operands[name] for name in ("updates", "weights", "where")}
        return call.bind(WEIGHTED_MEAN, linear, dtypes, divide=True)

    def compose(*moved: Array) -> list[Array]:
        merged = list(leaves)
        for i, value in zip(moving, moved, strict=True):
            merged[i] = value
        rule = reference.SERVER_RULES[call.layout.attribute("rule")]
        return _compose(jax.tree.unflatten(structure, merged), rule, call.batch_dims, mean)[1:]

    _, out = jax.jvp(compose, [leaves[i] for i in moving], [slopes[i] for i in moving])
    assert call.results is not None
    return [None, *(jnp.broadcast_to(t, x.shape) for t, x in zip(out, call.results[1:], strict=True))]


def _partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Local means, one all-reduce of a number that says whether all of them are finite, local steps."""
    names = tuple(sorted({name for axis, used in mesh_axes.items() if axis.startswith("leaf") for name in used}))
    clients = mesh_axes.get("clients", ())
    if not names and not clients:
        return call.run_local(operands)

    def mean(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
        linear = {name: operands[name] for name in ("updates", "weights", "where")}
        layout = call.layout._replace(out_dtypes=dtypes, attributes=(("divide", True),))
        return linear_partitioned(BoundCall(WEIGHTED_MEAN, layout, None), linear, mesh_axes)

    deltas, good = _checked_mean(operands, call.batch_dims, mean, _sum_over(names), _sum_over(clients))
    # The mean is the update of one client, absent if it is not to be taken: the same kernel, and so the same bits.
    alone = {
        "updates": [call.over_clients(delta) for delta in deltas],
        "weights": jnp.ones((*good.shape, 1), reference.accumulator_dtype(*(delta.dtype for delta in deltas))),
        "where": good[..., None],
    }
    return call.run_local({**operands, **alone}, optional=("where",))


def _sum_over(names: MeshAxes) -> Callable[[Array], Array]:
    return functools.partial(lax.psum, axis_name=names) if names else lambda count: count


# --- Declarations -----------------------------------------------------------------------------------------------


def _definition(
    *, step: Any, params: Any, first_moment: Any, second_moment: Any, updates: Any, out_dtypes: Any, rule: int,
    **others: Any,
) -> list[Array]:  # fmt: skip
    state = ServerState(step, first_moment, second_moment)
    new, after = reference.server_update(reference.SERVER_RULES[rule], params, state, updates, **others)
    return [after.step, *new, *after.first_moment, *after.second_moment]


def _workspace(sizes: Any, layout: Any) -> Any:
    """The mean, in the moments' dtypes, and whether it is finite; see ffi/contract/server.cc."""
    alignment = 64
    bytes_of_batch = alignment
    for leaf, of_leaf in enumerate(coordinates_of_leaves(sizes, layout.num_leaves)):
        itemsize = np.dtype(layout.out_dtypes[1 + layout.num_leaves + leaf]).itemsize
        bytes_of_batch = bytes_of_batch + of_leaf * itemsize + alignment
    for i in range(layout.batch_dims):
        bytes_of_batch = bytes_of_batch * sizes[f"batch{i}"]
    return bytes_of_batch


def _server_update(name: str) -> Operation:
    moved = (
        Operand("step"),
        Operand("params", per_leaf=True),
        Operand("first_moment", per_leaf=True),
        Operand("second_moment", per_leaf=True),
    )
    return Operation(
        name,
        operands=(
            *moved,
            Operand("updates", ("clients",), per_leaf=True),
            Operand("weights", ("clients",)),
            Operand("where", ("clients",), optional=True),
            *(Operand(scalar) for scalar in SCALARS),
        ),
        results=moved,
        definition=_definition,
        partitioned=_partitioned,
        jvp=_jvp,
        aliased=("step", "params", "first_moment", "second_moment"),
        workspace=_workspace,
    )


FEDAVGM = _server_update("fedavgm_weighted_update")
FEDADAGRAD = _server_update("fedadagrad_weighted_update")
FEDADAM = _server_update("fedadam_weighted_update")
FEDYOGI = _server_update("fedyogi_weighted_update")
RULE_OF = dict(zip((op.name for op in (FEDAVGM, FEDADAGRAD, FEDADAM, FEDYOGI)), reference.SERVER_RULES, strict=True))
