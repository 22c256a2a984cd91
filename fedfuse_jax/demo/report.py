"""What the demo shows: a progress bar, a table, a picture and the time of the server step."""

import statistics
import time
from collections.abc import Callable, Iterator
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


def save_plot(history: History, title: str, output: Path) -> None:
    """Draws accuracy by round, one line per scenario, into a PNG file."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    for index, (name, outcomes) in enumerate(history.items()):
        accuracy = [outcome.accuracy for outcome in outcomes]
        marker = "o" if len(outcomes) == 1 else None  # one point makes no line
        axes.plot(
            range(1, len(accuracy) + 1),
            accuracy,
            label=f"{name} ({accuracy[-1]:.1%})",
            linewidth=2,
            marker=marker,
            **_line_style(index),
        )
    axes.axhline(CHANCE, color="#7f7f7f", linewidth=1, linestyle=":", label=f"chance ({CHANCE:.0%})")
    axes.set_title(title, loc="left")
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
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
