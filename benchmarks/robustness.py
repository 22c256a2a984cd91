"""How well the rules withstand attacks: ``python -m benchmarks.robustness --help``.

The federation is the demo's (``fedfuse_jax.demo``): handwritten digits, dealt unevenly, trained through the FedJAX
adapter. Every rule meets every attack, with every share of bad clients; what counts is the accuracy at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import machine
from benchmarks.report import markdown_table, save
from fedfuse_jax.demo.attacks import ATTACKS, NO_ATTACK
from fedfuse_jax.demo.options import RULE_NAMES, rule, whole_number
from fedfuse_jax.demo.rules import RULES

DEFAULT_OUTPUT = Path(__file__).parent / "results"
SCHEMA = 1
NOBODY = "none"  # the column without bad clients
NEEDED = {"fedjax": "fedjax", "sklearn": "scikit-learn"}  # the module, the package that has it

Report = dict[str, Any]


class Run(NamedTuple):
    """One training: a rule, what the bad clients do, and how many of them there are."""

    rule: str
    attack: str
    num_bad: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains under every rule and attack, and shows how accurate the models are."""
    options = _parse(arguments)
    if options.table:
        print(markdown(load(options.table)), end="")
        return
    if missing := [package for module, package in NEEDED.items() if not machine.is_importable(module)]:
        sys.exit(f'benchmarks.robustness: {", ".join(missing)} not installed; run: pip install "fedfuse-jax[demo]"')
    jax.config.update("jax_platforms", "cpu")
    result = train_all(options)
    show(result)
    path = output_path(options.output, result)
    print(f"Results: {path}")
    if machine.is_importable("matplotlib"):
        plot(result, path.with_suffix(".png"))
        print(f"Heat map: {path.with_suffix('.png')}")


def train_all(options: argparse.Namespace) -> Report:
    """Trains as the options ask for, and saves after every run."""
    from fedfuse_jax.demo import simulation  # only now, so that help and tables need no FedJAX

    result: Report = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "options": {name: getattr(options, name) for name in ("quick", "clients", "rounds", "seed", "percent")},
        "rules": options.rules,
        "attacks": options.attacks,
        "rows": [],
    }
    path = output_path(options.output, result)
    model = simulation.make_model()
    for run in _with_progress(runs(options)):
        federation = simulation.make_federation(options.clients, options.seed, run.num_bad)
        attack = NO_ATTACK if run.attack == NOBODY else ATTACKS[run.attack]
        started = time.perf_counter()
        outcomes = list(simulation.train(federation, model, simulation.Scenario("", run.rule, attack), options.rounds))
        result["rows"].append(
            {
                "rule": run.rule,
                "attack": run.attack,
                "num_bad": run.num_bad,
                "accuracy": [round(outcome.accuracy, 4) for outcome in outcomes],
                "finite": outcomes[-1].finite,
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        save(result, path)
    return result


def runs(options: argparse.Namespace) -> list[Run]:
    """Every training that the options ask for; a rule that there are too few clients for is left out."""
    found = []
    for percent in options.percent:
        num_bad = options.clients * percent // 100
        for name in options.rules:
            if RULES[name].least_clients(num_bad) <= options.clients:
                # The rule expects as many bad clients in the column without an attack: that is what caution costs.
                found += [Run(name, attack, num_bad) for attack in (NOBODY, *options.attacks)]
    return found


def output_path(folder: Path, result: Report) -> Path:
    """``<date>-robustness.json``; a quick run never takes the place of a real one."""
    return folder / f"{result['date']}-robustness{'-quick' if result['options']['quick'] else ''}.json"


def load(path: Path) -> Report:
    """Reads a report, of this schema only."""
    try:
        report = json.loads(path.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or "attacks" not in report:
        raise ValueError(f"got {path}, needs a report of python -m benchmarks.robustness, schema {SCHEMA}")
    return report


# --- Tables -----------------------------------------------------------------------------------------------------


def columns(result: Report) -> list[str]:
    """The attacks, and before them the column without one."""
    return [NOBODY, *result["attacks"]]


def tables(result: Report) -> Iterator[tuple[str, list[list[float | None]]]]:
    """For every number of bad clients a title and, by rule and column, the accuracy at the end."""
    clients, rounds = (result["options"][name] for name in ("clients", "rounds"))
    last = {(row["rule"], row["attack"], row["num_bad"]): row["accuracy"][-1] for row in result["rows"]}
    for percent in result["options"]["percent"]:
        num_bad = clients * percent // 100
        title = f"{num_bad} of {clients} clients bad, {rounds} rounds"
        yield title, [[last.get((name, column, num_bad)) for column in columns(result)] for name in result["rules"]]


def _cell(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.0f}"


def markdown(result: Report) -> str:
    """The tables that the documentation embeds, so that no figure is ever typed."""
    parts = []
    for title, table in tables(result):
        rows = [[name, *map(_cell, line)] for name, line in zip(result["rules"], table, strict=True)]
        parts += [f"*{title}: accuracy in % at the end*", markdown_table(["rule", *columns(result)], rows)]
    versions = result["machine"]["versions"]
    made = ", ".join(f"{name} {versions[name]}" for name in ("fedfuse-jax", "jax") if versions.get(name))
    seconds = sum(row["seconds"] for row in result["rows"])
    parts.append(
        f"Seed {result['options']['seed']}; {made}; {result['date']}; {len(result['rows'])} runs in {seconds / 60:.0f} "
        "minutes of training. A dash: too few clients for the rule."
    )
    return "\n\n".join(parts) + "\n"


def show(result: Report) -> None:
    """The tables on screen, with rich or without."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(result))
        return
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for title, accuracies in tables(result):
        table = Table(title=f"{title}: accuracy in %")
        for column in ("rule", *columns(result)):
            table.add_column(column, justify="left" if column == "rule" else "right")
        for name, line in zip(result["rules"], accuracies, strict=True):
            table.add_row(name, *map(_cell, line))
        console.print(table)


def plot(result: Report, path: Path) -> None:
    """A heat map of accuracies, one panel for every number of bad clients."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    panels = list(tables(result))
    width, height = 2.4 + 0.62 * len(columns(result)) * len(panels), 1.4 + 0.42 * len(result["rules"])
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, height), squeeze=False, layout="constrained")
    for number, (axis, (title, table)) in enumerate(zip(axes[0], panels, strict=True)):
        values = np.array([[np.nan if value is None else 100 * value for value in line] for line in table])
        colors = pyplot.get_cmap("viridis").with_extremes(bad="#eeeeee")
        image = axis.imshow(np.ma.masked_invalid(values), vmin=0, vmax=100, cmap=colors, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            shade = "black" if np.isnan(value) or value > 60 else "white"
            axis.text(column, row, _cell(table[row][column]), ha="center", va="center", fontsize=8, color=shade)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns(result))), columns(result), rotation=40, ha="right", fontsize=9)
        axis.set_yticks(range(len(table)), result["rules"] if number == 0 else [""] * len(table), fontsize=9)
        axis.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="test accuracy, %", shrink=0.8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- Options ----------------------------------------------------------------------------------------------------


def _with_progress(todo: Sequence[Run]) -> Iterator[Run]:
    started = time.monotonic()
    for number, run in enumerate(todo, 1):
        print(
            f"[{number}/{len(todo)}, {time.monotonic() - started:.0f} s] {run.rule}, {run.attack}, {run.num_bad} bad",
            file=sys.stderr,
            flush=True,
        )
        yield run


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description="Trains on handwritten digits with FedJAX, every rule under every attack, for several shares of "
        "bad clients. Writes JSON and a heat map, shows a table.",
        epilog=f"rules: {RULE_NAMES}; attacks: {', '.join(ATTACKS)}",
    )
    parser.add_argument("--quick", action="store_true", help="8 clients, 2 rounds, one share: to see that it runs")
    parser.add_argument("--rules", type=rule, nargs="+", metavar="RULE", help="default: all")
    parser.add_argument("--attacks", choices=ATTACKS, nargs="+", metavar="ATTACK", help="default: all")
    parser.add_argument(
        "--percent", type=whole_number(1, 49), nargs="+", metavar="N", help="of clients that are bad (default: 10 20)"
    )
    parser.add_argument("--clients", type=whole_number(4, 200), metavar="N", help="good and bad (default: 20)")
    parser.add_argument("--rounds", type=whole_number(1, 10_000), metavar="N", help="of training (default: 25)")
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--table", type=_report_file, metavar="FILE", help="print FILE as markdown; train nothing")
    options = parser.parse_args(arguments)
    options.rules = list(options.rules or RULES)
    options.attacks = list(options.attacks or ATTACKS)
    options.percent = options.percent or ([25] if options.quick else [10, 20])
    options.clients = options.clients or (8 if options.quick else 20)
    options.rounds = options.rounds or (2 if options.quick else 25)
    if few := [percent for percent in options.percent if options.clients * percent < 100]:
        parser.error(f"{few[0]} percent of {options.clients} clients is nobody")
    return options


def _report_file(text: str) -> Path:
    try:
        load(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


if __name__ == "__main__":
    main()
