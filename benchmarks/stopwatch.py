"""The stopwatch: everybody takes turns in one process, beside probes of what the machine gives at that moment.

The rules, and why: *interleaved*, since a shared machine's speed drifts from minute to minute; *medians*, since
its accidents only ever slow a run down; *warm, and cold apart*, since whoever had the turn before leaves the caches
to be filled and its memory to be given back; *probed twice*, since a row whose floor moved while it was measured
says nothing.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Answer = list[np.ndarray]

# One sample lasts at least this long, by calling again and again where one call does not.
SAMPLE_SECONDS = {"cpu": 1e-3, "gpu": 2e-2}
MOST_CALLS = 200
# Where a call is shorter than this, a turn begins with one that does not count: the cold one. The system takes
# milliseconds to get back what the turn before has freed, after its result was there.
SHORT_CALL_SECONDS = 0.05
# Who has used up all patience still gets this many samples; or this many where one call has.
LEAST_SAMPLES, LEAST_OF_LONG_CALLS = 3, 2
# The halves of a probe's samples may differ by this much; beyond it the row is inconclusive.
PROBE_AGREEMENT = 1.4


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


def probes_agree(samples: Sequence[float]) -> bool:
    """Whether the memory gave the same in the first half of the rounds as in the second."""
    half = len(samples) // 2
    if half == 0:
        return True
    first, second = statistics.median(samples[:half]), statistics.median(samples[half:])
    return max(first, second) <= PROBE_AGREEMENT * min(first, second)
