"""The weighted mean, which takes one client at a time."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import fedjax
import jax
import jax.numpy as jnp

from fedfuse_jax import accumulate_weighted, weighted_sum
from fedfuse_jax.fedjax._clients import ClientUpdate, no_state, participants, scalar_weight


def mean_aggregator() -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of the clients' updates, one client at a time.

    .. math:: y = \sum_i w_i x_i \Big/ \sum_i w_i

    The clients may come from a generator: each is added to a float32 running total (float64 for
    float64 leaves) whose buffer is donated, so memory does not grow with the number of clients.

    Differs from `fedjax.aggregators.mean_aggregator` where that one is wrong: the sum is float32
    whatever the dtype of the leaves, and weights that sum to zero give no silent model of zeros:
    the mean is the weighted sum divided by zero, NaN where that sum is zero (everywhere, if all
    weights are) and infinite elsewhere, as for weights of both signs. NaN in any update of any
    weight, zero included, reaches the result.

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
        for client_id, params, weight in participants("mean_aggregator", clients_params_and_weights):
            weight = scalar_weight("mean_aggregator", client_id, weight)
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

    return fedjax.aggregators.Aggregator(no_state, apply)


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
