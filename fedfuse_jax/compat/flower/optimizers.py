"""The strategies with a server optimizer: `strategy(params, state, models, num_examples)`."""

import itertools
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import (
    ServerState,
    fedadagrad_weighted_update,
    fedadam_weighted_update,
    fedavgm_weighted_update,
    fedyogi_weighted_update,
    init_server_state,
    stack_clients,
    weighted_mean,
)
from fedfuse_jax import _checks as checks
from fedfuse_jax.compat._host import as_floats, as_numbers, precision_of
from fedfuse_jax.compat.flower._forms import are_lists_of_arrays, as_list_of_arrays, floats_of_clients

PyTree = Any

# Of the arguments that may not be any finite number.
_RANGES = {"server_momentum": (0.0, 1.0), "beta_1": (0.0, 1.0), "beta_2": (0.0, 1.0), "tau": (0.0,)}


@dataclass(frozen=True)
class _ServerOptimizer:
    """What all have in common: Δ from models, both forms of them, and rounds that do not count."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(checks.python_number(name, field.name, value, *_RANGES.get(field.name, ()))):
                raise ValueError(f"{name}: {field.name} is {value}; it needs to be finite.")

    def init(self, params: PyTree) -> ServerState:
        """The state before the first round: both moments are zeros, as in Flower."""
        params = jax.tree.map(as_floats, params)
        arrays = jax.tree.leaves(params)
        if not arrays:
            return ServerState(jnp.zeros((), np.int32), params, params)
        if not (isinstance(params, list) and all(isinstance(array, np.ndarray) for array in params)):
            return init_server_state(params, tau=0.0)
        with precision_of(arrays):
            return _of_host(init_server_state(params, tau=0.0))

    def __call__(
        self, params: PyTree, state: ServerState, models: PyTree, num_examples: Any = None
    ) -> tuple[PyTree, ServerState]:
        """One round: the new parameters and the new state, from the models that the clients sent."""
        if isinstance(models, list) and not models:
            return params, state
        num_examples = as_numbers(num_examples)
        if are_lists_of_arrays(models):
            (params,), clients = floats_of_clients([params]), floats_of_clients(models)
            if not any([params, *clients]):
                return params, state
            with precision_of(itertools.chain(params, *clients)):
                arrays, state = _compiled(self, params, state, stack_clients(clients), num_examples)
                return as_list_of_arrays(arrays, params), _of_host(state)
        params, models = jax.tree.map(as_floats, (params, models))
        return _compiled(self, params, state, models, num_examples)

    def _round(
        self, params: PyTree, state: ServerState, models: PyTree, num_examples: Any
    ) -> tuple[PyTree, ServerState]:
        name = type(self).__name__
        if not isinstance(state, ServerState):
            raise TypeError(f"{name}: state is {checks.describe(state)}; it needs what init(params) made.")
        old = checks.float_leaves(name, "params", params)
        sent, n_clients = checks.client_stacked_like(name, models, old, "models")
        if num_examples is not None:
            dtype = checks.tree_accumulator(sent.arrays)
            num_examples = checks.per_client(name, "num_examples", num_examples, n_clients, dtype)
        means = weighted_mean(sent.arrays, num_examples)
        # The mean of the differences, as an update of one client: the models are read once, and nobody's is copied.
        delta = old.unflatten([(mean - param)[None] for mean, param in zip(means, old.arrays, strict=True)])
        return self._step(params, state, delta, checks.tree_accumulator(old.arrays))

    def _step(self, params: PyTree, state: ServerState, delta: PyTree, dtype: Any) -> tuple[PyTree, ServerState]:
        raise NotImplementedError


def _of_host(state: ServerState) -> ServerState:
    """The moments as NumPy arrays, which stay float64 where JAX has none."""
    return state._replace(
        first_moment=[np.asarray(array) for array in state.first_moment],
        second_moment=[np.asarray(array) for array in state.second_moment],
    )


@partial(jax.jit, static_argnums=0)
def _compiled(
    strategy: _ServerOptimizer, params: PyTree, state: ServerState, models: PyTree, num_examples: Any
) -> tuple[PyTree, ServerState]:
    """Equal strategies are equal, so that each compiles once for models of one shape."""
    return strategy._round(params, state, models, num_examples)


@dataclass(frozen=True, kw_only=True)
class FedAvgM(_ServerOptimizer):
    r"""Momentum on the server.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i - \theta, \qquad m \leftarrow \beta m + \Delta, \qquad
        \theta \leftarrow \theta + \eta m

    Here x are the clients' models, w their numbers of examples, and θ the server's parameters.

    Args:
        server_learning_rate: η.
        server_momentum: β, from 0 to 1.

    Raises:
        ValueError: An argument is out of range; or, when called, the models are not like the parameters.
        TypeError: An argument is not a Python number; or, when called, the state is not one of `init(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> strategy = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
        >>> params, models = jnp.zeros(1), jnp.array([[1.0], [3.0]])
        >>> params, state = strategy(params, strategy.init(params), models, [30, 10])
        >>> params.tolist(), state.first_moment.tolist()
        ([0.75], [1.5])

    Source:
        Hsu et al. 2019, https://arxiv.org/abs/1909.06335; `flwr.serverapp.strategy.FedAvgM`.

    Notes:
        *As in Flower*: m has no factor 1 − β, and is Δ after the first round. By default this is `FedAvg`.
        *Unlike Flower*: a round that is empty or not finite changes nothing. A negative β is refused, where Flower
        leaves momentum out; the parameters are those handed in, where Flower keeps its own from the first round on.
    """

    server_learning_rate: float = 1.0
    server_momentum: float = 0.0

    def _step(self, params: PyTree, state: ServerState, delta: PyTree, dtype: Any) -> tuple[PyTree, ServerState]:
        rate, momentum = self.server_learning_rate, self.server_momentum
        return fedavgm_weighted_update(params, state, delta, learning_rate=rate, momentum=momentum)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_ServerOptimizer):
    r"""Adagrad on the server.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i - \theta, \qquad v \leftarrow v + \Delta^2, \qquad
        \theta \leftarrow \theta + \eta \frac{\Delta}{\sqrt v + \tau}

    Here x are the clients' models, w their numbers of examples, and θ the server's parameters; v begins at 0.

    Args:
        eta: η.
        eta_l: The clients' learning rate, which is theirs to use: as in Flower, the server does not.
        tau: τ, at least 0. At 0, a coordinate that has never moved stays where it is, where Flower has 0 / 0.

    Raises:
        ValueError: An argument is out of range; or, when called, the models are not like the parameters.
        TypeError: An argument is not a Python number; or, when called, the state is not one of `init(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> strategy = flower.FedAdagrad(eta=0.1)
        >>> params, models = jnp.zeros(3), jnp.array([[0.5, -0.1, 1e-4]])
        >>> params, state = strategy(params, strategy.init(params), models)
        >>> [round(x, 4) for x in params.tolist()]
        [0.0998, -0.099, 0.0091]

    Source:
        Reddi et al. 2021, https://arxiv.org/abs/2003.00295; `flwr.serverapp.strategy.FedAdagrad`.

    Notes:
        *As in Flower*: v begins at 0, where `fedfuse_jax.fedadagrad_weighted_update` begins at τ².
        *Unlike Flower*: a round that is empty or not finite changes nothing; moments are float32 for low precision.
    """

    eta: float = 1e-1
    eta_l: float = 1e-1
    tau: float = 1e-3

    def _step(self, params: PyTree, state: ServerState, delta: PyTree, dtype: Any) -> tuple[PyTree, ServerState]:
        return fedadagrad_weighted_update(params, state, delta, learning_rate=self.eta, tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class FedAdam(_ServerOptimizer):
    r"""Adam on the server, with Flower's correction of the step.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i - \theta, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2, \qquad
        \theta \leftarrow \theta + \eta \frac{\sqrt{1 - \beta_2^{t+1}}}{1 - \beta_1^{t+1}} \frac{m}{\sqrt v + \tau}

    Here x are the clients' models, w their numbers of examples, θ the server's parameters, and t = 1, 2, … the round; m
    and v begin at 0.

    Args:
        eta: η.
        eta_l: The clients' learning rate, which is theirs to use: as in Flower, the server does not.
        beta_1: β₁, at least 0 and less than 1.
        beta_2: β₂, from 0 to 1.
        tau: τ, at least 0. At 0, a coordinate that has never moved stays where it is, where Flower has 0 / 0.

    Raises:
        ValueError: An argument is out of range; or, when called, the models are not like the parameters.
        TypeError: An argument is not a Python number; or, when called, the state is not one of `init(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> strategy = flower.FedAdam(eta=0.1)
        >>> params, models = jnp.zeros(3), jnp.array([[0.5, -0.1, 1e-4]])
        >>> params, state = strategy(params, strategy.init(params), models)
        >>> [round(x, 4) for x in params.tolist()]
        [0.0728, -0.0675, 0.0007]

    Source:
        Reddi et al. 2021, https://arxiv.org/abs/2003.00295; `flwr.serverapp.strategy.FedAdam`.

    Notes:
        *As in Flower*: the correction is Adam's, of the step, but of round t + 1; τ outside the root, uncorrected.
        *Unlike Flower*: a round that is empty or not finite changes nothing, t included, which there counts rounds
        without replies as well. Floating arrays keep their dtypes; there, they become float64.
    """

    eta: float = 1e-1
    eta_l: float = 1e-1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if np.float32(self.beta_1) == 1:
            raise ValueError(f"FedAdam: beta_1 is {self.beta_1}; it needs to be less than 1, in float32 too.")

    def _step(self, params: PyTree, state: ServerState, delta: PyTree, dtype: Any) -> tuple[PyTree, ServerState]:
        # The betas as the moments have them, rounded: their own bias is what is corrected.
        betas = [jnp.asarray(beta, dtype) for beta in (self.beta_1, self.beta_2)]
        of_first, of_second = (_bias_correction(beta, state.step) for beta in betas)
        rate = self.eta * jnp.sqrt(of_second) / of_first
        return fedadam_weighted_update(params, state, delta, learning_rate=rate, b1=betas[0], b2=betas[1], tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class FedYogi(_ServerOptimizer):
    r"""Yogi on the server.

    .. math:: \Delta = \sum_i w_i x_i \Big/ \sum_i w_i - \theta, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad
        v \leftarrow v - (1 - \beta_2) \Delta^2 \operatorname{sign}(v - \Delta^2), \qquad
        \theta \leftarrow \theta + \eta \frac{m}{\sqrt v + \tau}

    Here x are the clients' models, w their numbers of examples, and θ the server's parameters; m and v begin at 0.

    Args:
        eta: η.
        eta_l: The clients' learning rate, which is theirs to use: as in Flower, the server does not.
        beta_1: β₁, from 0 to 1.
        beta_2: β₂, from 0 to 1.
        tau: τ, at least 0. At 0, a coordinate that has never moved stays where it is, where Flower has 0 / 0.

    Raises:
        ValueError: An argument is out of range; or, when called, the models are not like the parameters.
        TypeError: An argument is not a Python number; or, when called, the state is not one of `init(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> strategy = flower.FedYogi(eta=0.1)
        >>> params, models = jnp.zeros(3), jnp.array([[0.5, -0.1, 1e-4]])
        >>> params, state = strategy(params, strategy.init(params), models)
        >>> [round(x, 4) for x in params.tolist()]
        [0.098, -0.0909, 0.001]

    Source:
        Reddi et al. 2021, https://arxiv.org/abs/2003.00295; `flwr.serverapp.strategy.FedYogi`.

    Notes:
        *As in Flower*: no bias correction; v begins at 0, where `fedfuse_jax.fedyogi_weighted_update` begins at τ²; the
        default of η is a tenth of FedAdam's.
        *Unlike Flower*: a round that is empty or not finite changes nothing; moments are float32 for low precision.
    """

    eta: float = 1e-2
    eta_l: float = 0.0316
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def _step(self, params: PyTree, state: ServerState, delta: PyTree, dtype: Any) -> tuple[PyTree, ServerState]:
        betas = {"b1": self.beta_1, "b2": self.beta_2}
        return fedyogi_weighted_update(params, state, delta, learning_rate=self.eta, **betas, tau=self.tau)


def _bias_correction(beta: Array, step: Array) -> Array:
    """1 − β^(t+1) in the round after `step` of them, t = step + 1; without the cancellation that β near 1 brings."""
    return -jnp.expm1((step + 2) * jnp.log(beta))
