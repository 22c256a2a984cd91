"""What is measured: one table, one entry an operation. The goals are those of the project's ``performance.md``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import fedfuse_jax as ff
from benchmarks import forms, systems, trees
from fedfuse_jax.compat import byzfl, flower

OURS = "fedfuse"
FLOOR = "floor"
PEERS = ("jnp natural", "jnp best", "numpy", "torch")

TRIM_FRACTION = 0.2


@dataclass(frozen=True)
class Problem:
    """The size of one measurement; with a ``tree`` of `trees`, its time is compared with one array's."""

    clients: int
    parameters: int
    dtype: str = "float32"
    tree: str = ""

    @property
    def large(self) -> bool:
        """Whether the goals on a CPU speak of it: as float32 it fits no cache."""
        return self.clients * self.parameters >= 10**7

    @property
    def label(self) -> str:
        """Like ``32 x 1e6 float16``."""
        size, tree = str(self.parameters), f" in {self.tree}" if self.tree else ""
        if self.parameters >= 1000 and not size[1:].strip("0"):
            size = f"{size[0]}e{len(size) - 1}"
        elif self.parameters >= 1000 and self.parameters.bit_count() == 1:
            size = f"2^{self.parameters.bit_length() - 1}"
        return f"{self.clients} x {size} {self.dtype}{tree}"


class Goal(NamedTuple):
    """A ratio to reach: time of a contender over ours, or our fraction of the floor."""

    least: float
    stretch: float | None = None


Goals = Mapping[str, Goal]


def goals(
    natural: float | None = None,
    best: float | tuple[float, float] | None = None,
    numpy: float | None = None,
    torch: float | tuple[float, float] | None = None,
    floor: float | tuple[float, float] | None = None,
    **references: float,
) -> Goals:
    """Goals by contender; a pair is the least and the stretch."""
    named = {"jnp natural": natural, "jnp best": best, "numpy": numpy, "torch": torch, FLOOR: floor}
    named |= {name.replace("_", " "): least for name, least in references.items()}
    return {
        name: Goal(*goal) if isinstance(goal, tuple) else Goal(goal) for name, goal in named.items() if goal is not None
    }


class Reference(NamedTuple):
    """Something of our own to compare our time with: from a row's arguments, a call and its arguments."""

    prepare: Callable[[tuple[Any, ...]], tuple[Callable[..., Any], tuple[Any, ...]]]
    same_result: bool = True


TINY = Problem(4, 64)  # too small to cost anything but the call
CPU_PROBLEMS = (Problem(10, 10**6), Problem(32, 10**6), Problem(128, 10**6), Problem(1000, 10**5))
MORE_PROBLEMS = (Problem(32, 10**5), Problem(32, 2**20), Problem(100, 10**6))
HALF_PROBLEMS = (Problem(32, 10**6, "bfloat16"), Problem(32, 10**6, "float16"))
TREE_PROBLEM = Problem(32, 10**6, tree="100 leaves")
LONG_PROBLEM = Problem(10, 10**7)
NETWORK_PROBLEMS = tuple(Problem(10, trees.num_parameters(tree), tree=tree) for tree in trees.NETWORKS)
PROBLEMS = (*CPU_PROBLEMS, *HALF_PROBLEMS, TREE_PROBLEM, *NETWORK_PROBLEMS)
GPU_PROBLEMS = (Problem(32, 10**5), Problem(32, 10**6), Problem(128, 10**6), Problem(1024, 10**6), *HALF_PROBLEMS)
QUICK_PROBLEMS = (Problem(10, 10**5), Problem(32, 10**5))


@dataclass(frozen=True)
class Row:
    """One operation, or one variant of it, and everything it is measured against.

    ``arguments`` makes the inputs, inside a jitted computation. All calls take exactly those: jax arrays for ours
    and the two ``jnp`` forms (which are jitted here), NumPy arrays and tensors for the others; of other systems
    ByzFL takes tensors where PyTorch is installed, Flower NumPy arrays.

    ``donated``: the positions of the arguments that a call may write its results over, in their order. The next call
    takes those results in their place, as the next round of a server does. Everybody has copies of their own.

    ``multiply_adds``: how many no code does without, of a row that may have more arithmetic to do than bytes to move.

    ``left_out``: contenders that are not measured for a problem on a CPU, each with the reason.
    """

    operation: str
    arguments: Callable[[Problem, Array], tuple[Any, ...]]
    call: Callable[..., Any]
    natural: Callable[..., Any] | None = None
    best: Callable[..., Any] | None = None
    numpy: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    systems: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    variant: str = ""
    multiply_adds: Callable[[Problem], int] | None = None
    donated: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = PROBLEMS
    gpu_problems: tuple[Problem, ...] = GPU_PROBLEMS
    left_out: Callable[[Problem], Mapping[str, str]] = lambda problem: {}
    goals: Callable[[Problem], Goals] = lambda problem: {}
    gpu_goals: Callable[[Problem], Goals] = lambda problem: goals(natural=1, best=1, torch=1)

    @property
    def name(self) -> str:
        """The operation, and after a slash its variant."""
        return f"{self.operation}/{self.variant}" if self.variant else self.operation


# --- Arguments ------------------------------------------------------------------------------------------------


def client_updates(problem: Problem, key: Array) -> Array:
    """Normal updates, no two clients of one float32 coordinate alike: a derivative at ties has several answers."""
    shape = problem.clients, problem.parameters
    steps = max(2**20 // problem.clients, 1)
    whole = jnp.round(jax.random.normal(key, shape) * steps) * problem.clients
    client = jnp.arange(problem.clients, dtype=jnp.float32)[:, None]
    return ((whole + client) / 2**20).astype(problem.dtype)


def _updates_only(problem: Problem, key: Array) -> tuple[Any, ...]:
    return (client_updates(problem, key),)


def _updates_and_weights(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    return client_updates(problem, first), jax.random.uniform(second, (problem.clients,), minval=0.5, maxval=2)


def _updates_and_cotangent(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    return client_updates(problem, first), jax.random.normal(second, (problem.parameters,))


def _updates_weights_and_cotangent(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    return *_updates_and_weights(problem, first), jax.random.normal(second, (problem.parameters,))


def _updates_and_trim(problem: Problem, key: Array) -> tuple[Any, ...]:
    return client_updates(problem, key), jnp.int32(int(TRIM_FRACTION * problem.clients))


def _updates_and_everybody(problem: Problem, key: Array) -> tuple[Any, ...]:
    return client_updates(problem, key), jnp.ones(problem.clients, bool)


def _running_sum(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    total = jax.random.normal(first, (problem.parameters,))
    return total, jax.random.normal(second, (problem.parameters,)).astype(problem.dtype), jnp.float32(0.75)


def _list_of_clients(problem: Problem, key: Array) -> tuple[Any, ...]:
    return (list(client_updates(problem, key)),)


CLIP_NORM = 500.0  # half of the norm that a million normal numbers have


def _updates_weights_and_key(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    return *_updates_and_weights(problem, first), jax.random.key_data(second)


def _server_round(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    params = jax.random.normal(first, (problem.parameters,))
    return params, jnp.zeros(problem.parameters), jnp.full(problem.parameters, 1e-6), client_updates(problem, second)


def _fused(update: Callable[..., Any]) -> Callable[..., Any]:
    """One step from parameters and both moments to the next."""

    def step(params: Any, first: Any, second: Any, updates: Any) -> Any:
        params, state = update(params, ff.ServerState(jnp.int32(0), first, second), updates, learning_rate=0.1)
        return params, state.first_moment, state.second_moment

    return step


def _natural_adam(params: Array, first: Array, second: Array, updates: Array) -> tuple[Array, ...]:
    return forms.adam_step(params, first, second, jnp.mean(updates, axis=0))


def _best_adam(params: Array, first: Array, second: Array, updates: Array) -> tuple[Array, ...]:
    delta = _best_sum(updates, jnp.full(len(updates), 1 / len(updates)))
    return forms.adam_step(params, first, second, delta)


def _best_momentum(params: Array, first: Array, second: Array, updates: Array) -> tuple[Array, ...]:
    first = 0.9 * first + _best_sum(updates, jnp.full(len(updates), 1 / len(updates)))
    return params + 0.1 * first, first, second


def entries_kept(parameters: int) -> int:
    """One coordinate in a hundred."""
    return max(parameters // 100, 1)


def _sparse_updates(problem: Problem, key: Array) -> tuple[Array, Array]:
    """At distinct indices in ascending order."""
    k = entries_kept(problem.parameters)
    first, second = jax.random.split(key)
    width = problem.parameters // k
    offsets = jax.random.randint(first, (problem.clients, k), 0, width)
    values = jax.random.normal(second, (problem.clients, k)).astype(problem.dtype)
    return values, jnp.arange(k) * width + offsets


def _sparse_arguments(problem: Problem, key: Array) -> tuple[Any, ...]:
    """And an empty array that is as long as there are coordinates: a size no contender need trace."""
    first, second = jax.random.split(key)
    weights = jax.random.uniform(second, (problem.clients,), minval=0.5, maxval=2)
    return *_sparse_updates(problem, first), weights, jnp.zeros((problem.parameters, 0))


def _shuffled_arguments(problem: Problem, key: Array) -> tuple[Any, ...]:
    first, second = jax.random.split(key)
    values, indices, *rest = _sparse_arguments(problem, first)
    order = jax.random.permutation(second, values.shape[1])
    return values[:, order], indices[:, order], *rest


def _quantized_arguments(problem: Problem, key: Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    codes = jax.random.bits(keys[0], (problem.clients, problem.parameters), np.uint8)
    scales, weights = (jax.random.uniform(k, (problem.clients,), minval=0.5, maxval=2) for k in keys[1:3])
    return codes, scales, jax.random.uniform(keys[3], (problem.clients,), minval=100, maxval=150), weights


def _packed_arguments(problem: Problem, key: Array) -> tuple[Any, ...]:
    codes, *rest = _quantized_arguments(problem, key)
    return codes[:, : (problem.parameters + 1) // 2], *rest


def _one_update(problem: Problem, key: Array) -> tuple[Any, ...]:
    return (jax.random.normal(key, (problem.parameters,)).astype(problem.dtype),)


def _one_update_and_key(problem: Problem, key: Array) -> tuple[Any, ...]:
    return *_one_update(problem, key), jax.random.key_data(key)


# --- Our own calls to compare with ----------------------------------------------------------------------------


def _forward(operation: Callable[..., Any]) -> Mapping[str, Reference]:
    """The operation itself, beside its derivative: another result, but the time the derivative is allowed."""
    return {"forward": Reference(lambda arguments: (operation, arguments[:-1]), same_result=False)}


def _float32(operation: Callable[..., Any]) -> Mapping[str, Reference]:
    return {"own float32": Reference(lambda arguments: (operation, (arguments[0].astype(jnp.float32),)))}


def _static(operation: Callable[..., Any]) -> Mapping[str, Reference]:
    return {"static": Reference(lambda arguments: (operation, arguments[:1]))}


def _trimmed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the trim count that the default fraction gives for its updates."""
    return lambda updates, *rest: function(updates, *rest, trim=int(TRIM_FRACTION * len(updates)))


def _halved(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the trim count that leaves the middle."""
    return lambda updates, *rest: function(updates, *rest, trim=(len(updates) - 1) // 2)


# --- Goals ----------------------------------------------------------------------------------------------------

_MEDIAN_GOALS = {
    Problem(10, 10**6): goals(natural=400, best=1.8, numpy=45, torch=100, floor=0.85),
    Problem(32, 10**6): goals(natural=400, best=2.5, numpy=18, torch=70, floor=0.75),
    Problem(128, 10**6): goals(natural=300, best=3, numpy=9, torch=35, floor=(0.5, 0.65)),
    Problem(1000, 10**5): goals(natural=250, best=3, numpy=18, torch=20, floor=(0.4, 0.7)),
}
_TRIMMED_MEAN_GOALS = {
    Problem(10, 10**6): goals(natural=300, best=1.6, numpy=35, torch=70, floor=0.75),
    Problem(32, 10**6): goals(natural=300, best=2.2, numpy=14, torch=80, floor=0.65),
    Problem(128, 10**6): goals(natural=250, best=2.5, numpy=7, torch=60, floor=0.45),
    Problem(1000, 10**5): goals(natural=150, best=2.5, numpy=14, torch=40, floor=0.3),
}


_DISTANCE_GOALS = {
    Problem(32, 10**6): goals(best=5, numpy=2.5, torch=2),
    Problem(128, 10**5): goals(best=2.2, numpy=1.4, torch=2),
    Problem(1000, 10**4): goals(best=1.5, numpy=1, torch=2),
}


def _one_array_goal(problem: Problem) -> Goals:
    """At most a tenth more time than one array."""
    return goals(one_array=1 / 1.1) if problem.tree and problem.large else {}


def _order_statistic_goals(by_problem: Mapping[Problem, Goals]) -> Callable[[Problem], Goals]:
    def of_problem(problem: Problem) -> Goals:
        if problem.tree or not problem.large:
            return _one_array_goal(problem)
        if problem.dtype in ("bfloat16", "float16"):
            return goals(own_float32=1 / 0.6)
        return by_problem.get(problem, {})

    return of_problem


def _linear_goals(natural: float | None = None) -> Callable[[Problem], Goals]:
    def of_problem(problem: Problem) -> Goals:
        if problem.tree or not problem.large or problem.parameters < 10**6:
            return _one_array_goal(problem)
        if problem.dtype in ("bfloat16", "float16"):
            return goals(best=(8, 12), torch=5, floor=0.8)
        best = (1.0, 1.2) if problem.clients <= 32 else 1.0  # XLA's product runs at the memory's rate, too
        return goals(natural=natural, best=best, numpy=0.95, torch=1.2, floor=(0.8, 0.9))

    return of_problem


def _backward_goals(problem: Problem) -> Goals:
    return goals(forward=1 / 3) if problem.large else {}


def _traced_goals(problem: Problem) -> Goals:
    return goals(static=1 / 2) if problem.large else {}


def _gpu_order_statistic_goals(published_ratio: float) -> Callable[[Problem], Goals]:
    """At least twice the ratio to PyTorch that was first published, at the size it was published for."""

    def of_problem(problem: Problem) -> Goals:
        torch = 2 * published_ratio if (problem.clients, problem.parameters) == (32, 10**5) else 1
        if problem.dtype == "float32":
            bounds = ((64, 0.8), (128, 0.6), (1024, 0.5))
            floor = next((fraction for most, fraction in bounds if problem.clients <= most), None)
        else:
            floor = 0.65
        return goals(natural=1, best=1, torch=torch, floor=floor if problem.parameters >= 10**6 else None)

    return of_problem


def _gpu_linear_goals(problem: Problem) -> Goals:
    published = problem == Problem(32, 10**6, "float16")
    return goals(natural=1, best=1, torch=2 * 5.9 if published else 1)


def _clip_goals(problem: Problem) -> Goals:
    if problem.tree or not problem.large:
        return _one_array_goal(problem)
    return goals(natural=300, best=1.3, floor=0.6) if problem.dtype == "float32" else goals(best=1.3)


def _noise_goals(problem: Problem) -> Goals:
    return goals(best=(2, 3), weighted_sum=1 / 1.15) if problem == Problem(32, 10**6) else {}


def _server_goals(problem: Problem) -> Goals:
    return goals(best=1.6, torch=2, floor=0.85) if problem.large else {}


def _sparse_goals(problem: Problem) -> Goals:
    if problem.parameters >= 10**7:
        return goals(best=10, numpy=10, torch=15)
    return goals(best=(2, 3), numpy=5, torch=8) if problem.large else {}


def _quantized_goals(problem: Problem) -> Goals:
    return goals(best=(20, 60), torch=15, floor=0.75) if problem.large else {}


def _gpu_sparse_goals(problem: Problem) -> Goals:
    published = problem == Problem(128, 10**6)
    return goals(natural=1, best=1, torch=2 * 1.5 if published else 1)


# --- Who is left out ------------------------------------------------------------------------------------------


def _natural_takes(time: str, when: Callable[[Problem], bool]) -> Callable[[Problem], Mapping[str, str]]:
    """The natural form is left out ``when`` it takes longer than anybody wants to wait; no goal speaks of it there."""
    return lambda problem: {"jnp natural": f"too slow, about {time}"} if problem.large and when(problem) else {}


# --- The table ------------------------------------------------------------------------------------------------

_BACKWARD_PROBLEMS = (Problem(10, 10**6), Problem(32, 10**6))
_ONE_VECTOR = (Problem(1, 10**7), Problem(1, 10**7, "bfloat16"), Problem(1, 10**7, tree="100 leaves"))
_PRIVATE_PROBLEMS = (Problem(10, 10**6), Problem(32, 10**6), Problem(32, 10**6, "bfloat16"))
_SERVER_PROBLEMS = (Problem(4, 10**7),)
_STATE = (0, 1, 2)  # of a server's round: the parameters and both moments
_SPARSE = (Problem(32, 10**6), Problem(128, 10**6), Problem(32, 10**7), Problem(128, 10**7))
_CODES = (Problem(10, 10**6), Problem(32, 10**6), Problem(128, 10**6))
_LISTS = (Problem(10, 10**6), Problem(32, 10**6), Problem(32, 10**6, "bfloat16"), TREE_PROBLEM)


_ROBUST_PROBLEMS = (Problem(10, 10**6), Problem(32, 10**6), Problem(128, 10**5))
_SYSTEM_PROBLEMS = (Problem(10, 10**6), Problem(32, 10**5))


def _num_byzantine(updates: Array) -> int:
    """A fifth, as the trimmed mean drops at either end."""
    return int(TRIM_FRACTION * len(updates))


def _none(updates: Any) -> dict[str, Any]:
    return {}


def _some_byzantine(updates: Any) -> dict[str, Any]:
    return {"f": _num_byzantine(updates)}


def _num_honest(updates: Any) -> int:
    return len(updates) - _num_byzantine(updates)


def _few_byzantine(updates: Any) -> int:
    """As many as Bulyan bears: it needs 4 f + 3 clients."""
    return (len(updates) - 3) // 4


def _as_in(
    system: str,
    operation: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    problems: tuple[Problem, ...] = _SYSTEM_PROBLEMS,
) -> Row:
    """A rule as another system has it, by our module of its conventions, against that system."""
    return Row(
        operation,
        _updates_only,
        ours,
        systems={system: theirs},
        variant=f"as in {system}",
        problems=problems,
        gpu_problems=(),
    )


def _as_in_byzfl(
    operation: str,
    name: str,
    options: Callable[[Any], Mapping[str, Any]] = _none,
    problems: tuple[Problem, ...] = _SYSTEM_PROBLEMS,
) -> Row:
    def ours(updates: Any) -> Any:
        return getattr(byzfl, name)(**options(updates))(updates)

    return _as_in("byzfl", operation, ours, systems.byzfl_rule(name, options), problems)


def _natural_sum(updates: Array, weights: Array) -> Array:
    return jnp.sum(weights[:, None] * updates, axis=0)


def _best_sum(updates: Array, weights: Array) -> Array:
    return weights @ updates.astype(jnp.float32)


def _weighted_sum_alone() -> Mapping[str, Reference]:
    return {"weighted sum": Reference(lambda arguments: (ff.weighted_sum, arguments[:2]), same_result=False)}


def _noise(updates: Array, key: Array) -> Array:
    return jax.random.normal(key, updates.shape[1:])


def _natural_median(updates: Array) -> Array:
    return jnp.median(updates, axis=0)


def _natural_trimmed_mean(updates: Array, trim: int) -> Array:
    return jnp.mean(jnp.sort(updates, axis=0)[trim : len(updates) - trim], axis=0)


ROWS: tuple[Row, ...] = (
    Row(
        "weighted_sum",
        _updates_and_weights,
        ff.weighted_sum,
        natural=_natural_sum,
        best=_best_sum,
        numpy=lambda updates, weights: weights @ forms.wide(updates),
        torch=lambda updates, weights: weights @ updates.float(),
        problems=(*PROBLEMS, *MORE_PROBLEMS, LONG_PROBLEM),
        goals=_linear_goals(),
        gpu_goals=_gpu_linear_goals,
    ),
    Row(
        "weighted_sum",
        _updates_weights_and_cotangent,
        forms.backward(ff.weighted_sum, 2),
        variant="backward",
        natural=forms.backward(_natural_sum, 2),
        best=forms.backward(_best_sum, 2),
        numpy=lambda updates, weights, cotangent: (np.multiply.outer(weights, cotangent), updates @ cotangent),
        torch=forms.torch_backward(lambda updates, weights: weights @ updates, 2),
        references=_forward(ff.weighted_sum),
        problems=_BACKWARD_PROBLEMS,
        gpu_problems=_BACKWARD_PROBLEMS,
        goals=_backward_goals,
    ),
    Row(
        "weighted_mean",
        _updates_only,
        ff.weighted_mean,
        natural=lambda updates: jnp.mean(updates, axis=0),
        best=lambda updates: _best_sum(updates, jnp.ones(len(updates))) / len(updates),
        numpy=lambda updates: np.ones(len(updates), np.float32) @ forms.wide(updates) / len(updates),
        torch=lambda updates: updates.float().mean(dim=0),
        goals=_linear_goals(natural=40),
    ),
    Row(
        "coordinate_median",
        _updates_only,
        ff.coordinate_median,
        natural=_natural_median,
        best=forms.best_median,
        numpy=forms.numpy_median,
        torch=forms.torch_median,
        references=_float32(ff.coordinate_median),
        problems=(*PROBLEMS, *MORE_PROBLEMS, LONG_PROBLEM),
        left_out=_natural_takes("10 s a call", lambda problem: problem.clients == 100),
        goals=_order_statistic_goals(_MEDIAN_GOALS),
        gpu_goals=_gpu_order_statistic_goals(3.8),
    ),
    Row(
        "coordinate_median",
        _updates_and_everybody,
        lambda updates, where: ff.coordinate_median(updates, where=where),
        variant="where",
        references=_static(ff.coordinate_median),
        problems=CPU_PROBLEMS,
        goals=_traced_goals,
        gpu_goals=_traced_goals,
    ),
    Row(
        "coordinate_median",
        _updates_and_cotangent,
        forms.backward(ff.coordinate_median),
        variant="backward",
        natural=forms.backward(_natural_median),
        best=_halved(forms.best_spread),
        numpy=_halved(forms.numpy_spread),
        torch=forms.torch_backward(forms.torch_median),
        references=_forward(ff.coordinate_median),
        problems=_BACKWARD_PROBLEMS,
        gpu_problems=_BACKWARD_PROBLEMS,
        goals=_backward_goals,
    ),
    Row(
        "trimmed_mean",
        _updates_only,
        functools.partial(ff.trimmed_mean, trim_fraction=TRIM_FRACTION),
        natural=_trimmed(_natural_trimmed_mean),
        best=_trimmed(forms.best_trimmed_mean),
        numpy=_trimmed(forms.numpy_trimmed_mean),
        torch=_trimmed(forms.torch_trimmed_mean),
        references=_float32(ff.trimmed_mean),
        problems=(*PROBLEMS, *MORE_PROBLEMS),
        left_out=_natural_takes("10 s a call", lambda problem: problem.clients == 100),
        goals=_order_statistic_goals(_TRIMMED_MEAN_GOALS),
        gpu_goals=_gpu_order_statistic_goals(4.4),
    ),
    Row(
        "trimmed_mean",
        _updates_and_trim,
        ff.trimmed_mean,
        variant="traced",
        references=_static(functools.partial(ff.trimmed_mean, trim_fraction=TRIM_FRACTION)),
        problems=CPU_PROBLEMS,
        goals=_traced_goals,
        gpu_goals=_traced_goals,
    ),
    Row(
        "trimmed_mean",
        _updates_and_cotangent,
        forms.backward(ff.trimmed_mean),
        variant="backward",
        natural=forms.backward(_trimmed(_natural_trimmed_mean)),
        best=_trimmed(forms.best_spread),
        numpy=_trimmed(forms.numpy_spread),
        torch=forms.torch_backward(_trimmed(forms.torch_trimmed_mean)),
        references=_forward(ff.trimmed_mean),
        problems=_BACKWARD_PROBLEMS,
        gpu_problems=_BACKWARD_PROBLEMS,
        goals=_backward_goals,
    ),
    Row(
        "mean_around_median",
        _updates_only,
        lambda updates: ff.mean_around_median(updates, _num_byzantine(updates)),
        natural=lambda updates: forms.natural_mean_around_median(updates, _num_byzantine(updates)),
        best=lambda updates: forms.best_mean_around_median(updates, _num_byzantine(updates)),
        numpy=lambda updates: forms.numpy_mean_around_median(updates, _num_byzantine(updates)),
        torch=lambda updates: forms.torch_mean_around_median(updates, _num_byzantine(updates)),
        problems=_ROBUST_PROBLEMS,
        gpu_problems=_ROBUST_PROBLEMS,
        goals=_one_array_goal,
    ),
    Row(
        "pairwise_squared_distances",
        _updates_only,
        ff.pairwise_squared_distances,
        natural=forms.natural_distances,
        best=forms.best_distances,
        numpy=forms.numpy_distances,
        torch=forms.torch_distances,
        multiply_adds=lambda problem: math.comb(problem.clients, 2) * problem.parameters,
        problems=tuple(_DISTANCE_GOALS),
        gpu_problems=tuple(_DISTANCE_GOALS),
        goals=lambda problem: _DISTANCE_GOALS.get(problem, {}),
    ),
    Row(
        "multi_krum",
        _updates_only,
        lambda updates: ff.multi_krum(updates, _num_byzantine(updates)),
        natural=forms.multi_krum_by(forms.natural_distances, _num_byzantine),
        best=forms.multi_krum_by(forms.best_distances, _num_byzantine),
        problems=_ROBUST_PROBLEMS,
        gpu_problems=_ROBUST_PROBLEMS,
    ),
    Row(
        "geometric_median",
        _updates_only,
        ff.geometric_median,
        natural=forms.natural_geometric_median,
        problems=_ROBUST_PROBLEMS,
        gpu_problems=_ROBUST_PROBLEMS,
    ),
    Row(
        "squared_norms",
        _updates_only,
        ff.squared_norms,
        natural=lambda updates: jnp.sum(jnp.square(updates.astype(jnp.float32)), axis=1),
        best=lambda updates: jnp.einsum("nd,nd->n", updates, updates, preferred_element_type=jnp.float32),
        numpy=lambda updates: np.einsum("nd,nd->n", forms.wide(updates), forms.wide(updates)),
        torch=lambda updates: updates.float().square().sum(dim=1),
        goals=_one_array_goal,
    ),
    Row(
        "finite_clients",
        _updates_only,
        ff.finite_clients,
        natural=lambda updates: jnp.all(jnp.isfinite(updates), axis=1),
        best=lambda updates: jnp.isfinite(jnp.max(jnp.abs(updates), axis=1)),
        numpy=lambda updates: np.isfinite(forms.wide(updates)).all(axis=1),
        torch=lambda updates: updates.isfinite().all(dim=1),
        goals=_one_array_goal,
    ),
    Row(
        "accumulate_weighted",
        _running_sum,
        ff.accumulate_weighted,
        natural=lambda total, update, weight: total + weight * update,
        best=lambda total, update, weight: total + weight * update.astype(jnp.float32),
        numpy=lambda total, update, weight: total + weight * forms.wide(update),
        torch=lambda total, update, weight: total + weight * update,
        problems=_ONE_VECTOR,
        gpu_problems=_ONE_VECTOR[:2],
        goals=_one_array_goal,
    ),
    Row(
        "stack_clients",
        _list_of_clients,
        ff.stack_clients,
        natural=jnp.stack,
        best=lambda clients: jnp.concatenate(clients).reshape(len(clients), -1),
        numpy=np.stack,
        torch=forms.torch_stack,
        problems=_LISTS,
        gpu_problems=_LISTS[:3],
        goals=_one_array_goal,
    ),
    Row(
        "clipped_weighted_sum",
        _updates_and_weights,
        lambda updates, weights: ff.clipped_weighted_sum(updates, weights, CLIP_NORM),
        natural=lambda updates, weights: forms.natural_clipped_sum(updates, weights, CLIP_NORM),
        best=lambda updates, weights: forms.best_clipped_sum(updates, weights, CLIP_NORM),
        numpy=lambda updates, weights: forms.numpy_clipped_sum(updates, weights, CLIP_NORM),
        torch=lambda updates, weights: forms.torch_clipped_sum(updates, weights, CLIP_NORM),
        problems=(*_PRIVATE_PROBLEMS, TREE_PROBLEM, *NETWORK_PROBLEMS),
        gpu_problems=_PRIVATE_PROBLEMS,
        goals=_clip_goals,
        left_out=_natural_takes(
            "18 s a call with 32 clients", lambda problem: problem.clients > 10 and problem.dtype != "float32"
        ),
    ),
    Row(
        "noisy_weighted_sum",
        _updates_weights_and_key,
        lambda updates, weights, key: ff.noisy_weighted_sum(key, updates, weights, 0.5),
        natural=lambda updates, weights, key: _natural_sum(updates, weights) + 0.5 * _noise(updates, key),
        best=lambda updates, weights, key: _best_sum(updates, weights) + 0.5 * _noise(updates, key),
        references=_weighted_sum_alone(),
        problems=_PRIVATE_PROBLEMS,
        gpu_problems=_PRIVATE_PROBLEMS,
        goals=_noise_goals,
        left_out=_natural_takes(
            "17 s a call with 32 clients", lambda problem: problem.clients > 10 and problem.dtype != "float32"
        ),
    ),
    Row(
        "clipped_noisy_weighted_sum",
        _updates_weights_and_key,
        lambda updates, weights, key: ff.clipped_noisy_weighted_sum(key, updates, weights, CLIP_NORM, 0.5),
        natural=lambda updates, weights, key: (
            forms.natural_clipped_sum(updates, weights, CLIP_NORM) + 0.5 * _noise(updates, key)
        ),
        best=lambda updates, weights, key: (
            forms.best_clipped_sum(updates, weights, CLIP_NORM) + 0.5 * _noise(updates, key)
        ),
        problems=_PRIVATE_PROBLEMS,
        gpu_problems=_PRIVATE_PROBLEMS,
        goals=lambda problem: goals(best=1.3) if problem.large else {},
        left_out=_natural_takes("18 s a call with 32 clients", lambda problem: problem.clients > 10),
    ),
    Row(
        "fedavgm_weighted_update",
        _server_round,
        _fused(ff.fedavgm_weighted_update),
        best=_best_momentum,
        donated=_STATE,
        problems=_SERVER_PROBLEMS,
        gpu_problems=_SERVER_PROBLEMS,
    ),
    Row(
        "fedadagrad_weighted_update",
        _server_round,
        _fused(ff.fedadagrad_weighted_update),
        donated=_STATE,
        problems=_SERVER_PROBLEMS,
        gpu_problems=_SERVER_PROBLEMS,
    ),
    Row(
        "fedadam_weighted_update",
        _server_round,
        _fused(ff.fedadam_weighted_update),
        natural=_natural_adam,
        best=_best_adam,
        numpy=forms.numpy_adam,
        torch=forms.torch_adam,
        donated=_STATE,
        problems=_SERVER_PROBLEMS,
        gpu_problems=_SERVER_PROBLEMS,
        goals=_server_goals,
        gpu_goals=lambda problem: goals(natural=1, best=1, torch=2 * 1.4),
    ),
    Row(
        "fedyogi_weighted_update",
        _server_round,
        _fused(ff.fedyogi_weighted_update),
        donated=_STATE,
        problems=_SERVER_PROBLEMS,
        gpu_problems=_SERVER_PROBLEMS,
    ),
    Row(
        "topk_sparse_weighted_sum",
        _sparse_arguments,
        lambda values, indices, weights, room: ff.topk_sparse_weighted_sum(values, indices, weights, len(room)),
        natural=forms.natural_sparse_sum,
        best=forms.best_sparse_sum,
        numpy=forms.numpy_sparse_sum,
        torch=forms.torch_sparse_sum,
        problems=_SPARSE,
        gpu_problems=_SPARSE,
        goals=_sparse_goals,
        gpu_goals=_gpu_sparse_goals,
    ),
    Row(
        "topk_sparse_weighted_sum",
        _shuffled_arguments,
        lambda values, indices, weights, room: ff.topk_sparse_weighted_sum(values, indices, weights, len(room)),
        variant="unsorted",
        natural=forms.natural_sparse_sum,
        numpy=forms.numpy_sparse_sum,
        torch=forms.torch_sparse_sum,
        problems=_SPARSE[:3],
        gpu_problems=_SPARSE[:3],
    ),
    Row(
        "quantized_weighted_sum",
        _quantized_arguments,
        ff.quantized_weighted_sum,
        natural=forms.natural_quantized_sum,
        best=forms.best_quantized_sum,
        numpy=forms.numpy_quantized_sum,
        torch=forms.torch_quantized_sum,
        problems=_CODES,
        gpu_problems=_CODES,
        goals=_quantized_goals,
        left_out=_natural_takes("36 s a call with 32 clients", lambda problem: problem.clients > 10),
    ),
    Row(
        "quantized_weighted_sum",
        _packed_arguments,
        functools.partial(ff.quantized_weighted_sum, num_bits=4),
        variant="4 bits",
        natural=forms.unpacked(forms.natural_quantized_sum, jnp.stack),
        best=forms.unpacked(forms.best_quantized_sum, jnp.stack),
        numpy=forms.unpacked(forms.numpy_quantized_sum, np.stack),
        torch=forms.torch_packed_sum,
        problems=_CODES,
        gpu_problems=_CODES,
        left_out=_natural_takes("18 s a call with 32 clients", lambda problem: problem.clients > 10),
    ),
    Row(
        "topk_sparsify",
        _one_update,
        lambda update: ff.topk_sparsify(update, entries_kept(len(update))),
        natural=lambda update: forms.natural_topk(update, entries_kept(len(update))),
        problems=(Problem(1, 10**6),),
        gpu_problems=(Problem(1, 10**6),),
    ),
    Row(
        "quantize",
        _one_update,
        ff.quantize,
        problems=_ONE_VECTOR[:1],
        gpu_problems=_ONE_VECTOR[:1],
    ),
    Row(
        "hadamard_rotation",
        _one_update_and_key,
        ff.hadamard_rotation,
        natural=forms.natural_rotation,
        problems=(Problem(1, 10**6),),
        gpu_problems=(Problem(1, 10**6),),
    ),
    Row(
        "inverse_hadamard_rotation",
        lambda problem, key: _one_update_and_key(Problem(1, ff.reference.padded_size(problem.parameters)), key),
        lambda rotated, key: ff.inverse_hadamard_rotation(rotated, key, rotated),
        natural=forms.natural_inverse_rotation,
        problems=(Problem(1, 10**6),),
        gpu_problems=(Problem(1, 10**6),),
    ),
    _as_in_byzfl("coordinate_median", "Median"),
    _as_in_byzfl("trimmed_mean", "TrMean", _some_byzantine),
    # Among a million coordinates there are some with two values as near the median, but for rounding: either will do.
    _as_in_byzfl("mean_around_median", "Meamed", _some_byzantine, _SYSTEM_PROBLEMS[1:]),
    _as_in_byzfl("krum", "Krum", _some_byzantine),
    _as_in_byzfl("multi_krum", "MultiKrum", _some_byzantine),
    _as_in_byzfl("geometric_median", "GeometricMedian"),
    _as_in(
        "byzfl",
        "centered_clipping",
        lambda updates: ff.centered_clipping(updates, jnp.zeros(updates.shape[1]), 100.0),
        systems.byzfl_rule("CenteredClipping", _none),
    ),
    _as_in_byzfl("nearest_neighbor_mixing", "NNM", _some_byzantine),
    _as_in(
        "flower",
        "coordinate_median",
        flower.FedMedian(),
        systems.flower_function("aggregate_median"),
    ),
    _as_in(
        "flower",
        "trimmed_mean",
        flower.FedTrimmedAvg(TRIM_FRACTION),
        systems.flower_function("aggregate_trimmed_avg", lambda updates: TRIM_FRACTION),
    ),
    _as_in(
        "flower",
        "multi_krum",
        lambda updates: flower.MultiKrum(_num_byzantine(updates), len(updates) - _num_byzantine(updates))(updates),
        systems.flower_function(
            "aggregate_krum", _num_byzantine, lambda updates: len(updates) - _num_byzantine(updates)
        ),
    ),
    _as_in(
        "flower",
        "bulyan",
        lambda updates: flower.LegacyBulyan(_few_byzantine(updates))(updates),
        systems.flower_function("aggregate_bulyan", _few_byzantine, rule="aggregate_krum", to_keep=0),
        _SYSTEM_PROBLEMS[1:],  # as for mean_around_median
    ),
)
