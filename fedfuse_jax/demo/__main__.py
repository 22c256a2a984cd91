"""The command line of the demo: `python -m fedfuse_jax.demo --help`."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedfuse_jax.demo.attacks import ATTACKS

# What the demo needs beyond fedfuse_jax: the module to look for, the package to install.
REQUIREMENTS = {
    "fedjax": "fedjax",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: The command line without the program's name; `None`: this process's own.
    """
    options = _parse(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not importlib.util.find_spec(module)]
    if missing:
        sys.exit(f'fedfuse_jax.demo: {", ".join(missing)} not installed; run: pip install "fedfuse-jax[demo]"')

    # Only now, so that help, bad options and the line above need none of those packages.
    from fedfuse_jax.demo import report, simulation

    federation = simulation.make_federation(options.clients, options.seed)
    model = simulation.make_model()
    scenarios = simulation.scenarios(options.attack)
    num_bad = len(federation.bad_clients)
    headline = f"{num_bad} of {options.clients} clients {ATTACKS[options.attack].description} ({options.attack})"

    history: report.History = {}
    with report.progress_bar(options.rounds * len(scenarios)) as advance:
        for scenario in scenarios:
            outcomes = history[scenario.name] = []
            for outcome in simulation.train(federation, model, scenario, options.rounds):
                outcomes.append(outcome)
                advance(scenario.name, outcome.accuracy)

    report.print_table(history, f"{headline}; {options.rounds} rounds, seed {options.seed}, chance 10%")
    report.save_plot(history, headline, options.output)
    print(f"Accuracy by round: {options.output}")
    print(report.server_step_line(model, options.clients))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    attacks = "\n".join(f"  {name:12}bad clients {row.description}" for name, row in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fedfuse_jax.demo",
        description=(
            "A FedJAX server learns handwritten digits from clients that hold few kinds of digit\n"
            "each (Dirichlet, alpha 0.3). A quarter of them is bad. How do the mean, the median\n"
            "and the trimmed mean (a quarter at each end) of their updates fare?"
        ),
        epilog=f"attacks:\n{attacks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--attack",
        choices=ATTACKS,
        default="scaled",
        help="what the bad clients do (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_whole_number(1, 10_000),
        default=50,
        metavar="N",
        help="rounds of training for each rule (default: %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=_whole_number(4, 200),
        default=40,
        metavar="N",
        help="clients, good and bad, 4 to 200 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_whole_number(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="same seed, same numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=_writable_png,
        default="fedfuse_demo.png",
        metavar="PNG",
        help="where to draw accuracy by round (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}, needs a whole number from {least} to {most}")
        return number

    return parse


def _writable_png(text: str) -> Path:
    """Refuses, before a minute of training, a file that could not be written after it."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a file name that ends in .png")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, which cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


if __name__ == "__main__":
    main()
