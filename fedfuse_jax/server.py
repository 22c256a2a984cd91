"""Server optimizers: reduce the updates, step the state, step the parameters, in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._core import Operands, Operation
from fedfuse_jax._primitives.server import (
    FEDADAGRAD,
    FEDADAM,
    FEDAVGM,
    FEDYOGI,
    RULE_OF,
    SCALARS,
    _judge,
    _mean_of,
    compose_update,
    mean_on_this_device,
    sum_over,
)

PyTree = Any


class ServerState(NamedTuple):
    """The state of a server optimizer, a pytree.

    Attributes:
      step: How many rounds moved the parameters, an int32 scalar; the greatest there is stays.
      first_moment: A tree like the parameters, float32 (float64 for float64 parameters).
      second_moment: Another.
    """

    step: Array
    first_moment: PyTree
    second_moment: PyTree


# So that an exported program may take and return one.
internals.register_namedtuple_serialization(ServerState, "fedfuse_jax.ServerState")


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

    Updates are client − server, so that parameters move along them. When nobody takes part, or anything that
    is new would not be finite, anywhere in the tree, parameters and state come back unchanged, and ``step`` does not
    advance.

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
        sharded: whether all that is new is finite is asked of all of them.

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
      *Differentiability*: in everything but ``step`` and ``where``; where v is 0, √v has the derivative 0.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; what is within 2⁻²⁰ of
      the range of its dtype counts as not finite then. Sharded clients are summed where they are and all-reduced
      (client order is waived then).
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

    Updates are client − server, so that parameters move along them. When nobody takes part, or anything that
    is new would not be finite, anywhere in the tree, parameters and state come back unchanged, and ``step`` does not
    advance.

    Args:
      params: Pytree of float32, bfloat16, float16 or float64 leaves; computed with in float32 (float64), rounded
        once.
      state: A ``ServerState`` that ``init_server_state(params)`` or an earlier update made. Donate it and the
        parameters to a jitted caller, and their buffers are updated in place.
      updates: Client-stacked pytree like ``params``, of leaves ``(n_clients, *shape)`` of any floating dtype.
      weights: ``(n_clients,)`` real numbers, such as numbers of examples. ``None``: the plain mean.
      learning_rate: η, a real scalar, which may change from round to round.
      b1: β₁, a real scalar from 0 to 1; 0, as usual, keeps no momentum.
      tau: τ, a real scalar, at least 0: how adaptive the step is. A coordinate where √v + τ is 0 stays as it is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether all that is new is finite is asked of all of them.

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
      *Differentiability*: in everything but ``step`` and ``where``; where v is 0, √v has the derivative 0.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; what is within 2⁻²⁰ of
      the range of its dtype counts as not finite then. Sharded clients are summed where they are and all-reduced
      (client order is waived then).
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
    parameters move along them. When nobody takes part, or anything that is new would not be finite, anywhere in the
    tree, parameters and state come back unchanged, and ``step`` does not advance.

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
      tau: τ, a real scalar, at least 0: how adaptive the step is. A coordinate where √v + τ is 0 stays as it is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether all that is new is finite is asked of all of them.

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
      *Differentiability*: in everything but ``step`` and ``where``; where v is 0, √v has the derivative 0.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; what is within 2⁻²⁰ of
      the range of its dtype counts as not finite then. Sharded clients are summed where they are and all-reduced
      (client order is waived then).
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

    Updates are client − server, so that parameters move along them. When nobody takes part, or anything that
    is new would not be finite, anywhere in the tree, parameters and state come back unchanged, and ``step`` does not
    advance.

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
      tau: τ, a real scalar, at least 0: how adaptive the step is. A coordinate where √v + τ is 0 stays as it is.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: whether all that is new is finite is asked of all of them.

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
      *Differentiability*: almost everywhere, in everything but ``step`` and ``where``; where v is 0, √v has the
      derivative 0.
      *Sharding*: parameters may be sharded in any way, for one all-reduce of one number; what is within 2⁻²⁰ of
      the range of its dtype counts as not finite then. Sharded clients are summed where they are and all-reduced
      (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    scalars = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "tau": tau}
    return _update(FEDYOGI, params, state, updates, weights, where, axis_name, scalars)


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
    axis_name = checks.mesh_axes(name, axis_name)
    if axis_name is not None:
        deltas = _mean_of(operands, mean_on_this_device)
        judged, at = jax.tree.map(lax.stop_gradient, (operands, deltas))
        good = _judge(RULE_OF[name], judged, at, 0, sum_over(axis_name))
        results = compose_update(operands, RULE_OF[name], deltas, good)
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
    step = checks.int32_scalar(name, "state.step", state.step)
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
