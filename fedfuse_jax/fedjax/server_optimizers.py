"""Server optimizers that take the clients' deltas themselves: mean, state and parameters in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

from fedfuse_jax import _checks as checks
from fedfuse_jax import (
    fedadagrad_weighted_update,
    fedadam_weighted_update,
    fedavgm_weighted_update,
    fedyogi_weighted_update,
    init_server_state,
    stack_clients,
)
from fedfuse_jax.fedjax._clients import ClientUpdate, participants, scalar_weight
from fedfuse_jax.server import ServerState


@fedjax.dataclass
class FusedOptimizer(fedjax.Optimizer):
    """A FedJAX optimizer that may be given the clients' deltas instead of their mean.

    It is an ordinary `fedjax.Optimizer` wherever FedJAX takes one: what `apply` is given then counts as the delta of
    one client. `federated_averaging` without an aggregator uses `apply_to_clients`.

    Attributes:
        init: `params -> opt_state`, a `fedfuse_jax.ServerState`.
        apply: `(delta, opt_state, params) -> (opt_state, params)`: descends along a delta, or any gradient.
        apply_to_clients: `(clients_params_and_weights, opt_state, params) -> (opt_state, params)`: descends along the
            weighted mean of what FedJAX gives an aggregator, triples `(client_id, delta, weight)`. Without any client
            it gives back what it got.
    """

    apply_to_clients: Callable[[Iterable[ClientUpdate], ServerState, Any], tuple[ServerState, Any]]


def fedavgm(learning_rate: Any, momentum: Any = 0.9) -> FusedOptimizer:
    r"""Builds FedAvgM as a FedJAX server optimizer that averages, too.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i, \qquad m \leftarrow \beta m + \Delta,
        \qquad \theta \leftarrow \theta + \eta m

    Here x_i are the clients' updates, client - server: FedJAX's deltas with their signs turned, so that the parameters
    descend along the deltas. The state is that of `fedfuse_jax.fedavgm_weighted_update`, and so are the numbers.

    In `federated_averaging` without an aggregator, all deltas are held and stacked once, and their mean, the state and
    the parameters are one call; no mean is stored. After an aggregator, what it gives counts as one client's delta. A
    round whose mean is not finite somewhere, or of clients whose weights sum to 0, changes nothing.

    Args:
        learning_rate: eta, a real scalar, or a schedule: a function of the number of steps taken.
        momentum: beta, a real scalar from 0 to 1.

    Returns:
        A `FusedOptimizer`, which is a `fedjax.Optimizer`; its state is a `fedfuse_jax.ServerState`.

    Raises:
        ValueError: A Python number is out of its range. From `apply` and `apply_to_clients`: deltas, parameters and
            state differ in structure or shapes, or a weight is not a scalar.
        TypeError: An argument is not a real number. From `apply` and `apply_to_clients`: a leaf is not floating, or a
            weight is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import fedavgm
        >>> server = fedavgm(learning_rate=1.0, momentum=0.5)
        >>> params = jnp.zeros(2)
        >>> state, clients = server.init(params), [("a", jnp.array([-2.0, 2.0]), 3), ("b", jnp.array([2.0, 2.0]), 1)]
        >>> for _ in range(2):
        ...     state, params = server.apply_to_clients(clients, state, params)
        >>> params.tolist(), state.first_moment.tolist()
        ([2.5, -5.0], [1.5, -3.0])

    Source:
        Hsu et al. 2019, https://arxiv.org/abs/1909.06335.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.fedavgm_weighted_update`.
        *Determinism*: the same bits for the same clients in the same order. A new number of clients compiles anew.
    """
    return _fused("fedavgm", fedavgm_weighted_update, {"learning_rate": learning_rate, "momentum": momentum})


def fedadagrad(learning_rate: Any, b1: Any = 0.0, tau: Any = 1e-3) -> FusedOptimizer:
    r"""Builds FedAdagrad as a FedJAX server optimizer that averages, too.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i, \qquad m \leftarrow \beta_1 m + (1 - \beta_1) \Delta,
        \qquad v \leftarrow v + \Delta^2, \qquad \theta \leftarrow \theta + \eta \frac{m}{\sqrt v + \tau}

    Here x_i are the clients' updates, client - server: FedJAX's deltas with their signs turned, so that the parameters
    descend along the deltas. The state is that of `fedfuse_jax.fedadagrad_weighted_update`, and so are the numbers.

    In `federated_averaging` without an aggregator, all deltas are held and stacked once, and their mean, the state and
    the parameters are one call; no mean is stored. After an aggregator, what it gives counts as one client's delta. A
    round whose mean is not finite somewhere, or of clients whose weights sum to 0, changes nothing.

    Args:
        learning_rate: eta, a real scalar, or a schedule: a function of the number of steps taken.
        b1: beta_1, a real scalar from 0 to 1; 0, as usual, keeps no momentum.
        tau: tau, a real scalar of at least 0: how adaptive the step is.

    Returns:
        A `FusedOptimizer`, which is a `fedjax.Optimizer`; its state is a `fedfuse_jax.ServerState`.

    Raises:
        ValueError: A Python number is out of its range. From `apply` and `apply_to_clients`: deltas, parameters and
            state differ in structure or shapes, or a weight is not a scalar.
        TypeError: An argument is not a real number. From `apply` and `apply_to_clients`: a leaf is not floating, or a
            weight is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import fedadagrad
        >>> server = fedadagrad(learning_rate=0.5, tau=0.0)
        >>> state, clients = server.init(jnp.zeros(2)), [("a", jnp.array([-3.0, 4.0]), 1)]
        >>> state, params = server.apply_to_clients(clients, state, jnp.zeros(2))
        >>> params.tolist(), state.second_moment.tolist()
        ([0.5, -0.5], [9.0, 16.0])

    Source:
        FedAdagrad of Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not `fedjax.optimizers.adagrad`.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.fedadagrad_weighted_update`.
        *Determinism*: the same bits for the same clients in the same order. A new number of clients compiles anew.
    """
    return _fused("fedadagrad", fedadagrad_weighted_update, {"learning_rate": learning_rate, "b1": b1, "tau": tau})


def fedadam(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.99, tau: Any = 1e-3) -> FusedOptimizer:
    r"""Builds FedAdam as a FedJAX server optimizer that averages, too.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i, \qquad m \leftarrow \beta_1 m + (1 - \beta_1) \Delta,
        \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2, \qquad
        \theta \leftarrow \theta + \eta \frac{m}{\sqrt v + \tau}

    Here x_i are the clients' updates, client - server: FedJAX's deltas with their signs turned, so that the parameters
    descend along the deltas. The state is that of `fedfuse_jax.fedadam_weighted_update`, and so are the numbers.

    In `federated_averaging` without an aggregator, all deltas are held and stacked once, and their mean, the state and
    the parameters are one call; no mean is stored. After an aggregator, what it gives counts as one client's delta. A
    round whose mean is not finite somewhere, or of clients whose weights sum to 0, changes nothing.

    Args:
        learning_rate: eta, a real scalar, or a schedule: a function of the number of steps taken.
        b1: beta_1, a real scalar from 0 to 1.
        b2: beta_2, a real scalar from 0 to 1.
        tau: tau, a real scalar of at least 0: how adaptive the step is.

    Returns:
        A `FusedOptimizer`, which is a `fedjax.Optimizer`; its state is a `fedfuse_jax.ServerState`.

    Raises:
        ValueError: A Python number is out of its range. From `apply` and `apply_to_clients`: deltas, parameters and
            state differ in structure or shapes, or a weight is not a scalar.
        TypeError: An argument is not a real number. From `apply` and `apply_to_clients`: a leaf is not floating, or a
            weight is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import fedadam
        >>> server = fedadam(learning_rate=0.1)
        >>> deltas = {"a": jnp.array([-0.4, 0.2]), "b": jnp.array([-0.6, 0.0])}
        >>> clients = [(name, delta, 1) for name, delta in deltas.items()]
        >>> state, params = server.apply_to_clients(clients, server.init(jnp.zeros(2)), jnp.zeros(2))
        >>> [round(x, 4) for x in params.tolist()], int(state.step)
        ([0.098, -0.0905], 1)

    Source:
        FedAdam of Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not `fedjax.optimizers.adam`, which
        corrects a bias.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.fedadam_weighted_update`.
        *Determinism*: the same bits for the same clients in the same order. A new number of clients compiles anew.
    """
    return _fused("fedadam", fedadam_weighted_update, {"learning_rate": learning_rate, "b1": b1, "b2": b2, "tau": tau})


def fedyogi(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.99, tau: Any = 1e-3) -> FusedOptimizer:
    r"""Builds FedYogi as a FedJAX server optimizer that averages, too.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i, \qquad m \leftarrow \beta_1 m + (1 - \beta_1) \Delta,
        \qquad v \leftarrow v - (1 - \beta_2) \Delta^2 \operatorname{sign}(v - \Delta^2), \qquad
        \theta \leftarrow \theta + \eta \frac{m}{\sqrt v + \tau}

    Here x_i are the clients' updates, client - server: FedJAX's deltas with their signs turned, so that the parameters
    descend along the deltas. The state is that of `fedfuse_jax.fedyogi_weighted_update`, and so are the numbers.

    In `federated_averaging` without an aggregator, all deltas are held and stacked once, and their mean, the state and
    the parameters are one call; no mean is stored. After an aggregator, what it gives counts as one client's delta. A
    round whose mean is not finite somewhere, or of clients whose weights sum to 0, changes nothing.

    Args:
        learning_rate: eta, a real scalar, or a schedule: a function of the number of steps taken.
        b1: beta_1, a real scalar from 0 to 1.
        b2: beta_2, a real scalar from 0 to 1.
        tau: tau, a real scalar of at least 0: how adaptive the step is.

    Returns:
        A `FusedOptimizer`, which is a `fedjax.Optimizer`; its state is a `fedfuse_jax.ServerState`.

    Raises:
        ValueError: A Python number is out of its range. From `apply` and `apply_to_clients`: deltas, parameters and
            state differ in structure or shapes, or a weight is not a scalar.
        TypeError: An argument is not a real number. From `apply` and `apply_to_clients`: a leaf is not floating, or a
            weight is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import fedyogi
        >>> server = fedyogi(learning_rate=1.0, b1=0.0, b2=0.75, tau=0.0)
        >>> state, clients = server.init(jnp.zeros(2)), [("a", jnp.array([-1.0, 2.0]), 1)]
        >>> state, params = server.apply_to_clients(clients, state, jnp.zeros(2))
        >>> params.tolist(), state.second_moment.tolist()
        ([2.0, -2.0], [0.25, 1.0])

    Source:
        FedYogi of Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not `fedjax.optimizers.yogi`, which
        corrects a bias.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.fedyogi_weighted_update`.
        *Determinism*: the same bits for the same clients in the same order. A new number of clients compiles anew.
    """
    return _fused("fedyogi", fedyogi_weighted_update, {"learning_rate": learning_rate, "b1": b1, "b2": b2, "tau": tau})


RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"least": float("-inf")},
    "momentum": {"most": 1.0},
    "b1": {"most": 1.0},
    "b2": {"most": 1.0},
    "tau": {},
}


def _fused(name: str, update: Callable[..., Any], scalars: dict[str, Any]) -> FusedOptimizer:
    for argument, value in scalars.items():
        if not (argument == "learning_rate" and callable(value)):
            checks.bounded_scalar(name, argument, value, np.float32, **RANGES[argument])
            scalars = scalars | {argument: checks.for_jit(name, argument, value)}

    def init(params: Any) -> ServerState:
        return init_server_state(params, tau=scalars["tau"]) if "tau" in scalars else init_server_state(params)

    def scalars_of(state: ServerState) -> dict[str, Any]:
        if not isinstance(state, ServerState):
            raise TypeError(f"{name}: opt_state is {checks.describe(state)}; it needs a ServerState of init(params).")
        rate = scalars["learning_rate"]
        return scalars | {"learning_rate": rate(state.step) if callable(rate) else rate}

    def apply(delta: Any, opt_state: ServerState, params: Any) -> tuple[ServerState, Any]:
        return _descend_along_one(delta, opt_state, params, scalars_of(opt_state), update=update)

    def apply_to_clients(
        clients_params_and_weights: Iterable[ClientUpdate], opt_state: ServerState, params: Any
    ) -> tuple[ServerState, Any]:
        clients = list(clients_params_and_weights)
        if not clients:
            return opt_state, params
        triples = list(participants(name, clients))
        weights = jnp.asarray([scalar_weight(name, client_id, weight) for client_id, _, weight in triples])
        try:
            deltas = stack_clients([delta for _, delta, _ in triples])
            return _descend(deltas, weights, opt_state, params, scalars_of(opt_state), update=update)
        except (TypeError, ValueError) as error:
            error.add_note(f"{name}: updates[i] are the params of the i-th client that came")
            raise

    return FusedOptimizer(init, apply, apply_to_clients)


@partial(jax.jit, static_argnames="update")
def _descend(
    deltas: Any, weights: Any, state: ServerState, params: Any, scalars: dict[str, Any], *, update: Callable[..., Any]
) -> tuple[ServerState, Any]:
    """Turns the signs of what is as large as the parameters, to leave those of the stacked deltas alone."""
    scalars = scalars | {"learning_rate": -jnp.asarray(scalars["learning_rate"])}
    params, state = update(params, _mirrored(state), deltas, weights, **scalars)
    return _mirrored(state), params


@partial(jax.jit, static_argnames="update")
def _descend_along_one(
    delta: Any, state: ServerState, params: Any, scalars: dict[str, Any], *, update: Callable[..., Any]
) -> tuple[ServerState, Any]:
    as_one_client = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], delta)
    return _descend(as_one_client, None, state, params, scalars, update=update)


def _mirrored(state: ServerState) -> ServerState:
    return state._replace(first_moment=jax.tree.map(jnp.negative, state.first_moment))
