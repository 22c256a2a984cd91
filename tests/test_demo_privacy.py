"""`python -m fedfuse_jax.demo --private`: what its accountant says, that it trains, what it shows and refuses."""

import importlib.util
import math
import re

import numpy as np
import pytest

for module in ("fedjax", "sklearn", "matplotlib", "rich", "dp_accounting"):
    pytest.importorskip(module)

from fedfuse_jax.demo import __main__ as command_line  # noqa: E402
from fedfuse_jax.demo import privacy, report, simulation  # noqa: E402
from fedfuse_jax.demo.simulation import Outcome  # noqa: E402


@pytest.fixture(scope="module")
def federation():
    return simulation.make_federation(num_clients=40, seed=0)


@pytest.fixture(scope="module")
def model():
    return simulation.make_model()


def final(federation, model, noise_multiplier, rounds):
    *_, last = simulation.train_privately(federation, model, noise_multiplier, rounds)
    return last


# The accountant


def delta_of(epsilon, mu):
    """What Gaussian noise of 1 / mu times the sensitivity gives: Dong et al. 2022, https://arxiv.org/abs/1905.02383."""
    below = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("noise_multiplier", [4.0, 16.0])
def test_epsilon_is_enough_and_not_far_too_much(noise_multiplier):
    spent = privacy.epsilons(noise_multiplier, 50)
    assert len(spent) == 50
    assert (np.diff(spent) > 0).all()
    for rounds in (1, 10, 50):
        mu = math.sqrt(rounds) / noise_multiplier
        assert delta_of(spent[rounds - 1], mu) <= privacy.DELTA
        assert delta_of(0.75 * spent[rounds - 1], mu) > privacy.DELTA


def test_no_noise_is_no_privacy():
    assert privacy.epsilons(0.0, 2) == [math.inf, math.inf]
    assert privacy.NOISE_MULTIPLIERS[0] == 0  # what the others are compared to
    assert 1 / privacy.DELTA > 10 * privacy.DEFAULT_CLIENTS


# The training


def test_learns_without_noise_and_less_with_much(federation, model):
    quiet, loud = (final(federation, model, noise, rounds=6) for noise in (0.0, 30.0))
    assert quiet.accuracy > 0.5
    assert loud.accuracy < quiet.accuracy - 0.2
    assert quiet.finite and loud.finite


def test_same_seed_same_numbers(federation, model):
    first = list(simulation.train_privately(federation, model, 4.0, rounds=2))
    assert first == list(simulation.train_privately(federation, model, 4.0, rounds=2))


@pytest.mark.full
def test_the_whole_run_shows_what_privacy_costs(model):
    crowd = simulation.make_federation(privacy.DEFAULT_CLIENTS, seed=0)
    accuracies = [final(crowd, model, noise, rounds=50).accuracy for noise in privacy.NOISE_MULTIPLIERS]
    assert min(accuracies[:2]) > 0.9  # so little noise costs nothing
    assert accuracies[-1] < accuracies[0] - 0.05
    assert accuracies[-1] > 0.6


# What is shown


HISTORY = {
    "no noise": [Outcome(0.5, True), Outcome(0.9, True)],
    "z = 4": [Outcome(0.4, True), Outcome(0.8, True)],
}


def test_table_has_accuracy_and_epsilon_by_round(capsys):
    report.print_privacy_table(HISTORY, {"z = 4": [0.864, 1.256]}, "headline")
    text = capsys.readouterr().out
    assert text.startswith("headline\n")
    assert re.search(r"Round\W+no noise\W+z = 4\W+epsilon", text)
    assert re.search(r"1\W+50\.0%\W+40\.0%\W+0\.86", text)
    assert re.search(r"2\W+90\.0%\W+80\.0%\W+1\.26", text)


@pytest.mark.parametrize(("rounds", "shown"), [(3, 3), (50, 10), (17, 10)])
def test_table_shows_up_to_ten_rounds_and_the_last(rounds, shown, capsys):
    report.print_privacy_table({"no noise": [Outcome(0.5, True)] * rounds}, {}, "headline")
    found = [int(number) for number in re.findall(r"(\d+)\W+50\.0%", capsys.readouterr().out)]
    assert len(found) == shown
    assert found == sorted(set(found)) and found[-1] == rounds and found[0] >= 1


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(privacy, "NOISE_MULTIPLIERS", (0.0, 4.0))
    picture = tmp_path / "picture.png"
    command_line.main(["--private", "--rounds", "2", "--clients", "6", "--seed", "5", "--output", str(picture)])
    shown = capsys.readouterr()
    assert "6 clients, updates clipped to 0.2, noise of z * 0.2 on their sum; epsilon at delta 0.0001" in shown.out
    assert re.search(r"2\W+\d+\.\d%\W+\d+\.\d%\W+\d\.\d\d", shown.out)
    assert "Without noise epsilon is infinite" in shown.out and str(picture) in shown.out
    assert "4/4 rounds" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--private", "--attack", "nan"], "--attack is for bad clients; with --private, all are good"),
        (["--rules", "median", "--private"], "--rules is for bad clients; with --private, all are good"),
        (["--private", "--compress", "int8"], "argument --compress: not allowed with argument --private"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_privacy_takes_a_crowd():
    assert command_line._parse(["--private"]).clients == privacy.DEFAULT_CLIENTS
    assert command_line._parse(["--private", "--clients", "7"]).clients == 7
    assert command_line._parse([]).clients == command_line.DEFAULT_CLIENTS


def test_says_when_the_accountant_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dp_accounting" else find(name))
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--private"])
    assert caught.value.code.startswith("fedfuse_jax.demo: dp-accounting not installed; run: pip install")
