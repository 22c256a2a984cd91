"""FedJAX: our rules as FedJAX aggregators, and federated averaging that takes one.

Works with the `fedjax` on PyPI (0.0.17) under current JAX without patching either. FedJAX's own
`mean_aggregator` and `federated_averaging` call the removed `jax.tree_map`; the ones here have the
same signatures and do not. No arithmetic on updates happens in this file: it turns FedJAX's words
into ours and calls the core.

    import fedjax
    from fedfuse_jax.fedjax import federated_averaging, trimmed_mean_aggregator

    algorithm = federated_averaging(
        grad_fn, client_optimizer, server_optimizer, client_batch_hparams,
        aggregator=trimmed_mean_aggregator(0.25),
    )
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg

from fedfuse_jax import (
    accumulate_weighted,
    coordinate_median,
    stack_clients,
    trimmed_mean,
    weighted_sum,
)
from fedfuse_jax.fedjax_compression import (
    rotated_uniform_stochastic_quantizer,
    structured_drive_quantizer,
    terngrad_quantizer,
    uniform_stochastic_quantizer,
)

__all__ = [
    "StatefulServerState",
    "federated_averaging",
    "mean_aggregator",
    "median_aggregator",
    "rotated_uniform_stochastic_quantizer",
    "structured_drive_quantizer",
    "terngrad_quantizer",
    "trimmed_mean_aggregator",
    "uniform_stochastic_quantizer",
]

Client = tuple[fedjax.ClientId, fedjax.ClientDataset, fedjax.PRNGKey]
ClientUpdate = tuple[fedjax.ClientId, fedjax.Params, Any]
Diagnostics = Mapping[fedjax.ClientId, Any]


def mean_aggregator() -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of the clients' updates, one client at a time.

    .. math:: y = \sum_i w_i x_i \Big/ \sum_i w_i

    The clients may come from a generator: each is added to a float32 running total (float64 for
    float64 leaves) whose buffer is donated, so memory does not grow with the number of clients.

    Differs from `fedjax.aggregators.mean_aggregator` where that one is wrong: the sum is float32
    whatever the dtype of the leaves, and weights that sum to zero give NaN rather than a silent
    model of zeros. NaN in any update of any weight, zero included, reaches the result.

    Returns:
        A stateless `fedjax.aggregators.Aggregator`; `apply(clients_params_and_weights, state)`
        takes an iterable of `(client_id, params, weight)`, each `params` a pytree of floating
        leaves, each `weight` a Python, NumPy or JAX real scalar, and returns `(mean, state)`. Every
        leaf of the mean has the dtype that leaf has in the first client, rounded once, so that the
        server optimizer's state keeps its dtypes.

    Raises:
        ValueError: From `apply`: there is no client at all, or a weight is not a scalar, or the
            clients' trees or shapes differ.
        TypeError: From `apply`: a leaf is not floating, or a weight is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import mean_aggregator
        >>> aggregator = mean_aggregator()
        >>> updates = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([5.0, 2.0])}
        >>> num_examples = {"a": 1, "b": 3}
        >>> clients = ((name, {"w": w}, num_examples[name]) for name, w in updates.items())
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(mean["w"])
        [4. 2.]

    Source:
        FedAvg: McMahan et al. 2017, https://arxiv.org/abs/1602.05629. The interface is FedJAX's:
        Ro et al. 2021, https://arxiv.org/abs/2108.02117.

    Notes:
        *Differentiability*: in the params and the weights, under a surrounding `jax.grad`.
        *Sharding*: parameters may be sharded in any way, without collectives.
        *Determinism*: the clients are added in the order in which they come, and the same order
        gives the same bits.
    """

    def apply(clients_params_and_weights: Iterable[ClientUpdate], state: Any) -> tuple[Any, Any]:
        total: Any = None
        dtypes: tuple[Any, ...] = ()
        for client_id, params, weight in _participants("mean_aggregator", clients_params_and_weights):
            weight = _scalar_weight("mean_aggregator", client_id, weight)
            try:
                if total is None:
                    total = _first_total(params, weight)
                    dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(params))
                else:
                    total = _next_total(total, params, weight)
            except (TypeError, ValueError) as error:
                error.add_note(f"mean_aggregator: raised by the params of client {client_id!r}")
                raise
        return _finish_mean(total, dtypes), state

    return fedjax.aggregators.Aggregator(_no_state, apply)


def median_aggregator() -> fedjax.aggregators.Aggregator:
    r"""Builds the coordinate-wise median of the clients' updates.

    .. math:: y_j = \operatorname{median}_i \, x_{ij}

    For an even number of clients that is the mean of the two middle values.

    Withstands any fewer than half of the clients, NaN and infinities included. The weights are
    ignored, since a bad client would choose its own: every client that comes counts once, one
    without examples too.

    Returns:
        A stateless `fedjax.aggregators.Aggregator`; `apply(clients_params_and_weights, state)`
        takes an iterable of `(client_id, params, weight)`, each `params` a pytree of floating
        leaves, and returns `(median, state)` with the dtypes of the clients' leaves. All updates
        are held and stacked once: memory is two copies of them.

    Raises:
        ValueError: From `apply`: there is no client at all, or the clients' trees or shapes differ.
        TypeError: From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import median_aggregator
        >>> aggregator = median_aggregator()
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in (1.0, jnp.nan, 2.0))
        >>> median, state = aggregator.apply(clients, aggregator.init())
        >>> print(median["w"])
        2.0

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.coordinate_median`.
        *Determinism*: the same bits in whatever order the clients come. A new number of clients
        compiles anew.
    """
    return _stacking_aggregator("median_aggregator", _median)


def trimmed_mean_aggregator(
    trim_fraction: float = 0.2, *, trim_count: int | None = None
) -> fedjax.aggregators.Aggregator:
    r"""Builds the coordinate-wise trimmed mean of the clients' updates.

    .. math:: y_j = \frac{1}{n - 2k} \sum_{i=k+1}^{n-k} x_{(i)j}, \quad k = \lfloor \beta n \rfloor

    The k smallest and the k largest values of each coordinate are dropped, the others averaged.

    Withstands k bad clients, NaN and infinities included. The weights are ignored, since a bad
    client would choose its own: every client that comes counts once, one without examples too.

    Args:
        trim_fraction: The share of the clients dropped at each end, in [0, 0.5).
        trim_count: k itself; wins over the fraction.

    Returns:
        A stateless `fedjax.aggregators.Aggregator`; `apply(clients_params_and_weights, state)`
        takes an iterable of `(client_id, params, weight)`, each `params` a pytree of floating
        leaves, and returns `(trimmed_mean, state)` with the dtypes of the clients' leaves. All
        updates are held and stacked once: memory is two copies of them.

    Raises:
        ValueError: `trim_fraction` or `trim_count` is out of range. From `apply`: there is no
            client at all, the trim leaves nobody, or the clients' trees or shapes differ.
        TypeError: From `apply`: a leaf is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import trimmed_mean_aggregator
        >>> aggregator = trimmed_mean_aggregator(0.25)
        >>> values = (1.0, -jnp.inf, 3.0, 1e30)
        >>> clients = (("id", {"w": jnp.float32(value)}, 1) for value in values)
        >>> trimmed, state = aggregator.apply(clients, aggregator.init())
        >>> print(trimmed["w"])
        2.0

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *Differentiability* and *sharding*: those of `fedfuse_jax.trimmed_mean`.
        *Determinism*: the same bits for the same clients in the same order. A new number of
        clients compiles anew.
    """
    if not 0 <= trim_fraction < 0.5:
        raise ValueError(
            f"trimmed_mean_aggregator: trim_fraction is {trim_fraction!r}; it needs a number in "
            "[0, 0.5): that share of the clients is dropped at each end"
        )
    if trim_count is not None and trim_count < 0:
        raise ValueError(f"trimmed_mean_aggregator: trim_count is {trim_count!r}; it needs a whole number >= 0")
    return _stacking_aggregator(
        "trimmed_mean_aggregator",
        partial(_trimmed_mean, trim_count=trim_count, trim_fraction=trim_fraction),
    )


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
        server_optimizer: The optimizer that applies the aggregated delta.
        client_batch_hparams: How a client's data set is shuffled, repeated and cut into batches.
        aggregator: Any FedJAX aggregator; it gets the deltas lazily, as they are trained, with the
            clients' numbers of examples for weights. `None`: `mean_aggregator()`.

    Returns:
        A `fedjax.FederatedAlgorithm`. `init(params)` gives FedJAX's own `fed_avg.ServerState`, so a
        state or a checkpoint made by either serves the other; only an aggregator whose state holds
        arrays makes it a `StatefulServerState`, a subclass. `apply(state, clients)` takes
        `(client_id, ClientDataset, rng)` triples and gives the next state and, for each client,
        `{"delta_l2_norm": scalar}`.

    Raises:
        TypeError: `aggregator` is not a `fedjax.aggregators.Aggregator`.
        ValueError: From `apply`: there are no clients.

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
        if not clients:
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

        # A plain ServerState holds no aggregator state: it is FedJAX's, or there is none to hold.
        aggregator_state = state.aggregator_state if isinstance(state, StatefulServerState) else aggregator.init()
        delta, aggregator_state = aggregator.apply(deltas(), aggregator_state)
        opt_state, params = server_optimizer.apply(delta, state.opt_state, state.params)
        return server_state(params, opt_state, aggregator_state), diagnostics

    return fedjax.FederatedAlgorithm(init, apply)


def _no_state() -> tuple[()]:
    return ()


def _participants(operation: str, clients: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
    """Yields the clients' triples; says clearly what is wrong when there are none."""
    nobody = True
    for client in clients:
        try:
            client_id, params, weight = client
        except (TypeError, ValueError):
            raise ValueError(
                f"{operation}: clients_params_and_weights holds a {type(client).__name__}; it "
                "needs triples (client_id, params, weight)"
            ) from None
        nobody = False
        yield client_id, params, weight
    if nobody:
        raise ValueError(
            f"{operation}: clients_params_and_weights is empty; it needs at least one (client_id, "
            "params, weight): without a client there is no tree whose average could be NaN"
        )


def _scalar_weight(operation: str, client_id: Any, weight: Any) -> Any:
    """Gives a weight that never makes the jitted step compile for a new Python type."""
    if np.shape(weight) != ():
        raise ValueError(f"{operation}: weight of client {client_id!r} has shape {np.shape(weight)}; it needs a scalar")
    if isinstance(weight, jax.Array):  # may still be in flight on a device, or traced: no waiting
        return weight
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise TypeError(
            f"{operation}: weight of client {client_id!r} is a {type(weight).__name__}; it needs a real number"
        ) from None


def _counted(params: Any) -> dict[str, Any]:
    """The update plus a one: summing both by weight sums the weights along with the updates."""
    return {"params": params, "weight": jnp.ones(())}


def _as_one_client(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


@jax.jit
def _first_total(params: Any, weight: Any) -> Any:
    return weighted_sum(_as_one_client(_counted(params)), jnp.asarray(weight)[None])


@partial(jax.jit, donate_argnums=0)
def _next_total(total: Any, params: Any, weight: Any) -> Any:
    return accumulate_weighted(total, _counted(params), weight)


@partial(jax.jit, static_argnames="dtypes")
def _finish_mean(total: Any, dtypes: tuple[Any, ...]) -> Any:
    # The inverse of a zero weight is infinite, and infinity times a total of zero is NaN.
    mean = weighted_sum(_as_one_client(total["params"]), (1 / total["weight"])[None])
    leaves, structure = jax.tree.flatten(mean)
    cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return jax.tree.unflatten(structure, cast)


def _stacking_aggregator(operation: str, rule: Callable[[Any], Any]) -> fedjax.aggregators.Aggregator:
    """An aggregator that stacks the updates of all clients and reduces them by `rule`."""

    def apply(clients_params_and_weights: Iterable[ClientUpdate], state: Any) -> tuple[Any, Any]:
        participants = _participants(operation, clients_params_and_weights)
        updates = [params for _, params, _ in participants]
        try:
            return rule(stack_clients(updates)), state
        except (TypeError, ValueError) as error:
            error.add_note(f"{operation}: updates[i] are the params of the i-th client that came")
            raise

    return fedjax.aggregators.Aggregator(_no_state, apply)


def _with_dtypes_of(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


@jax.jit
def _median(stacked: Any) -> Any:
    return _with_dtypes_of(coordinate_median(stacked), stacked)


@partial(jax.jit, static_argnames=("trim_count", "trim_fraction"))
def _trimmed_mean(stacked: Any, *, trim_count: int | None, trim_fraction: float) -> Any:
    result = trimmed_mean(stacked, trim_count, trim_fraction=trim_fraction)
    return _with_dtypes_of(result, stacked)
