"""The stopwatch: everybody takes turns in one process, beside probes of what the memory gives at that moment.

The rules, and why: *interleaved*, since a shared machine's speed drifts from minute to minute; *medians*, since
its accidents only ever slow a run down; *warm, and cold apart*, since whoever had the turn before leaves the caches
to be filled and its memory to be given back; *same buffers*, born in a jitted computation, since page size and place
decide how fast memory is; *checked before timed*, since a wrong answer can be had at any speed; *probed twice*,
since a row whose floor moved while it was measured says nothing.
"""

from __future__ import annotations

import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import trees
from benchmarks.operations import FLOOR, OURS, TINY, Goal, Goals, Problem, Row

Answer = list[np.ndarray]

READ_PROBE, COPY_PROBE = "read", "copy"
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Two probes of one row may differ by this much; beyond it the row is inconclusive.
PROBE_AGREEMENT = 1.4
# Where a result is a good part of the traffic, the floor is a copy's rate, not a read's.
COPY_SHARE = 0.25
# Results of one problem may differ by this much of the largest value among them.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 2e-2, "float16": 2e-3}
# One sample lasts at least this long, by calling again and again where one call does not.
SAMPLE_SECONDS = {"cpu": 1e-3, "gpu": 2e-2}
MOST_CALLS = 200
# Where a call is shorter than this, a turn begins with one that does not count: the cold one. The system takes
# milliseconds to get back what the turn before has freed, after its result was there.
SHORT_CALL_SECONDS = 0.05
# Who has used up all patience still gets this many samples; or this many where one call has.
LEAST_SAMPLES, LEAST_OF_LONG_CALLS = 3, 2


@dataclass(frozen=True)
class Contender:
    """Somebody who is timed: ``start`` begins the work and returns its result, ``wait`` returns when it is there."""

    name: str
    start: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda result: None
    answer: Callable[[Any], Answer] | None = None  # None: there is nothing to compare


@dataclass
class Timing:
    """What the stopwatch said of one contender; ``first_call`` includes what it compiles."""

    first_call: float
    calls_per_sample: int = 1
    samples: list[float] = field(default_factory=list)
    cold_samples: list[float] = field(default_factory=list)  # the call before each sample, where calls are short

    @property
    def seconds(self) -> float:
        """The median sample."""
        return statistics.median(self.samples)

    @property
    def cold(self) -> float | None:
        """How many times as long as the median sample the first call of a turn takes."""
        return statistics.median(self.cold_samples) / self.seconds if self.cold_samples else None


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


# --- Probes of the memory -------------------------------------------------------------------------------------


def _pieces(arrays: Iterable[np.ndarray], threads: int) -> list[np.ndarray]:
    """The buffers as 64-bit words (a last odd one left out), cut for so many threads."""
    words = [array.reshape(-1).view(np.uint8) for array in arrays]
    words = [array[: array.size // 8 * 8].view(np.int64) for array in words if array.nbytes >= 8]
    return [piece for array in words for piece in np.array_split(array, threads) if piece.size]


def probes(arguments: Any, copy: bool, platform: str) -> list[Contender]:
    """Streams every input byte once: reads, or for rows that write as they read, copies.

    A CPU is probed by one thread and by all: for small buffers waking a thread costs more than it brings. The
    maximum of 64-bit integers is the cheapest arithmetic NumPy has for a byte, and its copy goes past the caches.
    """
    leaves = jax.tree.leaves(arguments)
    if platform == "gpu":
        # There is no reading as fast as a copy is easily had: XLA's own elementwise kernel, in and out.
        return [_jax_contender(f"{COPY_PROBE}, jnp.negative", partial(jax.tree.map, jnp.negative), (leaves,), None)]
    arrays = [np.asarray(leaf) for leaf in leaves]
    targets = [np.zeros_like(array) for array in arrays] if copy else []
    result = []
    for threads in sorted({1, THREADS}):
        sources = _pieces(arrays, threads)
        run: Callable[..., Any] = map if threads == 1 else _pool().map
        if copy:
            start = _drained(run, np.copyto, _pieces(targets, threads), sources)
        else:
            start = _drained(run, np.maximum.reduce, sources)
        result.append(Contender(f"{COPY_PROBE if copy else READ_PROBE}, {threads} threads", start))
    return result


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


def _drained(run: Callable[..., Iterator[Any]], *arguments: Any) -> Callable[[], None]:
    def start() -> None:
        for _ in run(*arguments):
            pass

    return start


# --- The stopwatch --------------------------------------------------------------------------------------------


def first_call(contender: Contender) -> tuple[Any, float]:
    """Compiles and runs once."""
    start = time.perf_counter()
    result = contender.start()
    contender.wait(result)
    return result, time.perf_counter() - start


def sample(contender: Contender, calls: int, platform: str) -> float:
    """Seconds a call, over so many. On a GPU the calls queue up, as a training loop's do."""
    queued = platform == "gpu"
    start = time.perf_counter()
    for _ in range(calls):
        result = contender.start()
        if not queued:
            contender.wait(result)
    contender.wait(result)
    return (time.perf_counter() - start) / calls


def interleave(
    everybody: Sequence[Contender],
    timings: Mapping[str, Timing],
    repetitions: int,
    platform: str,
    patience: float = math.inf,
) -> None:
    """Fills ``timings``: so many rounds in which everybody has one turn, in another order every round.

    Whoever has used up ``patience`` seconds sits out, but not before three samples; before two where one call takes as
    long, and then the call that said so is one of them.
    """
    short, least = set(), dict.fromkeys(timings, LEAST_SAMPLES)
    for contender in everybody:
        seconds = sample(contender, 1, platform)
        if seconds < 10 * SHORT_CALL_SECONDS:  # that one was cold
            seconds = sample(contender, 1, platform)
        if seconds < SHORT_CALL_SECONDS:
            short.add(contender.name)
        if seconds >= patience:
            least[contender.name] = LEAST_OF_LONG_CALLS
            timings[contender.name].samples.append(seconds)
        wanted = math.ceil(SAMPLE_SECONDS[platform] / max(seconds, 1e-7))
        timings[contender.name].calls_per_sample = min(max(wanted, 1), MOST_CALLS)
    shuffled = random.Random(0)
    for _ in range(repetitions):
        for contender in shuffled.sample(everybody, len(everybody)):
            timing = timings[contender.name]
            used = sum(timing.samples) * timing.calls_per_sample
            if len(timing.samples) < (repetitions if used < patience else min(least[contender.name], repetitions)):
                if contender.name in short:
                    timing.cold_samples.append(sample(contender, 1, platform))
                timing.samples.append(sample(contender, timing.calls_per_sample, platform))


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


def probes_agree(samples: Sequence[float]) -> bool:
    """Whether the memory gave the same in the first half of the rounds as in the second."""
    half = len(samples) // 2
    if half == 0:
        return True
    first, second = statistics.median(samples[:half]), statistics.median(samples[half:])
    return max(first, second) <= PROBE_AGREEMENT * min(first, second)


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

    timings, answers, errors, written = {}, {}, {}, 0
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
        if contender.name == OURS:
            written = _bytes_of(result)
        del result  # or the last one's would be there during everybody's turns
    errors |= wrong_contenders(answers, tolerance)
    del answers

    read = _bytes_of(arguments)
    probing = probes(arguments, written > COPY_SHARE * (read + written), platform)
    timed = [contender for contender in everybody if contender.name not in errors]
    timings = {name: timing for name, timing in timings.items() if name not in errors}
    for probe in probing:
        timings[probe.name] = Timing(first_call(probe)[1])
    interleave([*probing, *timed], timings, repetitions, platform, patience)

    return _row_report(row, problem, platform, timings, errors, [probe.name for probe in probing], read, written)


def _row_report(
    row: Row,
    problem: Problem,
    platform: str,
    timings: Mapping[str, Timing],
    errors: Mapping[str, str],
    probe_names: Sequence[str],
    read: int,
    written: int,
) -> dict[str, Any]:
    fastest = min(probe_names, key=lambda name: timings[name].seconds)
    copying = fastest.startswith(COPY_PROBE)
    rate = read * (1 + copying) / timings[fastest].seconds
    conclusive = probes_agree(timings[fastest].samples)
    ours = timings.get(OURS)
    ratios = {}
    fraction = None
    if ours is not None:
        ratios = {
            name: timing.seconds / ours.seconds
            for name, timing in timings.items()
            if name != OURS and name not in probe_names
        }
        fraction = (read + written) / rate / ours.seconds
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
            "probe": fastest,
            "bytes_per_second": rate,
            "seconds": (read + written) / rate,
            "samples": {name: timings[name].samples for name in probe_names},
        },
        "contenders": {
            name: {
                "seconds": timing.seconds,
                "samples": timing.samples,
                "cold_samples": timing.cold_samples,
                "calls_per_sample": timing.calls_per_sample,
                "first_call_seconds": timing.first_call,
            }
            for name, timing in timings.items()
            if name not in probe_names
        },
        "errors": dict(errors),
        "left_out": dict(left_out(row, problem, platform)),
        "ratios": ratios,
        "cold": ours.cold if ours is not None else None,
        "fraction_of_floor": fraction,
        "goals": judged(wanted, {**ratios, FLOOR: fraction} if fraction is not None else ratios, conclusive),
        "conclusive": conclusive,
    }


def judged(wanted: Goals, reached: Mapping[str, float], conclusive: bool) -> dict[str, dict[str, Any]]:
    """Every goal beside what was reached; ``met`` is ``None`` where the run cannot tell.

    A fraction of the floor well above 1 is a fault of the probe and proves nothing either.
    """

    def met(name: str, goal: Goal) -> bool | None:
        value = reached.get(name)
        if value is None or not conclusive or (name == FLOOR and value > 1.1):
            return None
        return value >= goal.least

    return {
        name: {"least": goal.least, "stretch": goal.stretch, "reached": reached.get(name), "met": met(name, goal)}
        for name, goal in wanted.items()
    }


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
