"""What one row of the table takes: everybody on the same buffers, beside the probes, compared before timed.

The *same buffers*, born in a jitted computation, since page size and place decide how fast memory is; *checked before
timed*, since a wrong answer can be had at any speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bounds, trees
from benchmarks.bounds import Probe
from benchmarks.operations import FLOOR, OURS, TINY, Goal, Goals, Problem, Row
from benchmarks.stopwatch import Answer, Contender, Timing, first_call, interleave, probes_agree

# Where a result is a good part of the traffic, the floor is a copy's rate, not a read's.
COPY_SHARE = 0.25
# Results of one problem may differ by this much of the largest value among them.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 2e-2, "float16": 2e-3}

# --- Contenders -----------------------------------------------------------------------------------------------


def as_tree(problem: Problem, arguments: Any) -> Any:
    """The arguments with every array over the parameters cut into the leaves of the problem's tree."""
    shapes = trees.shapes(problem.tree, problem.parameters)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]

    def cut(array: Any) -> Any:
        if array.ndim == 0 or array.shape[-1] != problem.parameters:
            return array
        parts = jnp.split(array, ends, axis=-1)
        return [part.reshape(*array.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]

    return jax.jit(partial(jax.tree.map, cut))(arguments)


def _arrays(result: Any) -> Answer:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


def _joined(problem: Problem) -> Callable[[Any], Answer]:
    """The leaves of a result as one array, or as many as there are trees in it."""
    shapes = trees.shapes(problem.tree, problem.parameters)

    def answer(result: Any) -> Answer:
        leaves, count = _arrays(result), len(shapes)
        if len(leaves) % count:  # numbers of the clients
            return leaves
        flat = [leaf.reshape(*leaf.shape[: leaf.ndim - len(shapes[i % count])], -1) for i, leaf in enumerate(leaves)]
        return [np.concatenate(flat[start : start + count], axis=-1) for start in range(0, len(flat), count)]

    return answer


def _with_own(arguments: tuple[Any, ...], donated: Collection[int], copy: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The arguments, with copies of those that a contender will write over."""
    return tuple(
        jax.tree.map(copy, argument) if position in donated else argument for position, argument in enumerate(arguments)
    )


def _threaded(call: Callable[..., Any], arguments: tuple[Any, ...], donated: Collection[int]) -> Callable[[], Any]:
    """``call`` of the arguments, whose donated ones are from then on the results of the call before."""
    if not donated:
        return partial(call, *arguments)
    state = list(arguments)

    def start() -> Any:
        results = call(*state)
        for position, result in zip(donated, results, strict=True):
            state[position] = result
        return results

    return start


def _jax_contender(
    name: str,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    answer: Callable[[Any], Answer] | None = _arrays,
    donated: tuple[int, ...] = (),
) -> Contender:
    jitted = jax.jit(call, donate_argnums=donated)
    start = _threaded(jitted, _with_own(arguments, donated, jnp.copy), donated)
    if donated and answer is not None:
        # NumPy's view of a result would keep it from being donated to the next call.
        return Contender(name, start, jax.block_until_ready, lambda result: answer(jax.tree.map(jnp.copy, result)))
    return Contender(name, start, jax.block_until_ready, answer)


def _torch_contender(
    name: str, call: Callable[..., Any], arguments: tuple[Any, ...], platform: str, donated: tuple[int, ...] = ()
) -> Contender:
    import torch

    tensors = _with_own(jax.tree.map(torch.from_dlpack, arguments), donated, torch.clone)
    wait = (lambda result: torch.cuda.synchronize()) if platform == "gpu" else (lambda result: None)

    def answer(result: Any) -> Answer:
        # NumPy has no bfloat16 of torch's: a float32 holds it exactly.
        leaves = [leaf.float() if leaf.dtype == torch.bfloat16 else leaf for leaf in jax.tree.leaves(result)]
        return [leaf.cpu().numpy() for leaf in leaves]

    return Contender(name, _threaded(call, tensors, donated), wait, answer)


def _numpy_contender(
    name: str, call: Callable[..., Any], arguments: tuple[Any, ...], donated: tuple[int, ...] = ()
) -> Contender:
    arrays = _with_own(jax.tree.map(np.asarray, arguments), donated, np.array)
    return Contender(name, _threaded(call, arrays, donated), answer=_arrays)


def contenders(
    row: Row, problem: Problem, arguments: tuple[Any, ...], platform: str, others: Collection[str]
) -> list[Contender]:
    """Everybody who computes ``row`` for ``problem``, ours first; of PyTorch and other systems those in ``others``."""
    if problem.tree:
        # A tree is only ever compared with our own time for one array: the peers would have to loop.
        tree = as_tree(problem, arguments)
        return [
            _jax_contender(OURS, row.call, tree, _joined(problem), row.donated),
            _jax_contender("one array", row.call, arguments, donated=row.donated),
        ]
    everybody = [_jax_contender(OURS, row.call, arguments, donated=row.donated)]
    for name, reference in row.references.items():
        if name == "own float32" and problem.dtype == "float32":
            continue
        call, own_arguments = reference.prepare(arguments)
        everybody.append(_jax_contender(name, call, own_arguments, _arrays if reference.same_result else None))
    if row.natural is not None:
        everybody.append(_jax_contender("jnp natural", row.natural, arguments, donated=row.donated))
    if row.best is not None:
        everybody.append(_jax_contender("jnp best", row.best, arguments, donated=row.donated))
    if row.numpy is not None and platform == "cpu":
        everybody.append(_numpy_contender("numpy", row.numpy, arguments, row.donated))
    if row.torch is not None and "torch" in others:
        everybody.append(_torch_contender("torch", row.torch, arguments, platform, row.donated))
    for system in row.systems.keys() & set(others):
        if system == "byzfl" and "torch" in others:
            everybody.append(_torch_contender(system, row.systems[system], arguments, platform))
        else:
            everybody.append(_numpy_contender(system, row.systems[system], arguments))
    return [contender for contender in everybody if contender.name not in left_out(row, problem, platform)]


def left_out(row: Row, problem: Problem, platform: str) -> Mapping[str, str]:
    """Who is not measured here, and why."""
    return row.left_out(problem) if platform == "cpu" else {}


# --- Checks ---------------------------------------------------------------------------------------------------


def _agree(mine: Answer, other: Answer, tolerance: float) -> bool:
    if len(mine) != len(other) or any(a.shape != b.shape for a, b in zip(mine, other, strict=True)):
        return False
    for a, b in zip(mine, other, strict=True):
        first, second = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return False  # the inputs are finite, and small
        if np.max(np.abs(first - second), initial=0) > tolerance * np.max(np.abs(second), initial=0):
            return False
    return True


def wrong_contenders(answers: Mapping[str, Answer], tolerance: float) -> dict[str, str]:
    """Whoever disagrees with more than half of the others, and with whom."""
    wrong = {}
    for name, mine in answers.items():
        others = [other for other in answers if other != name]
        opponents = [other for other in others if not _agree(mine, answers[other], tolerance)]
        if len(opponents) > len(others) / 2:
            wrong[name] = f"disagrees with {', '.join(opponents)}"
    return wrong


# --- A row ----------------------------------------------------------------------------------------------------


def _bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure_row(
    row: Row,
    problem: Problem,
    *,
    platform: str = "cpu",
    repetitions: int = 11,
    patience: float = math.inf,
    others: Collection[str] = (),
    extra: Sequence[Contender] = (),
) -> dict[str, Any]:
    """Measures one row for one problem; the result is what the JSON file holds."""
    arguments = jax.block_until_ready(jax.jit(partial(row.arguments, problem))(jax.random.key(0)))
    everybody = [*contenders(row, problem, arguments, platform, others), *extra]
    tolerance = TOLERANCE[problem.dtype]

    timings, answers, errors = {}, {}, {}
    written, new, results = 0, [], {}
    for contender in everybody:
        try:
            result, seconds = first_call(contender)
        except Exception as error:  # a peer that cannot do this is named in the table, and the others go on
            if contender.name == OURS:
                raise
            errors[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        timings[contender.name] = Timing(seconds)
        if contender.answer is not None:
            answers[contender.name] = contender.answer(result)
        results[contender.name] = len(jax.tree.leaves(result))
        if contender.name == OURS:
            written, new = _bytes_of(result), bounds.new_bytes(result)
        del result  # or the last one's would be there during everybody's turns
    errors |= wrong_contenders(answers, tolerance)
    del answers

    read = _bytes_of(arguments)
    probing = bounds.memory_probes(arguments, written > COPY_SHARE * (read + written), platform)
    if platform == "cpu":
        if problem.tree and bounds.ONE_ARRAY in results:
            tree = jax.eval_shape(partial(as_tree, problem), arguments)
            probing += bounds.leaf_probes(tree, arguments, results[OURS], results[bounds.ONE_ARRAY])
        elif new and not row.donated:
            probing.append(bounds.new_page_probe(new))
        if row.multiply_adds is not None:
            probing += bounds.arithmetic_probes()
    timed = [contender for contender in everybody if contender.name not in errors]
    timings = {name: timing for name, timing in timings.items() if name not in errors}
    for probe in probing:
        timings[probe.name] = Timing(first_call(probe)[1])
    interleave([*probing, *timed], timings, repetitions, platform, patience)

    return _row_report(row, problem, platform, timings, errors, probing, read, written, sum(new))


def _row_report(
    row: Row,
    problem: Problem,
    platform: str,
    timings: Mapping[str, Timing],
    errors: Mapping[str, str],
    probing: Sequence[Probe],
    read: int,
    written: int,
    new: int,
) -> dict[str, Any]:
    fastest = bounds.fastest(bounds.MEMORY, probing, timings)
    assert fastest is not None
    conclusive = probes_agree(timings[fastest.name].samples)
    multiply_adds = row.multiply_adds(problem) if row.multiply_adds is not None and platform == "cpu" else 0
    floor = bounds.floor(read + written, multiply_adds, probing, timings)
    least = bounds.bound(read + written, new, multiply_adds, probing, timings)
    contenders = {name: timing for name, timing in timings.items() if name not in {probe.name for probe in probing}}
    ours = timings.get(OURS)
    ratios, reach, fraction, holds = {}, {}, None, False
    if ours is not None:
        ratios = {name: timing.seconds / ours.seconds for name, timing in contenders.items() if name != OURS}
        fraction = floor.seconds / ours.seconds
        holds = least is not None and conclusive and least.holds(ours.seconds, timings)
        if least is not None and holds:
            reach = {name: max(ratio, contenders[name].seconds / least.seconds) for name, ratio in ratios.items()}
    wanted = row.goals(problem) if platform == "cpu" else row.gpu_goals(problem)
    return {
        "row": row.name,
        "operation": row.operation,
        "clients": problem.clients,
        "parameters": problem.parameters,
        "dtype": problem.dtype,
        "tree": problem.tree,
        "donated": list(row.donated),
        "bytes": {"read": read, "written": written, "counted": "every input read once, every result written once"},
        "floor": {
            "probe": fastest.name,
            "bytes_per_second": fastest.amount / timings[fastest.name].seconds,
            "seconds": floor.seconds,
            "parts": dict(floor.parts),
        },
        "bound": None if least is None else {"seconds": least.seconds, "parts": dict(least.parts), "holds": holds},
        "probes": {
            probe.name: {
                "part": probe.part,
                "amount": probe.amount,
                "seconds": timings[probe.name].seconds,
                "samples": timings[probe.name].samples,
            }
            for probe in probing
        },
        "contenders": {
            name: {
                "seconds": timing.seconds,
                "samples": timing.samples,
                "cold_samples": timing.cold_samples,
                "calls_per_sample": timing.calls_per_sample,
                "first_call_seconds": timing.first_call,
            }
            for name, timing in contenders.items()
        },
        "errors": dict(errors),
        "left_out": dict(left_out(row, problem, platform)),
        "ratios": ratios,
        "cold": ours.cold if ours is not None else None,
        "fraction_of_floor": fraction,
        "goals": judged(wanted, {**ratios, FLOOR: fraction} if fraction is not None else ratios, reach, conclusive),
        "conclusive": conclusive,
    }


def judged(
    wanted: Goals, reached: Mapping[str, float], reach: Mapping[str, float], conclusive: bool
) -> dict[str, dict[str, Any]]:
    """Every goal beside what was reached, and what the least time would have reached (``reach``).

    ``met`` is ``None`` where the run cannot tell. A fraction of the floor well above 1 is a fault of the probe and
    proves nothing either. ``out_of_reach``: not met, and at the least time it would not be.
    """

    def met(name: str, goal: Goal) -> bool | None:
        value = reached.get(name)
        if value is None or not conclusive or (name == FLOOR and value > bounds.FAULT):
            return None
        return value >= goal.least

    result = {}
    for name, goal in wanted.items():
        is_met, most = met(name, goal), reach.get(name)
        result[name] = {
            "least": goal.least,
            "stretch": goal.stretch,
            "reached": reached.get(name),
            "met": is_met,
            "reach": most,
            "out_of_reach": is_met is False and most is not None and most < goal.least,
        }
    return result


# --- The price of a call --------------------------------------------------------------------------------------


def measure_overhead(row: Row, *, platform: str = "cpu", repetitions: int = 11) -> dict[str, Any]:
    """Microseconds a call of a problem too small to cost anything, eager and jitted, beside the natural form's."""
    arguments = jax.block_until_ready(jax.jit(partial(row.arguments, TINY))(jax.random.key(0)))
    forms = {OURS: row.call} | ({} if row.natural is None else {"jnp natural": row.natural})
    everybody = []
    for name, call in forms.items():
        everybody.append(Contender(f"{name}, eager", partial(call, *arguments), jax.block_until_ready))
        everybody.append(Contender(f"{name}, jitted", partial(jax.jit(call), *arguments), jax.block_until_ready))
    timings = {contender.name: Timing(first_call(contender)[1]) for contender in everybody}
    # On a GPU too one waits for each call here: what is asked is how long one takes to come back.
    interleave(everybody, timings, repetitions, "cpu")
    return {"row": row.name, "microseconds": {name: timing.seconds * 1e6 for name, timing in timings.items()}}
