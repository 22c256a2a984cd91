"""What is shown of the measurements: JSON on disk, a table on screen, markdown for the documentation, a plot."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedfuse_jax as ff
from benchmarks import footprint, instruction_sets, kept_memory
from benchmarks.bounds import FAULT
from benchmarks.operations import FLOOR, OURS, PEERS, Problem
from benchmarks.systems import SYSTEMS

Report = dict[str, Any]

SCHEMA = 3
COLUMNS = ("operation", "clients x parameters", "ms", "cold", *(f"vs {peer}" for peer in PEERS), "of floor", "goals")
SYSTEM_COLUMNS = ("rule", "clients x parameters", "ms", *(f"vs {system}" for system in SYSTEMS))
TREE_COLUMNS = ("operation", "a tree", "ms", "time over one array's", "goal")
MISSED_COLUMNS = ("missed goals", "clients x parameters", "goal", "reached", "at the bound", "ms", "the bound, ms")
OUT_OF_REACH = "out of reach"
_SIGNS = {True: "met", False: "missed", None: "open"}
_COLORS_OF_SIGNS = {"met": "green", "missed": "red", OUT_OF_REACH: "cyan", "open": "yellow"}
# A goal that is missed by more than this share of it is missed by far.
FAR = 0.3


# --- On disk --------------------------------------------------------------------------------------------------


def save(report: Report, path: Path) -> None:
    """Writes the file whole or not at all: it is written after every row, and a run may be interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(draft, path)


def load(path: Path) -> Report:
    """Reads a report, of this schema only."""
    try:
        report = json.loads(path.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"got {path}, needs a benchmark report of schema {SCHEMA}")
    return report


# --- Cells ----------------------------------------------------------------------------------------------------


def _problem(row: Mapping[str, Any]) -> Problem:
    return Problem(row["clients"], row["parameters"], row["dtype"], row["tree"])


def _label(row: Mapping[str, Any]) -> str:
    return _problem(row).label + (", donated" if row["donated"] else "")


def _number(value: float) -> str:
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(row: Mapping[str, Any], name: str) -> str:
    if name in row["errors"]:
        return "wrong" if "disagrees" in row["errors"][name] else "fails"
    return f"{_number(row['ratios'][name])}x" if name in row["ratios"] else "-"


def sign(goal: Mapping[str, Any]) -> str:
    """What a goal's row says of it, in a word or three."""
    return OUT_OF_REACH if goal["out_of_reach"] else _SIGNS[goal["met"]]


def _unit(name: str) -> str:
    return "" if name == FLOOR else "x"


def goal_words(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each goal in words, and whether it is met; one that is out of reach with what the least time would reach."""
    words = []
    for name, goal in row["goals"].items():
        unit = _unit(name)
        stretch = "" if goal["stretch"] is None else f" ({goal['stretch']:g})"
        reached = "not measured" if goal["reached"] is None else f"{_number(goal['reached'])}{unit}"
        most = f", {_number(goal['reach'])}{unit} at the bound" if goal["out_of_reach"] else ""
        words.append((f"{name} {reached} of {goal['least']:.3g}{stretch}{unit}{most}", sign(goal)))
    return words


def goal_counts(report: Report) -> str:
    """How many goals of the rows were met and how many not, in a sentence; empty where there are none."""
    goals = [goal for row in report["rows"] for goal in row["goals"].values()]
    if not goals:
        return ""
    counts = Counter(map(sign, goals))
    far = sum(sign(goal) == "missed" and goal["reached"] < (1 - FAR) * goal["least"] for goal in goals)
    return (
        f"Of {len(goals)} goals for operations {counts['met']} are met, {counts['missed']} missed ({far} by more than "
        f"{FAR * 100:g} %), {counts[OUT_OF_REACH]} out of reach of any code on this machine in this run, and "
        f"{counts['open']} open."
    )


def _bound_words(bound: Mapping[str, Any] | None) -> str:
    if bound is None:
        return "-"
    parts = " + ".join(f"{part} {_number(seconds * 1e3)}" for part, seconds in bound["parts"].items())
    return parts if bound["holds"] else f"{parts} (unsure)"


def missed_cells(report: Report) -> list[list[str]]:
    """Every goal that is not met, beside what the least time would reach and what that time is made of."""
    return [
        [
            row["row"],
            _label(row),
            f"{name} {goal['least']:.3g}{_unit(name)}",
            f"{_number(goal['reached'])}{_unit(name)}",
            ("-" if goal["reach"] is None else f"{_number(goal['reach'])}x")
            + (f": {OUT_OF_REACH}" if goal["out_of_reach"] else ""),
            _number(row["contenders"][OURS]["seconds"] * 1e3),
            _bound_words(row["bound"]),
        ]
        for row in report["rows"]
        for name, goal in row["goals"].items()
        if goal["met"] is False
    ]


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, without its goals."""
    ours = row["contenders"].get(OURS)
    fraction = row["fraction_of_floor"]
    return [
        row["row"] + ("" if row["conclusive"] else " (inconclusive)"),
        _label(row),
        "wrong" if ours is None else _number(ours["seconds"] * 1e3),
        "-" if row["cold"] is None else f"{_number(row['cold'])}x",
        *(_ratio(row, peer) for peer in PEERS),
        "-" if fraction is None else f"{fraction:.2f}" + (" (probe fault)" if fraction > FAULT else ""),
    ]


def _headline(report: Report) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    kernels = machine["kernels"]["cuda" if report["platform"] == "gpu" else "cpu"]
    level = kernels.get("instruction_set", "loaded")
    native = f"kernels: {level}" if kernels["loaded"] else "no compiled kernels: jax.numpy definitions"
    return f"{machine['device']}, {machine['cores']} cores, {versions}; {native}; {report['date']}"


def footprint_words(report: Report) -> list[tuple[str, bool | None]]:
    """What the package weighs and what its build takes, in words, and whether the goal is met."""
    most = f"goal: under {footprint.MOST_BYTES / 1e6:g} MB"
    words: list[tuple[str, bool | None]] = [
        (f"{name} module {size / 1e6:.2g} MB ({most})", size < footprint.MOST_BYTES)
        for name, size in report["module_bytes"].items()
    ]
    if build := report["build"]:
        seconds, limit = build["seconds"], footprint.MOST_SECONDS
        words += [
            (f"wheel {build['wheel_bytes'] / 1e6:.2g} MB ({most})", build["wheel_bytes"] < footprint.MOST_BYTES),
            (f"built from nothing in {seconds:.0f} s by {build['jobs']} jobs (goal: under {limit} s)", seconds < limit),
        ]
    return words


# --- Markdown -------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def overhead_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """The table of what a call costs, in microseconds."""
    names = list(dict.fromkeys(name for row in report["overhead"] for name in row["microseconds"]))
    rows = [
        [row["row"], *(f"{row['microseconds'][name]:.0f}" if name in row["microseconds"] else "-" for name in names)]
        for row in report["overhead"]
    ]
    return ["one call, microseconds", *names], rows


def tree_cells(report: Report) -> list[list[str]]:
    """What a tree of many leaves costs beside one array."""
    rows = []
    for row in report["rows"]:
        if "one array" in row["ratios"]:
            goal = row["goals"].get("one array")
            words = f"at most {1 / goal['least']:.3g}x: {sign(goal)}" if goal else "-"
            rows.append([*cells(row)[:3], f"{1 / row['ratios']['one array']:.2f}x", words])
    return rows


def is_of_a_system(row: Mapping[str, Any]) -> bool:
    """Whether a row compares with another system, by that system's conventions."""
    return any(row["row"].endswith(f"/as in {system}") for system in SYSTEMS)


def left_out_words(report: Report) -> list[str]:
    """Who was not measured where, and why."""
    return [
        f"{name} of {row['row']}, {_label(row)} ({reason})"
        for row in report["rows"]
        for name, reason in row["left_out"].items()
    ]


def system_cells(report: Report) -> list[list[str]]:
    """Other systems' rules, beside ours that mean the same."""
    return [
        [*cells(row)[:3], *(_ratio(row, system) for system in SYSTEMS)] for row in report["rows"] if is_of_a_system(row)
    ]


CURVE_CLIENTS = (4, 10, 32, 100, 128, 129, 256, 1000)  # of those measured: what a table has room for


def lines_of_curves(report: Report) -> dict[str, list[Mapping[str, Any]]]:
    """The points of each line, by its name."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in sorted(report["curves"], key=lambda point: point["clients"]):
        name = f"{point['row']} {point['dtype']}{', d a power of two' if point['aligned'] else ''}"
        lines.setdefault(name, []).append(point)
    return lines


def curve_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """What an operation moves a second over what the probe read, for some numbers of clients."""
    shown = [clients for clients in CURVE_CLIENTS if any(point["clients"] == clients for point in report["curves"])]
    rows = []
    for name, points in lines_of_curves(report).items():
        fractions = {point["clients"]: f"{point['fraction_of_roof']:.2f}" for point in points}
        rows.append([name, *(fractions.get(clients, "-") for clients in shown)])
    return ["of the memory's rate, by clients", *map(str, shown)], rows


def instruction_set_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """What the main operations cost with the kernels of older processors."""
    compared = instruction_sets.compared(report["instruction_sets"])
    names = list(dict.fromkeys(name for row in compared for name in row["seconds"]))
    older = [name for name in names if name != instruction_sets.REFERENCE]
    rows = []
    for row in compared:
        reference = row["seconds"].get(instruction_sets.REFERENCE)
        ratios = [f"{_number(row['ratios'][name])}x" if name in row["ratios"] else "-" for name in older]
        goals = [f"{name} at most {goal['most']:g}x: {_SIGNS[goal['met']]}" for name, goal in row["goals"].items()]
        milliseconds = "-" if reference is None else _number(reference * 1e3)
        rows.append([row["row"], _problem(row).label, milliseconds, *ratios, ", ".join(goals) or "-"])
    first = f"{instruction_sets.REFERENCE}, ms"
    return [
        "by instruction set",
        "clients x parameters",
        first,
        *(f"{name}, time over it" for name in older),
        "goals",
    ], rows


def kept_memory_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """What large results cost where new memory is cleared for each, and where it is kept."""
    kinds, rows = kept_memory.KINDS, []
    for row in kept_memory.compared(report["kept_memory"]):
        milliseconds = [
            _number(row["seconds"][form][kind] * 1e3) if kind in row["seconds"][form] else "-"
            for form in kept_memory.FORMS
            for kind in kinds
        ]
        over = row["over_forward"]
        signs = {kind: f": {_SIGNS[goal['met']]}" for kind, goal in row["goals"].items()}
        ratios = [f"{_number(over[kind])}x{signs.get(kind, '')}" if kind in over else "-" for kind in kinds]
        rows.append([row["row"], _problem(row).label, *milliseconds, *ratios])
    forms = ("ms", f"{kept_memory.BEST}, ms")
    goal = f"over forward (at most {kept_memory.MOST:g}x)"
    return [
        "by memory",
        "clients x parameters",
        *(f"{name}, {kind}" for name in (*forms, goal) for kind in kinds),
    ], rows


def markdown(report: Report) -> str:
    """The tables that README and docs embed, so that no figure is ever typed."""
    rows = [
        [*cells(row), ", ".join(f"{words}: {said}" for words, said in goal_words(row)) or "-"]
        for row in report["rows"]
        if not row["tree"] and not is_of_a_system(row)
    ]
    patience = report["options"]["patience"]
    fewer = (
        f"; three of a contender that had then used {patience:g} s, two where one call takes as long"
        if patience
        else ""
    )
    weighed = "; ".join(f"{words}: {_SIGNS[met]}" for words, met in footprint_words(report))
    parts = [
        f"*{_headline(report)}*",
        *([f"{weighed}."] if weighed else []),
        "Ratios are a contender's time over ours in the same run (above 1: we are faster); *cold* is our first call\n"
        "after somebody else's turn over the calls that follow it, of which *ms* and all ratios speak; the floor is\n"
        "the time to move every input and every result once at the rate a probe reached between the calls. A goal is\n"
        "called *out of reach* if it would be missed in the least time, too, that probes allow (the bound). Medians of "
        f"{report['options']['repetitions']} interleaved repetitions{fewer}.",
        *([counts] if (counts := goal_counts(report)) else []),
        *([markdown_table(COLUMNS, rows)] if rows else []),
    ]
    if others := system_cells(report):
        parts.append(markdown_table(SYSTEM_COLUMNS, others))
    if trees := tree_cells(report):
        parts.append(markdown_table(TREE_COLUMNS, trees))
    if missed := missed_cells(report):
        parts.append(markdown_table(MISSED_COLUMNS, missed))
    if report["curves"]:
        parts.append(markdown_table(*curve_cells(report)))
    if report["instruction_sets"]:
        parts.append(markdown_table(*instruction_set_cells(report)))
    if report["kept_memory"]:
        parts.append(markdown_table(*kept_memory_cells(report)))
    if report["overhead"]:
        parts.append(markdown_table(*overhead_cells(report)))
    if left_out := left_out_words(report):
        parts.append("Left out: " + "; ".join(left_out) + ".")
    parts.extend(f"Skipped: {line}." for line in report["skipped"])
    return "\n\n".join(parts) + "\n"


BEGIN, END = "<!-- benchmarks:begin -->\n", "<!-- benchmarks:end -->"


def with_rows(page: str, table: str) -> str:
    """``page`` with the rows of the first table that it shows, between two marks, as they are in ``table``."""

    def key(line: str) -> tuple[str, str]:
        name, problem = (cell.strip() for cell in line.split("|")[1:3])
        return name.removesuffix(" (inconclusive)"), problem.removesuffix(", donated")

    before, _, rest = page.partition(BEGIN)
    shown, _, after = rest.partition(END)
    headline, *generated = [line for line in table.splitlines() if line.startswith(("|", "*"))]
    known: dict[tuple[str, str], str] = {}
    for line in generated:
        known.setdefault(key(line), line)
    wanted = [key(line) for line in shown.splitlines() if line.startswith("|")]
    if missing := [" ".join(row) for row in wanted[2:] if row not in known]:
        raise ValueError(f"shows {', '.join(missing)}, which this report has not measured")
    rows = [*generated[:2], *(known[row] for row in wanted[2:])]
    return before + BEGIN + "\n".join([headline, "", *rows, ""]) + END + after


def picture_links(pictures: Sequence[Path], folder: Path) -> str:
    """The pictures in Markdown, for a page in ``folder``."""
    links = [f"![{picture.stem}]({os.path.relpath(picture, folder)})" for picture in pictures]
    return "".join(f"\n{link}\n" for link in links)


# --- Screen ---------------------------------------------------------------------------------------------------


def show(report: Report) -> None:
    """The tables on screen, with rich or without."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(markdown(report))
        return
    # Without a terminal rich would cut the table to 80 columns; a log has room.
    console = Console() if os.isatty(1) else Console(width=200)
    table = Table(title=f"{OURS} against others (ratio of times) and against the memory", caption=_headline(report))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("operation", "goals", COLUMNS[1]) else "right")
    for row in report["rows"]:
        if row["tree"] or is_of_a_system(row):
            continue
        goals = Text("\n").join(Text(words, _COLORS_OF_SIGNS[said]) for words, said in goal_words(row))
        style = None if row["conclusive"] else "dim italic"
        table.add_row(*cells(row), goals, style=style)
    if counts := goal_counts(report):
        console.print(counts, markup=False)
    if report["rows"]:
        console.print(table)
    if others := system_cells(report):
        _show_plain(console, Table(title="Other systems' rules"), SYSTEM_COLUMNS, others)
    if trees := tree_cells(report):
        _show_plain(console, Table(title="A tree of many leaves"), TREE_COLUMNS, trees)
    if missed := missed_cells(report):
        _show_plain(console, Table(title="Missed goals, and the least time there is"), MISSED_COLUMNS, missed)
    if report["curves"]:
        _show_plain(console, Table(title="Bytes moved a second over what a probe reads"), *curve_cells(report))
    if report["instruction_sets"]:
        _show_plain(console, Table(title="The kernels of each instruction set"), *instruction_set_cells(report))
    if report["kept_memory"]:
        _show_plain(console, Table(title="Memory that is kept"), *kept_memory_cells(report))
    if report["overhead"]:
        _show_plain(console, Table(title="The price of a call"), *overhead_cells(report))
    for words, met in footprint_words(report):
        console.print(words, style=_COLORS_OF_SIGNS[_SIGNS[met]], markup=False)
    for words in left_out_words(report):
        console.print(f"Left out: {words}", style="dim", markup=False)
    for row in report["rows"]:
        for name, error in row["errors"].items():
            console.print(f"{row['row']}, {_label(row)}: {name} {error}", style="red", markup=False)


def _show_plain(console: Any, table: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for column in header:
        table.add_column(column, justify="left" if column == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


# --- Plot -----------------------------------------------------------------------------------------------------

_COLORS = {"jnp natural": "#9db4c0", "jnp best": "#2f6690", "numpy": "#e0a458", "torch": "#c8553d"}


_FAMILIES = {
    "linear": "sums",
    "norms": "sums",
    "streaming": "sums",
    "order_statistics": "order statistics",
    "distances": "robust rules",
    "selection": "robust rules",
    "mixing": "robust rules",
    "centers": "robust rules",
    "private": "private sums",
    "server": "server optimizers",
    "sparse": "compressed updates",
    "quantized": "compressed updates",
    "rotation": "compressed updates",
}


def family(operation: str) -> str:
    """Which picture an operation is in: by the module that it lives in."""
    return _FAMILIES[getattr(ff, operation).__module__.rpartition(".")[2]]


def plots(report: Report, path: Path) -> list[Path]:
    """Draws what there is to draw, beside the file of the results; which pictures those are."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        if set(PEERS) & set(row["ratios"]):
            families.setdefault(family(row["operation"]), []).append(row)
    for name, rows in families.items():
        drawn.append(path.with_name(f"{path.stem}-{name.replace(' ', '-')}.png"))
        _plot_ratios(report, name, rows, drawn[-1])
    if report["curves"]:
        drawn.append(path.with_name(f"{path.stem}-roofline.png"))
        _plot_curves(report, drawn[-1])
    return drawn


def _entitle(figure: Any, title: str, report: Report) -> None:
    """A title as wide as the figure has room for: an inch holds fourteen letters of that size."""
    machine = textwrap.wrap(_headline(report), int(14 * figure.get_size_inches()[0]))
    figure.suptitle("\n".join([f"FedFuse-JAX: {title}", *machine]), fontsize=9)


def _plot_curves(report: Report, path: Path) -> None:
    """Bytes a second against the number of clients, a line an operation, under the probe's rate as the roof."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    lines = lines_of_curves(report)
    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    roof = {point["clients"]: point["roof_bytes_per_second"] / 1e9 for point in report["curves"]}
    counts = sorted(roof)
    axes.plot(counts, [roof[clients] for clients in counts], color="black", linestyle="--", label="probe: the roof")
    colors: dict[str, Any] = {}
    for name, points in lines.items():
        kernel = f"{points[0]['row']} {points[0]['dtype']}"
        style = ":" if points[0]["aligned"] else "-"
        (line,) = axes.plot(
            [point["clients"] for point in points], [point["bytes_per_second"] / 1e9 for point in points], style,
            marker=".", markersize=4, linewidth=1.3, label=name, color=colors.get(kernel),
        )  # fmt: skip
        colors.setdefault(kernel, line.get_color())
    axes.set_xscale("log")
    axes.set_xticks([2**power for power in range(1, 11)])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0)
    axes.set_xlabel("clients, logarithmic; the updates have the same bytes everywhere")
    axes.set_ylabel("GB/s, every byte in and out")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    _entitle(figure, "bytes moved a second", report)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_ratios(report: Report, title: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the ratios to each peer and, beside them, of the fraction of the floor; goals as marks."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    peers = [peer for peer in PEERS if any(peer in row["ratios"] for row in rows)]
    size = 13, 1.8 + (0.14 * len(peers) + 0.06) * max(len(rows), 3)
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, width_ratios=(3, 1.3), figsize=size, layout="constrained"
    )
    height = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        for index, row in enumerate(rows):
            if peer not in row["ratios"]:
                continue
            ratio, place = row["ratios"][peer], index - 0.4 + (number + 0.5) * height
            # On a logarithmic axis bars grow from 1, the break-even: to the right we are faster, to the left slower.
            left.barh(place, ratio - 1, height * 0.9, left=1, color=_COLORS[peer], label=peer)
            end = ratio
            if peer in row["goals"]:
                least = row["goals"][peer]["least"]
                left.plot([least, least], [place - height / 2, place + height / 2], color="black", linewidth=1.4)
                end = least if ratio <= least < 1.5 * ratio else ratio  # clear of the mark
            beyond = {"ha": "left", "xytext": (3, 0)} if end >= 1 else {"ha": "right", "xytext": (-3, 0)}
            left.annotate(
                f"{_number(ratio)}x", (end, place), textcoords="offset points", va="center", fontsize=7, **beyond
            )
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.margins(x=0.12)
    left.set_xlabel("time of the other over ours, logarithmic; black marks: goals")
    left.set_yticks(range(len(rows)), ["\n".join(cells(row)[:2]) for row in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.4, -0.6)
    handles = {label: handle for handle, label in zip(*left.get_legend_handles_labels(), strict=True)}
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(handles), "frameon": False}
    left.legend(handles.values(), handles.keys(), **place)

    fractions = [row["fraction_of_floor"] for row in rows]
    right.barh(range(len(rows)), fractions, 0.5, color="#5a8f69")
    for index, row in enumerate(rows):
        end = fractions[index]
        if FLOOR in row["goals"]:
            least = row["goals"][FLOOR]["least"]
            right.plot([least, least], [index - 0.3, index + 0.3], color="black", linewidth=1.4)
            end = least if end <= least < end + 0.15 else end
        text = f"{fractions[index]:.2f}"
        right.annotate(text, (end, index), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlim(0, max(1.15, 1.1 * max(fractions)))
    right.set_xlabel("fraction of the floor")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    _entitle(figure, title, report)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
