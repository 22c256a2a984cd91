"""What an older processor costs: the main operations with the kernels of each instruction set that this one has.

The choice is made once, when the kernels are loaded, so every run is a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import curves, processes
from benchmarks.operations import Problem
from benchmarks.processes import Case
from fedfuse_jax import _native

NAMES = tuple(dict.fromkeys(name for name, _ in curves.LINES))
PROBLEMS = tuple(
    Problem(clients, parameters, dtype)
    for clients, parameters in ((32, 10**6), (128, 2 * 10**5))
    for dtype in ("float32", "bfloat16")
)
QUICK_PROBLEMS = (Problem(32, 10**5),)

REFERENCE = "avx512"
# How many times as long as with the reference's kernels it may take.
MOST = {"avx2": 2.0, "baseline": 4.0}


def supported() -> list[str]:
    """What this machine has kernels for, the widest first."""
    return [name for name in _native.load("cpu").details.get("supported_here", "").split(", ") if name]


def run(name: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """One process with the kernels of one set: the median seconds of each operation and problem."""
    cases = [Case(row, problem) for problem in problems for row in NAMES]
    return {"instruction_set": name, "rows": processes.run(cases, {_native.ISA_VARIABLE: name})}


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs by operation and problem: the median seconds with each set, and what it is over the reference's."""
    result = []
    by_case = processes.medians(runs, "instruction_set")
    for case, medians in sorted(by_case.items(), key=lambda item: NAMES.index(item[0].row)):
        ratios = {key: value / medians[REFERENCE] for key, value in medians.items()} if REFERENCE in medians else {}
        goals = {key: {"most": most, "met": ratios[key] <= most} for key, most in MOST.items() if key in ratios}
        result.append({"row": case.row, **asdict(case.problem), "seconds": medians, "ratios": ratios, "goals": goals})
    return result
