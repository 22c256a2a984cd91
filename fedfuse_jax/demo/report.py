"""What the demo shows: a progress bar, a table, a picture and the time of the server step."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # draws files, needs no screen

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedfuse_jax import trimmed_mean
from fedfuse_jax.demo.attacks import default_num_bad
from fedfuse_jax.demo.simulation import NUM_CLASSES, Outcome

CHANCE = 1 / NUM_CLASSES
History = dict[str, list[Outcome]]  # by the scenario's name, one outcome a round


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, float], None]]:
    """Shows a bar of `total` rounds on standard error while the block runs.

    Yields:
        `advance(scenario_name, accuracy)`, to be called after every round.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with progress:
        task = progress.add_task(f"{'training':22}", total=total)

        def advance(scenario_name: str, accuracy: float) -> None:
            progress.update(task, advance=1, description=f"{scenario_name:15} {accuracy:6.1%}")

        yield advance
        progress.update(task, description=f"{'training':22}")


def print_table(history: History, title: str) -> None:
    """Prints the last accuracy of every scenario and how far it is below the first one's."""
    table = Table()
    table.add_column("Rule")
    table.add_column("Test accuracy", justify="right")
    table.add_column("Lost to the attack", justify="right")
    unharmed, *attacked = history.items()
    best = unharmed[1][-1].accuracy
    table.add_row(unharmed[0], f"{best:.1%}", "")
    for name, outcomes in attacked:
        last = outcomes[-1]
        mark = "" if last.finite else " *"
        table.add_row(name + mark, f"{last.accuracy:.1%}", f"{100 * (best - last.accuracy):.1f} points")
    print(title)
    Console().print(table)
    if not all(outcomes[-1].finite for _, outcomes in attacked):
        print("* The model is no longer finite; NaN for an answer reads as digit 0.")


def print_privacy_table(history: History, epsilons: Mapping[str, Sequence[float]], title: str) -> None:
    """Prints accuracy, and what has been spent of privacy, after up to ten of the rounds."""
    table = Table()
    table.add_column("Round", justify="right")
    for name in history:
        table.add_column(name, justify="right")
        if name in epsilons:
            table.add_column("epsilon", justify="right")
    rounds = len(next(iter(history.values())))
    for index in sorted({round(rounds * (step + 1) / 10) or 1 for step in range(10)}):
        cells = []
        for name, outcomes in history.items():
            cells.append(f"{outcomes[index - 1].accuracy:.1%}")
            if name in epsilons:
                cells.append(f"{epsilons[name][index - 1]:.2f}")
        table.add_row(str(index), *cells)
    print(title)
    Console().print(table)


def print_compression_table(history: History, num_bytes: Mapping[str, int], num_clients: int, title: str) -> None:
    """Prints what every way of sending costs and how far its last accuracy is below the first one's."""
    table = Table()
    for column in ("Sent", "Bytes", "Megabytes", "Ratio", "Test accuracy", "Lost"):
        table.add_column(column, justify="left" if column == "Sent" else "right")
    first = next(iter(history))
    for name, outcomes in history.items():
        last, best = outcomes[-1].accuracy, history[first][-1].accuracy
        table.add_row(
            name,
            f"{num_bytes[name]:,}",
            f"{_megabytes(num_bytes[name], num_clients, len(outcomes))[-1]:.2f}",
            f"{num_bytes[first] / num_bytes[name]:.1f}",
            f"{last:.1%}",
            "" if name == first else f"{100 * (best - last):.1f} points",
        )
    print(title)
    Console().print(table)
    print("Bytes are those of one client in one round, megabytes those of all clients and rounds.")


def _megabytes(num_bytes: int, num_clients: int, rounds: int) -> list[float]:
    """What all clients have sent together after each round."""
    return [num_bytes * num_clients * (index + 1) / 1e6 for index in range(rounds)]


def save_plot(history: History, title: str, output: Path) -> None:
    """Draws accuracy by round, one line per scenario, into a PNG file."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    _draw_accuracy(axes, history, {name: range(1, len(outcomes) + 1) for name, outcomes in history.items()})
    axes.set_title(title, loc="left")
    _number_rounds(axes)
    _save(figure, output)


def save_privacy_plot(
    history: History, epsilons: Mapping[str, Sequence[float]], title: str, spent: str, output: Path
) -> None:
    """Draws accuracy by round and, below, what has been spent of privacy by then, into a PNG file."""
    figure, (above, below) = plt.subplots(2, figsize=(8, 7), dpi=150, layout="constrained", sharex=True)
    _draw_accuracy(above, history, {name: range(1, len(outcomes) + 1) for name, outcomes in history.items()})
    above.set_title(title, loc="left")
    for index, name in enumerate(history):
        if name in epsilons:
            _draw_line(below, range(1, len(epsilons[name]) + 1), epsilons[name], index)
    below.set_ylabel(spent)
    below.set_ylim(bottom=0)
    _tidy(below)
    _number_rounds(below)
    _save(figure, output)


def save_compression_plot(
    history: History, num_bytes: Mapping[str, int], num_clients: int, title: str, output: Path
) -> None:
    """Draws accuracy by what all clients have sent together, into a PNG file."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    sent = {name: _megabytes(num_bytes[name], num_clients, len(outcomes)) for name, outcomes in history.items()}
    _draw_accuracy(axes, history, sent)
    axes.set_title(title, loc="left")
    axes.set_xscale("log")
    axes.set_xlabel("megabytes sent by all clients together (logarithmic)")
    axes.xaxis.set_major_formatter("{x:g}")
    _save(figure, output)


def _draw_accuracy(axes: Any, history: History, positions: Mapping[str, Sequence[float]]) -> None:
    for index, (name, outcomes) in enumerate(history.items()):
        accuracy = [outcome.accuracy for outcome in outcomes]
        _draw_line(axes, positions[name], accuracy, index, f"{name} ({accuracy[-1]:.1%})")
    axes.axhline(CHANCE, color="#7f7f7f", linewidth=1, linestyle=":", label=f"chance ({CHANCE:.0%})")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _tidy(axes)


def _draw_line(axes: Any, x: Sequence[float], y: Sequence[float], index: int, label: str | None = None) -> None:
    marker = "o" if len(y) == 1 else None  # one point makes no line
    axes.plot(x, y, label=label, linewidth=2, marker=marker, **_line_style(index))


def _number_rounds(axes: Any) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, output: Path) -> None:
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(output)
    plt.close(figure)


def _line_style(index: int) -> dict[str, Any]:
    """Okabe and Ito's colours, which colour-blind readers tell apart; grey for what is only context."""
    if index == 0:
        return {"color": "#7f7f7f", "linestyle": (0, (5, 2))}
    colors = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    turn, color = divmod(index - 1, len(colors))
    return {"color": colors[color], "linestyle": ("-", "--", ":")[turn % 3]}


def server_step_line(model: fedjax.Model, num_clients: int, repeats: int = 30) -> str:
    """Times the trimmed mean of `num_clients` updates of this model against `jax.numpy`.

    The two take turns, so that whatever else the machine does falls on both alike, and each is
    given by the median of its times.

    Args:
        model: The model; the shapes and dtypes of its parameters alone matter.
        num_clients: How many updates are stacked.
        repeats: How often each is timed.

    Returns:
        A sentence with n, d, both times and their ratio.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.PRNGKey(0)))
    keys = jax.random.split(jax.random.PRNGKey(0), len(leaves))
    updates = [
        jax.random.normal(key, (num_clients, *leaf.shape), leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    stacked = jax.tree.unflatten(structure, updates)
    trim_count = default_num_bad(num_clients)

    def natural(leaf: jax.Array) -> jax.Array:
        return jnp.sort(leaf, axis=0)[trim_count : num_clients - trim_count].mean(axis=0)

    ours = jax.jit(lambda updates: trimmed_mean(updates, trim_count))
    theirs = jax.jit(lambda updates: jax.tree.map(natural, updates))
    times: dict[Any, list[float]] = {ours: [], theirs: []}
    for step in times:
        jax.block_until_ready(step(stacked))  # compiles
    for _ in range(repeats):
        for step, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(step(stacked))
            seconds.append(time.perf_counter() - start)
    our_time, their_time = (statistics.median(times[step]) for step in (ours, theirs))
    num_params = sum(leaf.size for leaf in leaves)
    return (
        f"Server step, trimmed mean of n = {num_clients} updates of d = {num_params} numbers on "
        f"{jax.devices()[0].platform}: {1e3 * our_time:.3f} ms; as jitted jax.numpy (sort, slice, "
        f"mean): {1e3 * their_time:.3f} ms; {their_time / our_time:.1f} times as fast."
    )
