"""The command line of the demo: `python -m fedfuse_jax.demo --help`."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from fedfuse_jax.demo.attacks import ATTACKS, default_num_bad
from fedfuse_jax.demo.options import rule, whole_number, writable_png
from fedfuse_jax.demo.rules import DEFAULT_RULES, RULES

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
    scenarios = simulation.scenarios(options.attack, options.rules)
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
    rules = "\n".join(f"  {name.replace(' ', '-'):27}{row.description}" for name, row in RULES.items())
    parser = argparse.ArgumentParser(
        prog="python -m fedfuse_jax.demo",
        description=(
            "A FedJAX server learns handwritten digits from clients that hold few kinds of digit\n"
            "each (Dirichlet, alpha 0.3). A quarter of them is bad. How do the mean, the median\n"
            "and the trimmed mean of their updates fare, or other rules you name?"
        ),
        epilog=f"attacks:\n{attacks}\n\nrules, for n clients of whom f are bad:\n{rules}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--attack",
        choices=ATTACKS,
        default="scaled",
        help="what the bad clients do (default: %(default)s)",
    )
    parser.add_argument(
        "--rules",
        type=rule,
        nargs="+",
        default=DEFAULT_RULES,
        metavar="RULE",
        help=f"how the server aggregates (default: {' '.join(name.replace(' ', '-') for name in DEFAULT_RULES)})",
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
        default=40,
        metavar="N",
        help="clients, good and bad, 4 to 200 (default: %(default)s)",
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
        help="where to draw accuracy by round (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    num_bad = default_num_bad(options.clients)
    for name in options.rules:
        if (least := RULES[name].least_clients(num_bad)) > options.clients:
            parser.error(f"{name} needs {least} clients where {num_bad} are bad; got {options.clients}")
    return options


if __name__ == "__main__":
    main()
