"""Aggregators that stack the updates of all clients, prepare them where asked to, and reduce them by a rule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import fedjax
import jax

from fedfuse_jax import stack_clients
from fedfuse_jax.fedjax._clients import ClientUpdate, no_state, participants


@dataclass(frozen=True)
class PreAggregator:
    """What is done to the clients' stacked updates before a rule reduces them.

    Those of this module are `bucketing_pre_aggregator` and `nearest_neighbor_mixing_pre_aggregator`; one of your own
    takes these two functions.

    Attributes:
        init: `() -> state`, the state before the first round; `()` where there is none.
        apply: `(updates, where, state) -> (updates, where, state)`, compiled along with the rule: client-stacked
            updates, who takes part in what follows (bool, one per client; `None`: everybody), the next state.
    """

    init: Callable[[], Any]
    apply: Callable[[Any, Any, Any], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Bound:
    """A function and its keyword arguments; equal ones compare equal, which partials do not, and compile once."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options, **dict(self.options))


def bound(function: Callable[..., Any], **options: Any) -> Bound:
    """Binds keyword arguments to a function."""
    return Bound(function, tuple(options.items()))


def stacking_aggregator(
    operation: str, rule: Bound, pre_aggregators: Iterable[PreAggregator]
) -> fedjax.aggregators.Aggregator:
    """An aggregator that reduces the stacked updates by `rule(updates, where=where)`."""
    stages = _stages(operation, pre_aggregators)
    if stages:
        return _stateful(operation, bound(_without_state, rule=rule), stages, no_state)

    def apply(clients_params_and_weights: Iterable[ClientUpdate], state: Any) -> tuple[Any, Any]:
        result, _ = _aggregate(operation, clients_params_and_weights, ((),), (), bound(_without_state, rule=rule))
        return result, state

    return fedjax.aggregators.Aggregator(no_state, apply)


def stateful_stacking_aggregator(
    operation: str, rule: Bound, pre_aggregators: Iterable[PreAggregator], init: Callable[[], Any]
) -> fedjax.aggregators.Aggregator:
    """An aggregator whose `rule(updates, where, state)` gives the result and the next state."""
    return _stateful(operation, rule, _stages(operation, pre_aggregators), init)


def _stages(operation: str, pre_aggregators: Iterable[PreAggregator]) -> tuple[PreAggregator, ...]:
    stages = tuple(pre_aggregators)
    for stage in stages:
        if not isinstance(stage, PreAggregator):
            raise TypeError(
                f"{operation}: pre_aggregators holds a {type(stage).__name__}; it needs PreAggregators such as "
                "nearest_neighbor_mixing_pre_aggregator(num_byzantine)"
            )
    return stages


def _stateful(
    operation: str, rule: Bound, stages: tuple[PreAggregator, ...], init: Callable[[], Any]
) -> fedjax.aggregators.Aggregator:
    """The state is that of each stage, then the rule's."""

    def init_all() -> tuple[Any, ...]:
        return (*(stage.init() for stage in stages), init())

    def apply(clients_params_and_weights: Iterable[ClientUpdate], state: Any) -> tuple[Any, Any]:
        steps = tuple(stage.apply for stage in stages)
        return _aggregate(operation, clients_params_and_weights, state, steps, rule)

    return fedjax.aggregators.Aggregator(init_all, apply)


def _aggregate(operation: str, clients: Iterable[ClientUpdate], states: Any, steps: Any, rule: Bound) -> Any:
    updates = [params for _, params, _ in participants(operation, clients)]
    try:
        return _prepare_and_reduce(stack_clients(updates), states, steps=steps, rule=rule)
    except (TypeError, ValueError) as error:
        error.add_note(f"{operation}: updates[i] are the params of the i-th client that came")
        raise


@partial(jax.jit, static_argnames=("steps", "rule"))
def _prepare_and_reduce(updates: Any, states: Any, *, steps: Any, rule: Bound) -> tuple[Any, Any]:
    *before, state = states
    where, after = None, []
    prepared = updates
    for step, step_state in zip(steps, before, strict=True):
        prepared, where, step_state = step(prepared, where, step_state)
        after.append(step_state)
    result, state = rule(prepared, where, state)
    return _with_dtypes_of(result, updates), (*after, state)


def _without_state(updates: Any, where: Any, state: Any, *, rule: Bound) -> tuple[Any, Any]:
    return rule(updates, where=where), state


def _with_dtypes_of(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)
