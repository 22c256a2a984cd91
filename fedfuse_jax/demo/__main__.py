"""The command line of the demo: `python -m fedfuse_jax.demo --help`."""

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedfuse_jax.demo import privacy
from fedfuse_jax.demo.attacks import ATTACKS, default_num_bad
from fedfuse_jax.demo.compression import COMPRESSIONS, UNCOMPRESSED
from fedfuse_jax.demo.options import rule, whole_number, writable_png
from fedfuse_jax.demo.rules import DEFAULT_RULES, RULES

DEFAULT_ATTACK, DEFAULT_CLIENTS = "scaled", 40

# What the demo needs beyond fedfuse_jax: the module to look for, the package to install.
REQUIREMENTS = {
    "fedjax": "fedjax",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
}
PRIVACY_REQUIREMENTS = {"dp_accounting": "dp-accounting"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo.

    Args:
        arguments: The command line without the program's name; `None`: this process's own.
    """
    options = _parse(arguments)
    required = REQUIREMENTS | (PRIVACY_REQUIREMENTS if options.private else {})
    missing = [package for module, package in required.items() if not importlib.util.find_spec(module)]
    if missing:
        sys.exit(f'fedfuse_jax.demo: {", ".join(missing)} not installed; run: pip install "fedfuse-jax[demo]"')
    if options.private:
        _show_privacy(options)
    elif options.compress:
        _show_compression(options)
    else:
        _show_rules(options)


# They import what they need only now, so that help, bad options and a line on what is missing need none of it.


def _show_rules(options: argparse.Namespace) -> None:
    """Rules among bad clients."""
    from fedfuse_jax.demo import report, simulation

    federation = simulation.make_federation(options.clients, options.seed)
    model = simulation.make_model()
    num_bad = len(federation.bad_clients)
    headline = f"{num_bad} of {options.clients} clients {ATTACKS[options.attack].description} ({options.attack})"
    runs = {
        scenario.name: simulation.train(federation, model, scenario, options.rounds)
        for scenario in simulation.scenarios(options.attack, options.rules)
    }
    history = _run(runs, options.rounds)
    report.print_table(history, f"{headline}; {_settings(options)}")
    report.save_plot(history, headline, options.output)
    print(f"Accuracy by round: {options.output}")
    print(report.server_step_line(model, options.clients))


def _show_privacy(options: argparse.Namespace) -> None:
    """Clipped updates, and more and more noise."""
    from fedfuse_jax.demo import report, simulation

    federation, model = simulation.make_federation(options.clients, options.seed), simulation.make_model()
    multipliers = {privacy.scenario_name(noise): noise for noise in privacy.NOISE_MULTIPLIERS}
    runs = {
        name: simulation.train_privately(federation, model, noise, options.rounds)
        for name, noise in multipliers.items()
    }
    history = _run(runs, options.rounds)
    epsilons = {name: privacy.epsilons(noise, options.rounds) for name, noise in multipliers.items() if noise}
    norm = f"{privacy.MAX_NORM:g}"
    headline = f"{options.clients} clients, updates clipped to {norm}, noise of z * {norm} on their sum"
    spent = f"epsilon at delta {privacy.DELTA:g}"
    report.print_privacy_table(history, epsilons, f"{headline}; {spent}; {_settings(options)}")
    report.save_privacy_plot(history, epsilons, headline, spent, options.output)
    print(
        "Hidden is whether a client sends its updates or zeros, over all rounds, in all of which it takes part.\n"
        "Without noise epsilon is infinite."
    )
    print(f"Accuracy and epsilon by round: {options.output}")


def _show_compression(options: argparse.Namespace) -> None:
    """Updates sent as they are, and made smaller."""
    from fedfuse_jax.demo import report, simulation

    federation, model = simulation.make_federation(options.clients, options.seed), simulation.make_model()
    compressions = {"uncompressed": UNCOMPRESSED} | {name: COMPRESSIONS[name] for name in options.compress}
    runs = {
        name: simulation.train_compressed(federation, model, compression, options.rounds)
        for name, compression in compressions.items()
    }
    history = _run(runs, options.rounds)
    num_params = simulation.num_params(model)
    num_bytes = {name: compression.num_bytes(num_params) for name, compression in compressions.items()}
    headline = f"{options.clients} clients send updates of {num_params} numbers"
    report.print_compression_table(history, num_bytes, options.clients, f"{headline}; {_settings(options)}")
    report.save_compression_plot(history, num_bytes, options.clients, headline, options.output)
    print(f"Accuracy by megabytes sent: {options.output}")


def _settings(options: argparse.Namespace) -> str:
    return f"{options.rounds} rounds, seed {options.seed}, chance 10%"


def _run(runs: Mapping[str, Iterator[Any]], rounds: int) -> dict[str, list[Any]]:
    """Trains under a progress bar; the outcomes of each run, by its name."""
    from fedfuse_jax.demo import report

    history: report.History = {}
    with report.progress_bar(rounds * len(runs)) as advance:
        for name, outcomes in runs.items():
            history[name] = []
            for outcome in outcomes:
                history[name].append(outcome)
                advance(name, outcome.accuracy)
    return history


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    attacks = "\n".join(f"  {name:12}bad clients {row.description}" for name, row in ATTACKS.items())
    rules = "\n".join(f"  {name.replace(' ', '-'):27}{row.description}" for name, row in RULES.items())
    compressions = "\n".join(f"  {name:12}{row.description}" for name, row in COMPRESSIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fedfuse_jax.demo",
        description=(
            "A FedJAX server learns handwritten digits from clients that hold few kinds of digit\n"
            "each (Dirichlet, alpha 0.3). A quarter of them is bad. How do the mean, the median\n"
            "and the trimmed mean of their updates fare, or other rules you name?\n\n"
            "With --private or --compress all clients are good: what does privacy cost, and what\n"
            "is saved when they send less?"
        ),
        epilog=(
            f"attacks:\n{attacks}\n\nrules, for n clients of whom f are bad:\n{rules}\n\n"
            f"compressions, of every client's update:\n{compressions}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--attack",
        choices=ATTACKS,
        help=f"what the bad clients do (default: {DEFAULT_ATTACK})",
    )
    parser.add_argument(
        "--rules",
        type=rule,
        nargs="+",
        metavar="RULE",
        help=f"how the server aggregates (default: {' '.join(name.replace(' ', '-') for name in DEFAULT_RULES)})",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--private",
        action="store_true",
        help="clip updates and add noise to their mean: accuracy and epsilon by round",
    )
    instead.add_argument(
        "--compress",
        choices=COMPRESSIONS,
        nargs="+",
        help="send less: accuracy by megabytes sent",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1, 10_000),
        default=50,
        metavar="N",
        help="rounds of training for each rule (default: %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=whole_number(4, 200),
        metavar="N",
        help=f"clients, 4 to 200 (default: {DEFAULT_CLIENTS}; with --private {privacy.DEFAULT_CLIENTS})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="same seed, same numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=writable_png,
        default="fedfuse_demo.png",
        metavar="PNG",
        help="where to draw it (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.clients is None:
        options.clients = privacy.DEFAULT_CLIENTS if options.private else DEFAULT_CLIENTS
    if options.private or options.compress:
        for argument in ("attack", "rules"):
            if getattr(options, argument):
                instead_of_it = "--private" if options.private else "--compress"
                parser.error(
                    f"--{argument} is for bad clients; with {instead_of_it}, all are good, and the mean serves"
                )
        return options
    options.attack = options.attack or DEFAULT_ATTACK
    options.rules = options.rules or list(DEFAULT_RULES)
    num_bad = default_num_bad(options.clients)
    for name in options.rules:
        if (least := RULES[name].least_clients(num_bad)) > options.clients:
            parser.error(f"{name} needs {least} clients where {num_bad} are bad; got {options.clients}")
    return options


if __name__ == "__main__":
    main()
