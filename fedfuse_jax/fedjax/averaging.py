"""FedJAX's federated averaging with the argument it lacks: the aggregator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fedjax
import jax
from fedjax.algorithms import fed_avg

from fedfuse_jax.fedjax._clients import ClientUpdate
from fedfuse_jax.fedjax.mean import mean_aggregator
from fedfuse_jax.fedjax.server_optimizers import FusedOptimizer

Client = tuple[fedjax.ClientId, fedjax.ClientDataset, fedjax.PRNGKey]
Diagnostics = Mapping[fedjax.ClientId, Any]


@fedjax.dataclass
class StatefulServerState(fed_avg.ServerState):
    """FedJAX's server state plus the state of an aggregator that has one.

    Attributes:
        params: Pytree of the server's model parameters.
        opt_state: Pytree of the server optimizer's state.
        aggregator_state: Pytree of the aggregator's state.
    """

    aggregator_state: Any


def federated_averaging(
    grad_fn: Callable[[fedjax.Params, fedjax.BatchExample, fedjax.PRNGKey], fedjax.Params],
    client_optimizer: fedjax.Optimizer,
    server_optimizer: fedjax.Optimizer,
    client_batch_hparams: fedjax.ShuffleRepeatBatchHParams,
    aggregator: fedjax.aggregators.Aggregator | None = None,
) -> fedjax.FederatedAlgorithm:
    r"""Builds FedJAX's federated averaging with the aggregator of your choice.

    .. math:: \theta \leftarrow \operatorname{step}(\theta, A(\{\theta - \theta_i\}))

    Here theta_i is what client i makes of the server's parameters by training on its own data, A
    the aggregator and step the server optimizer's.

    FedJAX's own signature plus `aggregator`, and FedJAX's own client training. With the default
    aggregator it gives what `fedjax.algorithms.fed_avg.federated_averaging` would give if that ran
    under current JAX. Deltas are server - client, as FedJAX's are: the server optimizer descends.

    Args:
        grad_fn: From `(params, batch_example, rng)` to gradients, e.g. `fedjax.model_grad(model)`.
        client_optimizer: The optimizer of local training.
        server_optimizer: The optimizer that applies the aggregated delta. Without an aggregator, a
            `FusedOptimizer`, such as `fedadam(0.1)`, averages, too.
        client_batch_hparams: How a client's data set is shuffled, repeated and cut into batches.
        aggregator: Any FedJAX aggregator; it gets the deltas lazily, as they are trained, with the
            clients' numbers of examples for weights. `None`: `mean_aggregator()`, or what a
            `FusedOptimizer` makes of the stacked deltas in one call.

    Returns:
        A `fedjax.FederatedAlgorithm`. `init(params)` gives FedJAX's own `fed_avg.ServerState`, so a
        state or a checkpoint made by either serves the other; only an aggregator whose state holds
        arrays makes it a `StatefulServerState`, a subclass. `apply(state, clients)` takes
        `(client_id, ClientDataset, rng)` triples and gives the next state and, for each client,
        `{"delta_l2_norm": scalar}`.

    Raises:
        TypeError: `aggregator` is not a `fedjax.aggregators.Aggregator`.
        ValueError: From `apply`: there are no clients; with a `FusedOptimizer` and no aggregator,
            that is no error, and the state stays as it was.

    Example:
        >>> import fedjax, jax, jax.numpy as jnp, numpy as np
        >>> from fedfuse_jax.fedjax import federated_averaging, median_aggregator
        >>> gradient = jax.grad(lambda params, batch, rng: jnp.mean((params - batch["x"]) ** 2) / 2)
        >>> algorithm = federated_averaging(
        ...     gradient,
        ...     client_optimizer=fedjax.optimizers.sgd(1.0),
        ...     server_optimizer=fedjax.optimizers.sgd(1.0),
        ...     client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(batch_size=1),
        ...     aggregator=median_aggregator(),
        ... )
        >>> data = [fedjax.ClientDataset({"x": np.array([x], np.float32)}) for x in (1, 2, 1e9)]
        >>> clients = [(i, dataset, jax.random.PRNGKey(i)) for i, dataset in enumerate(data)]
        >>> state, diagnostics = algorithm.apply(algorithm.init(jnp.float32(0)), clients)
        >>> print(state.params, diagnostics[0]["delta_l2_norm"])
        2.0 1.0

    Source:
        McMahan et al. 2017, https://arxiv.org/abs/1602.05629; Reddi et al. 2021,
        https://arxiv.org/abs/2003.00295; FedJAX's `fedjax.algorithms.fed_avg`.

    Notes:
        *Backends*: which of FedJAX's `for_each_client` backends trains the clients is decided where
        this function is called, as in FedJAX.
        *Determinism*: as long as `client_batch_hparams.seed` is set; with `None` FedJAX shuffles
        anew at each run.
    """
    fused = server_optimizer if aggregator is None and isinstance(server_optimizer, FusedOptimizer) else None
    if aggregator is None:
        aggregator = mean_aggregator()
    if not isinstance(aggregator, fedjax.aggregators.Aggregator):
        raise TypeError(
            f"federated_averaging: aggregator is a {type(aggregator).__name__}; it needs a "
            "fedjax.aggregators.Aggregator such as mean_aggregator()"
        )
    train_for_each_client = fed_avg.create_train_for_each_client(grad_fn, client_optimizer)

    def server_state(params: Any, opt_state: Any, aggregator_state: Any) -> fed_avg.ServerState:
        if jax.tree.leaves(aggregator_state):
            return StatefulServerState(params, opt_state, aggregator_state)
        return fed_avg.ServerState(params, opt_state)

    def init(params: fedjax.Params) -> fed_avg.ServerState:
        return server_state(params, server_optimizer.init(params), aggregator.init())

    def apply(state: fed_avg.ServerState, clients: Sequence[Client]) -> tuple[fed_avg.ServerState, Diagnostics]:
        clients = list(clients)
        if not clients and fused is None:
            raise ValueError(
                "federated_averaging: clients is empty; it needs at least one "
                "(client_id, ClientDataset, rng): an average of nobody is no step"
            )
        num_examples = {client_id: len(dataset) for client_id, dataset, _ in clients}
        batches = [
            (client_id, dataset.shuffle_repeat_batch(client_batch_hparams), rng) for client_id, dataset, rng in clients
        ]
        diagnostics: dict[fedjax.ClientId, Any] = {}

        def deltas() -> Iterator[ClientUpdate]:
            for client_id, delta in train_for_each_client(state.params, batches):
                diagnostics[client_id] = {"delta_l2_norm": fedjax.tree_util.tree_l2_norm(delta)}
                yield client_id, delta, num_examples[client_id]

        if fused is not None:
            opt_state, params = fused.apply_to_clients(deltas(), state.opt_state, state.params)
            return server_state(params, opt_state, ()), diagnostics

        # A plain ServerState holds no aggregator state: it is FedJAX's, or there is none to hold.
        aggregator_state = state.aggregator_state if isinstance(state, StatefulServerState) else aggregator.init()
        delta, aggregator_state = aggregator.apply(deltas(), aggregator_state)
        opt_state, params = server_optimizer.apply(delta, state.opt_state, state.params)
        return server_state(params, opt_state, aggregator_state), diagnostics

    return fedjax.FederatedAlgorithm(init, apply)
