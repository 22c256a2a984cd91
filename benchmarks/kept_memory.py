"""What new memory costs: the operations with the largest results, by default and where the C library keeps what it has.

The C library reads its settings once, when it is loaded, so every run is a process of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import processes
from benchmarks.operations import OURS, Problem
from benchmarks.processes import Case

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_ARENA_MAX": "1"}
DEFAULT, KEPT = "by default", "kept"
KINDS: Mapping[str, Mapping[str, str]] = {DEFAULT: {}, KEPT: SETTINGS}

BEST = "jnp best"
FORMS = (OURS, BEST)
FORWARD = ("weighted_sum", "coordinate_median", "trimmed_mean")
MERGE = "topk_sparse_weighted_sum"
PROBLEMS = (Problem(10, 10**6), Problem(32, 10**6))
MERGE_PROBLEM = Problem(32, 10**7)
QUICK_PROBLEMS, QUICK_MERGE_PROBLEM = (Problem(10, 10**5),), Problem(10, 10**5)

# How many times as long as the forward pass its derivative may take.
MOST = 3.0


def supported() -> bool:
    """Whether the settings mean anything to the C library here."""
    return platform.libc_ver()[0] == "glibc"


def cases(problems: Sequence[Problem], merge: Problem) -> list[Case]:
    """Every operation beside its derivative, and the merge: ours and the best in ``jax.numpy``."""
    names = [name for forward in FORWARD for name in (forward, f"{forward}/backward")]
    wanted = [(name, problem) for problem in problems for name in names]
    return [Case(name, problem, form) for name, problem in [*wanted, (MERGE, merge)] for form in FORMS]


def run(kind: str, wanted: Sequence[Case]) -> dict[str, Any]:
    """One process of a kind: the median seconds of each case."""
    return {"memory": kind, "rows": processes.run(wanted, KINDS[kind], without=SETTINGS)}


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs by operation and problem: the seconds of each form and kind of process, and how long backward takes."""
    by_case = processes.medians(runs, "memory")
    result = []
    for name, problem in dict.fromkeys((case.row, case.problem) for case in by_case):
        seconds = {form: by_case.get(Case(name, problem, form), {}) for form in FORMS}
        forward = by_case.get(Case(name.removesuffix("/backward"), problem), {}) if name.endswith("/backward") else {}
        over = {kind: value / forward[kind] for kind, value in seconds[OURS].items() if kind in forward}
        goals = {kind: {"most": MOST, "met": ratio <= MOST} for kind, ratio in over.items() if problem.large}
        entry = {"row": name, **asdict(problem), "seconds": seconds, "over_forward": over, "goals": goals}
        result.append(entry)
    return result
