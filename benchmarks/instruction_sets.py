"""What an older processor costs: the main operations with the kernels of each instruction set that this one has.

The choice is made once, when the kernels are loaded, so every run is a process of its own: this file, as a script.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax

from benchmarks import curves
from benchmarks.operations import ROWS, Problem
from benchmarks.stopwatch import Contender, Timing, first_call, interleave
from fedfuse_jax import _native

NAMES = tuple(dict.fromkeys(name for name, _ in curves.LINES))
PROBLEMS = tuple(
    Problem(clients, parameters, dtype)
    for clients, parameters in ((32, 10**6), (128, 2 * 10**5))
    for dtype in ("float32", "bfloat16")
)
QUICK_PROBLEMS = (Problem(32, 10**5),)
ROUNDS = 3  # processes of each set, in turns
REPETITIONS = 5  # samples of an operation in one of them

REFERENCE = "avx512"
# How many times as long as with the reference's kernels it may take.
MOST = {"avx2": 2.0, "baseline": 4.0}


def supported() -> list[str]:
    """What this machine has kernels for, the widest first."""
    return [name for name in _native.load("cpu").details.get("supported_here", "").split(", ") if name]


def run(name: str, problems: Sequence[Problem], repetitions: int = REPETITIONS) -> dict[str, Any]:
    """One process with the kernels of one set: the median seconds of each operation and problem."""
    here = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | {_native.ISA_VARIABLE: name, "JAX_PLATFORMS": "cpu", "PYTHONPATH": here}
    asked = json.dumps([[asdict(problem) for problem in problems], repetitions])
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.instruction_sets", asked],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"instruction_set": name, "rows": json.loads(finished.stdout)}


def measure_here(problems: Sequence[Problem], repetitions: int) -> list[dict[str, Any]]:
    """Times the operations with the kernels that are loaded."""
    rows = [row for row in ROWS if row.name in NAMES]
    measured = []
    for problem in problems:
        everybody, made = [], {}
        for row in rows:
            if row.arguments not in made:
                made[row.arguments] = jax.block_until_ready(jax.jit(partial(row.arguments, problem))(jax.random.key(0)))
            arguments = made[row.arguments]
            everybody.append(Contender(row.name, partial(jax.jit(row.call), *arguments), jax.block_until_ready))
        timings = {contender.name: Timing(first_call(contender)[1]) for contender in everybody}
        interleave(everybody, timings, repetitions, "cpu")
        measured += [{"row": name, **asdict(problem), "seconds": timing.seconds} for name, timing in timings.items()]
    return measured


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs by operation and problem: the median seconds with each set, and what it is over the reference's."""
    seconds: dict[tuple[str, Problem], dict[str, list[float]]] = {}
    for one in runs:
        for row in one["rows"]:
            problem = Problem(row["clients"], row["parameters"], row["dtype"], row["tree"])
            found = seconds.setdefault((row["row"], problem), {})
            found.setdefault(one["instruction_set"], []).append(row["seconds"])
    result = []
    for (name, problem), by_set in sorted(seconds.items(), key=lambda item: NAMES.index(item[0][0])):
        medians = {key: statistics.median(values) for key, values in by_set.items()}
        ratios = {key: value / medians[REFERENCE] for key, value in medians.items()} if REFERENCE in medians else {}
        goals = {key: {"most": most, "met": ratios[key] <= most} for key, most in MOST.items() if key in ratios}
        result.append({"row": name, **asdict(problem), "seconds": medians, "ratios": ratios, "goals": goals})
    return result


def _main() -> None:
    problems, repetitions = json.loads(sys.argv[1])
    print(json.dumps(measure_here([Problem(**problem) for problem in problems], repetitions)))


if __name__ == "__main__":
    _main()
