"""Measurements in processes of their own, where something is settled once, when a process starts.

A process is this file, as a script; the processes of several kinds take turns, and medians over them are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax

from benchmarks.operations import OURS, ROWS, Problem
from benchmarks.stopwatch import Contender, Timing, first_call, interleave

ROUNDS = 3  # processes of each kind, in turns
REPETITIONS = 5  # samples of a call in one of them


class Case(NamedTuple):
    """A row of the table by its name, for a problem; a form of it is ours or the best in ``jax.numpy``."""

    row: str
    problem: Problem
    form: str = OURS


def run(
    cases: Sequence[Case], variables: Mapping[str, str], without: Collection[str] = (), repetitions: int = REPETITIONS
) -> list[dict[str, Any]]:
    """One process with these variables, and ``without`` those: the median seconds of each case."""
    here = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": here, **variables}
    asked = json.dumps([[(case.row, asdict(case.problem), case.form) for case in cases], repetitions])
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes", asked],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    measured: list[dict[str, Any]] = json.loads(finished.stdout)
    return measured


def measure_here(cases: Sequence[Case], repetitions: int) -> list[dict[str, Any]]:
    """Times the cases as this process is; those of one problem take turns."""
    rows = {row.name: row for row in ROWS}
    measured = []
    for problem in dict.fromkeys(case.problem for case in cases):
        everybody, made = {}, {}
        for case in cases:
            row = rows[case.row]
            call = row.call if case.form == OURS else row.best
            if case.problem != problem or call is None:
                continue
            if row.arguments not in made:
                made[row.arguments] = jax.block_until_ready(jax.jit(partial(row.arguments, problem))(jax.random.key(0)))
            label = f"{case.row}, {case.form}"
            everybody[case] = Contender(label, partial(jax.jit(call), *made[row.arguments]), jax.block_until_ready)
        timings = {contender.name: Timing(first_call(contender)[1]) for contender in everybody.values()}
        interleave(list(everybody.values()), timings, repetitions, "cpu")
        measured += [
            {"row": case.row, "form": case.form, **asdict(problem), "seconds": timings[contender.name].seconds}
            for case, contender in everybody.items()
        ]
    return measured


def medians(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[Case, dict[str, float]]:
    """The seconds of each case by what the runs call their ``kind``: the median over its processes."""
    seconds: dict[Case, dict[str, list[float]]] = {}
    for one in runs:
        for row in one["rows"]:
            case = Case(row["row"], Problem(row["clients"], row["parameters"], row["dtype"], row["tree"]), row["form"])
            seconds.setdefault(case, {}).setdefault(one[kind], []).append(row["seconds"])
    return {
        case: {name: statistics.median(values) for name, values in by_kind.items()} for case, by_kind in seconds.items()
    }


def _main() -> None:
    asked, repetitions = json.loads(sys.argv[1])
    cases = [Case(row, Problem(**problem), form) for row, problem, form in asked]
    print(json.dumps(measure_here(cases, repetitions)))


if __name__ == "__main__":
    _main()
