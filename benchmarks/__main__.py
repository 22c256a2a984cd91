"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import (
    curves,
    footprint,
    instruction_sets,
    kept_memory,
    machine,
    measure,
    operations,
    processes,
    report,
    systems,
    trees,
)
from benchmarks.operations import ROWS, Problem, Row

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = ROOT / "benchmarks" / "results"


# The parts of a report that are measured, in the order in which they are shown.
MEASURED = ("rows", "overhead", "curves", "instruction_sets", "kept_memory", "build")


class Task(NamedTuple):
    """One measurement to make: ``run`` adds it to a report."""

    label: str
    run: Callable[[report.Report], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; the exit status is 1 when a contender was wrong, ours included."""
    options = _parse(arguments)
    if options.table:
        print(report.markdown(report.load(options.table)), end="")
        return 0
    if options.publish:
        return _publish(options.publish)
    platform = "gpu" if options.gpu else "cpu"
    if options.gpu and jax.default_backend() != "gpu":
        sys.exit(f"benchmarks: --gpu needs a GPU that JAX can use; JAX has only {jax.default_backend()} here")
    if not options.gpu:
        jax.config.update("jax_platforms", "cpu")

    result = measure_all(options, platform)
    report.show(result)
    path = output_path(options.output, result)
    print(f"Results: {path}")
    if machine.is_importable("matplotlib"):
        for plot in report.plots(result, path):
            print(f"Plot: {plot}")
    return int(any(row["errors"] for row in result["rows"]))


def _publish(path: Path) -> int:
    """Draws a report, writes the documentation's tables and pictures, and renews README's rows."""
    result = report.load(path)
    if not machine.is_importable("matplotlib"):
        sys.exit("benchmarks: --publish needs matplotlib: pip install matplotlib")
    table = ROOT / "docs" / "benchmarks_table.md"
    readme = ROOT / "README.md"
    text = report.markdown(result)
    try:
        renewed = report.with_rows(readme.read_text(), text)
    except ValueError as error:
        sys.exit(f"benchmarks: {readme.name}: {error}")
    pictures = report.plots(result, path)
    table.write_text(text + report.picture_links(pictures, table.parent))
    readme.write_text(renewed)
    for written in (*pictures, table, readme):
        print(f"Wrote {written}")
    return 0


def measure_all(options: argparse.Namespace, platform: str) -> report.Report:
    """Measures what the options ask for, and saves after every measurement."""
    result = _new_report(options, platform)
    path = output_path(options.output, result)
    if path.exists() and (options.resume or options.parts):
        try:
            earlier = report.load(path)
        except ValueError as error:
            sys.exit(f"benchmarks: {error}")
        asked_again = () if options.resume else (*options.parts, *(["build"] if options.build else []))
        result |= {part: earlier[part] for part in MEASURED if part not in asked_again}
    for line in result["skipped"]:
        print(f"benchmarks: {line}")
    for task in _with_progress(tasks(options, platform, result)):
        task.run(result)
        report.save(result, path)
    return result


def tasks(options: argparse.Namespace, platform: str, done: report.Report) -> list[Task]:
    """Every measurement the options ask for that is not done, in the order in which it is reported."""
    todo = []
    parts = options.parts or ["rows"]
    if not options.parts and platform == "cpu" and not (options.operations or options.shapes or options.dtypes):
        parts = [*parts, "curves", "instruction_sets", "kept_memory"]
    if "rows" in parts:
        todo += _row_tasks(options, platform, done)
    if "curves" in parts:
        todo += _curve_tasks(options, platform, done)
    if "instruction_sets" in parts:
        todo += _instruction_set_tasks(options, done)
    if "kept_memory" in parts and kept_memory.supported():
        todo += _kept_memory_tasks(options, done)
    if options.build and not done["build"]:
        todo.append(Task("a wheel from nothing", lambda result: result["build"].update(footprint.build_wheel())))
    return todo


def _row_tasks(options: argparse.Namespace, platform: str, done: report.Report) -> Iterator[Task]:
    here = systems.installed()
    others = [*(["torch"] if machine.is_importable("torch") else []), *here]
    chosen = [
        row
        for row in ROWS
        if not options.operations or {row.name, row.operation} & set(options.operations)
        if not row.systems or row.systems.keys() & set(here)
    ]

    def measure_one(row: Row, problem: Problem, result: report.Report) -> None:
        measured = measure.measure_row(
            row,
            problem,
            platform=platform,
            repetitions=options.repetitions,
            patience=options.patience,
            others=others,
        )
        result["rows"].append(measured)

    def measure_call(row: Row, result: report.Report) -> None:
        result["overhead"].append(measure.measure_overhead(row, platform=platform, repetitions=options.repetitions))

    for row in chosen:
        for problem in problems(row, options, platform):
            wanted = {"row": row.name, **dataclasses.asdict(problem)}
            if not any(wanted.items() <= old.items() for old in done["rows"]):
                yield Task(f"{row.name} {problem.label}", partial(measure_one, row, problem))
    for row in chosen:
        if not row.variant and not any(old["row"] == row.name for old in done["overhead"]):
            yield Task(f"{row.name} call overhead", partial(measure_call, row))


def _curve_tasks(options: argparse.Namespace, platform: str, done: report.Report) -> Iterator[Task]:
    def measure_one(clients: int, result: report.Report) -> None:
        points = curves.measure_clients(clients, platform=platform, repetitions=options.repetitions)
        result["curves"].extend(points)

    for clients in curves.QUICK_CLIENTS if options.quick else curves.CLIENTS:
        if not any(point["clients"] == clients for point in done["curves"]):
            yield Task(f"curves {clients} clients", partial(measure_one, clients))


def _instruction_set_tasks(options: argparse.Namespace, done: report.Report) -> Iterator[Task]:
    chosen = instruction_sets.QUICK_PROBLEMS if options.quick else instruction_sets.PROBLEMS

    def measure_one(name: str, result: report.Report) -> None:
        result["instruction_sets"].append(instruction_sets.run(name, chosen))

    for number in range(1 if options.quick else processes.ROUNDS):
        for name in instruction_sets.supported():
            if sum(run["instruction_set"] == name for run in done["instruction_sets"]) <= number:
                yield Task(f"instruction set {name}, run {number + 1}", partial(measure_one, name))


def _kept_memory_tasks(options: argparse.Namespace, done: report.Report) -> Iterator[Task]:
    sizes = (kept_memory.PROBLEMS, kept_memory.MERGE_PROBLEM)
    if options.quick:
        sizes = (kept_memory.QUICK_PROBLEMS, kept_memory.QUICK_MERGE_PROBLEM)
    wanted = kept_memory.cases(*sizes)

    def measure_one(kind: str, result: report.Report) -> None:
        result["kept_memory"].append(kept_memory.run(kind, wanted))

    for number in range(1 if options.quick else processes.ROUNDS):
        for kind in kept_memory.KINDS:
            if sum(run["memory"] == kind for run in done["kept_memory"]) <= number:
                yield Task(f"memory {kind}, run {number + 1}", partial(measure_one, kind))


def problems(row: Row, options: argparse.Namespace, platform: str) -> tuple[Problem, ...]:
    """The row's own sizes, or those the options put in their place."""
    own = row.gpu_problems if platform == "gpu" else row.problems
    if options.shapes:
        dtypes = options.dtypes or ("float32",)
        replaced = [dataclasses.replace(shape, dtype=dtype) for shape in options.shapes for dtype in dtypes]
        # A variant is another way to call the operation; what a tree costs is asked of the operation itself.
        return tuple(dict.fromkeys(shape for shape in replaced if not shape.tree or not row.variant))
    if options.quick:
        several = len({problem.clients for problem in own}) > 1
        cut = tuple(
            dataclasses.replace(problem, parameters=min(problem.parameters, 10**5 if problem.tree else 10**6))
            for problem in own
            if problem.tree not in trees.NETWORKS and (problem.tree or not several)
        )
        own = (*operations.QUICK_PROBLEMS, *cut) if several else cut
    return tuple(problem for problem in own if not options.dtypes or problem.dtype in options.dtypes)


def output_path(folder: Path, result: report.Report) -> Path:
    """``<date>-<platform>-<device>.json``; a quick run never takes the place of a real one."""
    device = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    quick = "-quick" if result["options"]["quick"] else ""
    return folder / f"{result['date']}-{result['platform']}-{device}{quick}.json"


def _new_report(options: argparse.Namespace, platform: str) -> report.Report:
    optional = {
        "torch": "no PyTorch column",
        "byzfl": "no comparison with its rules",
        "flwr": "no comparison with Flower's functions",
        "matplotlib": "no plot",
        "rich": "plain tables",
    }
    return {
        "schema": report.SCHEMA,
        "date": datetime.date.today().isoformat(),
        "platform": platform,
        "machine": machine.describe(),
        "options": {
            "repetitions": options.repetitions,
            "quick": options.quick,
            "patience": None if math.isinf(options.patience) else options.patience,
        },
        "skipped": [
            *(f"{name} is not installed: {loss}" for name, loss in optional.items() if not machine.is_importable(name)),
            *([] if kept_memory.supported() else ["the C library is not glibc: no table of memory that is kept"]),
        ],
        "module_bytes": footprint.module_bytes(),
        "rows": [],
        "overhead": [],
        "curves": [],
        "instruction_sets": [],
        "kept_memory": [],
        "build": {},
    }


def _with_progress(todo: Sequence[Task]) -> Iterator[Task]:
    """A bar on a terminal, a line for each measurement elsewhere."""
    if not (sys.stdout.isatty() and machine.is_importable("rich")):
        for number, task in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {task.label}", flush=True)
            yield task
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(todo))
        for task in todo:
            progress.update(bar, description=task.label)
            yield task
            progress.advance(bar)


# --- Options --------------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = sorted({row.operation for row in ROWS})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times every operation against jax.numpy, NumPy, PyTorch and other systems in one process, "
        "and against what the memory gives in the same run. Writes JSON and plots, shows tables.",
        epilog=f"operations: {', '.join(names)}",
    )
    parser.add_argument("--quick", action="store_true", help="small problems and 5 repetitions, a few minutes")
    parser.add_argument("--operations", type=_operations, metavar="A,B", help="only these (or rows, like A/backward)")
    parser.add_argument("--shapes", type=_shapes, metavar="NxD,…", help="instead of the rows' own: 32x1e6,100x2^20")
    parser.add_argument("--dtypes", type=_dtypes, metavar="A,B", help="only these dtypes (with --shapes: in each)")
    parser.add_argument(
        "--repetitions", type=_positive, metavar="N", help="samples a contender (default: 11, quick: 5)"
    )
    parser.add_argument(
        "--patience", type=float, default=math.inf, metavar="S",
        help="no more samples, after three, of a contender that has used so many seconds (default: no limit)",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="the same on a GPU, against jnp and PyTorch there")
    parser.add_argument(
        "--curves", dest="parts", action="append_const", const="curves",
        help="only the bytes a second against the number of clients; today's JSON file keeps the rest",
    )  # fmt: skip
    parser.add_argument(
        "--instruction-sets", dest="parts", action="append_const", const="instruction_sets",
        help="only the main operations with the kernels of each instruction set; the same",
    )  # fmt: skip
    parser.add_argument(
        "--kept-memory", dest="parts", action="append_const", const="kept_memory",
        help="only the operations with large results where the C library keeps its memory; the same",
    )  # fmt: skip
    parser.add_argument("--build", action="store_true", help="time the build of a wheel from nothing, too")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that today's JSON file has")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--table", type=_report_file, metavar="FILE", help="print FILE as markdown; measure nothing")
    parser.add_argument(
        "--publish", type=_report_file, metavar="FILE",
        help="draw FILE and write it into docs/benchmarks_table.md and README.md; measure nothing",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.repetitions = options.repetitions or (5 if options.quick else 11)
    return options


def _operations(text: str) -> tuple[str, ...]:
    known = {name for row in ROWS for name in (row.name, row.operation)}
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, needs names out of: {', '.join(sorted(known))}")
    return chosen


def _dtypes(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    known = ("float32", "bfloat16", "float16")
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, needs names out of: {', '.join(known)}")
    return chosen


def _shapes(text: str) -> tuple[Problem, ...]:
    found = [re.fullmatch(r"(\d+)x(\d+(?:e\d+)?|2\^\d+)(?:/(\d+))?", part) for part in text.split(",")]
    if None in found:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs clients x parameters (/leaves), like 32x1e6,10x2^20/100")
    return tuple(Problem(int(m[1]), _size(m[2]), tree=_tree(m[3])) for m in found if m)


def _tree(leaves: str | None) -> str:
    return "" if leaves is None or int(leaves) < 2 else f"{int(leaves)} leaves"


def _size(text: str) -> int:
    return 2 ** int(text[2:]) if text.startswith("2^") else int(float(text))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a whole number from 1")
    return int(text)


def _report_file(text: str) -> Path:
    try:
        report.load(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
