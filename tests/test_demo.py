"""The main job, `python -m fedfuse_jax.demo`: what it shows, what it refuses, that it repeats."""

import importlib.util
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiers import by_id, checkerboard

for module in ("fedjax", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(module)

import fedjax  # noqa: E402

from fedfuse_jax.demo import __main__ as command_line  # noqa: E402
from fedfuse_jax.demo import report, simulation  # noqa: E402
from fedfuse_jax.demo.attacks import ATTACKS, NO_ATTACK, Attack  # noqa: E402
from fedfuse_jax.demo.rules import DEFAULT_RULES, RULES, Rule  # noqa: E402
from fedfuse_jax.demo.simulation import Outcome, Scenario  # noqa: E402

every_attack = pytest.mark.parametrize("attack_name", ATTACKS)


@pytest.fixture(scope="module")
def federation():
    return simulation.make_federation(num_clients=40, seed=0)


@pytest.fixture(scope="module")
def model():
    return simulation.make_model()


# The federation


@pytest.mark.parametrize("num_clients", [4, 40, 200])
def test_digits_are_dealt_once_and_equally(num_clients):
    federation = simulation.make_federation(num_clients, seed=1)
    sizes = {len(client["y"]) for client in federation.clients}
    assert len(federation.clients) == num_clients
    assert sizes == {1437 // num_clients}
    assert len(federation.bad_clients) == num_clients // 4
    assert federation.bad_clients < set(range(num_clients))
    images = np.concatenate([client["x"] for client in federation.clients] + [federation.test["x"]])
    # All images of the data set differ, so an image dealt twice, or also tested on, would show.
    assert len(np.unique(images, axis=0)) == len(images)


def test_clients_hold_few_kinds_of_digit(federation):
    # With alpha = 0.3 the commonest digit makes about half of a client; evenly dealt, a fifth.
    largest = [np.bincount(client["y"]).max() / len(client["y"]) for client in federation.clients]
    assert np.mean(largest) > 0.35
    assert np.median([len(np.unique(client["y"])) for client in federation.clients]) <= 6


def test_seed_decides_the_federation(federation):
    same, other = (simulation.make_federation(40, seed) for seed in (0, 1))
    assert same.bad_clients == federation.bad_clients
    assert other.bad_clients != federation.bad_clients
    for left, right in zip(same.clients, federation.clients, strict=True):
        np.testing.assert_array_equal(left["x"], right["x"])
    assert not np.array_equal(other.test["x"], federation.test["x"])


# The attacks


def test_attacks():
    leaf, labels = np.array([1.0, -2.0], np.float32), np.arange(10)
    np.testing.assert_array_equal(ATTACKS["scaled"].corrupt_update(leaf), [100, -200])
    np.testing.assert_array_equal(ATTACKS["nan"].corrupt_update(leaf), [np.nan, np.nan])
    np.testing.assert_array_equal(ATTACKS["sign-flip"].corrupt_update(leaf), [-1, 2])
    np.testing.assert_array_equal(ATTACKS["label-flip"].corrupt_update(leaf), leaf)
    np.testing.assert_array_equal(ATTACKS["label-flip"].corrupt_labels(labels), labels[::-1])
    np.testing.assert_array_equal(ATTACKS["inf"].corrupt_update(leaf), [np.inf, np.inf])
    for name in ATTACKS.keys() - {"label-flip"}:
        np.testing.assert_array_equal(ATTACKS[name].corrupt_labels(labels), labels)


def test_attacks_in_collusion():
    good = np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]], np.float32)
    np.testing.assert_allclose(ATTACKS["alie"].collude(good), [3 - 1.5 * 7**0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(ATTACKS["ipm"].collude(good), [-1.5, 0])
    np.testing.assert_array_equal(ATTACKS["mimic"].collude(good), [1, 0])
    assert {name for name, row in ATTACKS.items() if row.collude} == {"alie", "ipm", "mimic"}


def sent_under(attack, bad_clients):
    """What an aggregator gets when the clients' updates are their numbers, from 1."""
    sent = []

    def apply(clients, state):
        sent.extend(clients)
        return None, state

    inner = fedjax.aggregators.Aggregator(lambda: (), apply)
    attacked = simulation._under_attack(inner, attack, bad_clients)
    attacked.apply(((index, {"w": np.full(2, 1.0 + index, np.float32)}, index) for index in range(4)), ())
    assert [client_id for client_id, _, _ in sent] == [0, 1, 2, 3]
    assert [weight for _, _, weight in sent] == [0, 1, 2, 3]
    return [float(update["w"][0]) for _, update, _ in sent]


def test_bad_clients_alone_send_what_is_bad():
    assert sent_under(ATTACKS["sign-flip"], {1, 3}) == [1, -2, 3, -4]


def test_colluding_clients_know_the_good_ones_alone():
    assert sent_under(ATTACKS["ipm"], {1, 3}) == [1, -1, 3, -1]  # -0.5 times the mean of 1 and 3
    assert sent_under(ATTACKS["mimic"], {0, 3}) == [2, 2, 3, 2]


def test_bad_clients_alone_learn_what_is_bad(federation, model, monkeypatch):
    trained_on = []

    class Recorder(fedjax.ClientDataset):
        def __init__(self, examples):
            trained_on.append(examples["y"])
            super().__init__(examples)

    monkeypatch.setattr(fedjax, "ClientDataset", Recorder)
    next(simulation.train(federation, model, Scenario("", "mean", ATTACKS["label-flip"]), 1))
    for index, labels in enumerate(trained_on):
        true = federation.clients[index]["y"]
        expected = 9 - true if index in federation.bad_clients else true
        np.testing.assert_array_equal(labels, expected)


def test_scenarios_begin_with_what_the_others_are_compared_to():
    first, *others = simulation.scenarios("nan")
    assert (first.rule, first.attack) == ("mean", NO_ATTACK)
    assert [(row.rule, row.attack) for row in others] == [(rule, ATTACKS["nan"]) for rule in DEFAULT_RULES]
    assert [row.rule for row in simulation.scenarios("nan", ["krum"])] == ["mean", "krum"]


# The training


def final(federation, model, rule, attack, rounds):
    *_, last = simulation.train(federation, model, Scenario("", rule, attack), rounds)
    return last


def test_learns_without_an_attack(federation, model):
    last = final(federation, model, "mean", NO_ATTACK, rounds=12)
    assert last.accuracy > 0.85
    assert last.finite


@pytest.mark.parametrize("attack_name", ["scaled", "nan"])
def test_mean_fails(federation, model, attack_name):
    last = final(federation, model, "mean", ATTACKS[attack_name], rounds=8)
    assert last.accuracy < 0.2
    assert last.finite == (attack_name == "scaled")


@checkerboard(rule=by_id(["median", "trimmed mean"]), attack_name=by_id(["scaled", "nan"]))
def test_robust_rules_hold(federation, model, rule, attack_name):
    last = final(federation, model, rule, ATTACKS[attack_name], rounds=25)
    assert last.accuracy > 0.75  # 25 rounds of the demo's 50, which end at 0.85 and more
    assert last.finite


@pytest.mark.full
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"mean"}))
def test_every_robust_rule_learns_something_under_attack(model, rule):
    num_bad = 3
    federation = simulation.make_federation(15, 0, num_bad)
    assert len(federation.bad_clients) == num_bad
    last = final(federation, model, rule, ATTACKS["inf"], rounds=6)
    assert last.finite
    assert last.accuracy > 0.4  # chance is 0.1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_take_as_few_clients_as_they_say(rule):
    for num_bad in (0, 1, 2):
        least = rule.least_clients(num_bad)
        aggregator = rule.build(num_bad)
        clients = [(index, {"w": np.full(2, 1.0 + index % 3, np.float32)}, 1) for index in range(least)]
        result, _ = aggregator.apply(clients, aggregator.init())
        assert np.isfinite(result["w"]).all()


def test_model_that_is_nan_reads_every_digit_as_0(federation, model):
    last = final(federation, model, "mean", ATTACKS["nan"], rounds=1)
    assert last == Outcome(np.float32(np.mean(federation.test["y"] == 0)), finite=False)


@pytest.mark.parametrize(
    "rule",
    ["bucketed geometric median", *(pytest.param(rule, marks=pytest.mark.full) for rule in ("mean", "median"))],
)
def test_same_seed_same_numbers(federation, model, rule):
    scenario = Scenario("", rule, ATTACKS["scaled"])
    first = list(simulation.train(federation, model, scenario, rounds=3))
    assert first == list(simulation.train(federation, model, scenario, rounds=3))


# What is shown


def test_table_marks_a_model_that_is_not_finite(capsys):
    history = {
        "mean, no attack": [Outcome(0.2, True), Outcome(0.954, True)],
        "mean": [Outcome(0.9, True), Outcome(0.1, False)],
        "median": [Outcome(0.1, False), Outcome(0.93, True)],
    }
    report.print_table(history, "headline")
    text = capsys.readouterr().out
    assert text.startswith("headline\n")
    assert re.search(r"mean, no attack\W+95\.4%\W+\n", text)
    assert re.search(r"mean \*\W+10\.0%[^\w-]+85\.4 points", text)
    assert re.search(r"median\W+93\.0%[^\w-]+2\.4 points", text)
    assert text.rstrip().endswith("* The model is no longer finite; NaN for an answer reads as digit 0.")

    del history["mean"]
    report.print_table(history, "headline")
    assert "*" not in capsys.readouterr().out


def test_server_step_times_the_same_thing_twice(model, monkeypatch):
    results = []
    monkeypatch.setattr(report.jax, "block_until_ready", lambda result: results.append(result) or result)
    line = report.server_step_line(model, num_clients=8, repeats=3)
    pattern = r"n = 8 updates of d = 9610 numbers on \w+: ([\d.]+) ms; .*: ([\d.]+) ms; ([\d.]+) times"
    ours, theirs, ratio = map(float, re.search(pattern, line).groups())
    assert ratio == pytest.approx(theirs / ours, abs=0.06 + 0.01 * ratio)
    assert len(results) == 2 * (1 + 3)
    for left, right in zip(*map(jax.tree.leaves, results[:2]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_command(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-m", "fedfuse_jax.demo", "--attack", "nan", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--clients", "8", "--seed", "5", "--output", picture],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 8 clients send NaN (nan); 2 rounds, seed 5" in done.stdout
    for row in (r"mean, no attack ", r"mean \* ", "median ", "trimmed mean "):
        assert re.search(row + r"\W+\d+\.\d%", done.stdout), row
    assert str(picture) in done.stdout
    assert "n = 8 updates of d = 9610 numbers" in done.stdout
    assert "8/8 rounds" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


# What is refused, before anything is trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "rude"], "argument --attack: invalid choice: 'rude'"),
        (["--rounds", "0"], "argument --rounds: got '0', needs a whole number from 1 to 10000"),
        (["--rounds", "many"], "argument --rounds: got 'many', needs a whole number"),
        (["--clients", "1"], "argument --clients: got '1', needs a whole number from 4 to 200"),
        (["--clients", "2.5"], "argument --clients: got '2.5', needs a whole number"),
        (["--clients", "201"], "argument --clients: got '201'"),
        (["--seed", "-1"], "argument --seed: got '-1', needs a whole number from 0"),
        (["--output", "picture.jpg"], "argument --output: got 'picture.jpg', needs a file name"),
        (
            ["--output", "no/such/picture.png"],
            "argument --output: got 'no/such/picture.png', which",
        ),
        (["--rules", "meen"], "argument --rules: got 'meen', needs one of mean, median, trimmed-mean, "),
        (["--rules", "bulyan"], "bulyan needs 43 clients where 10 are bad; got 40"),
    ],
)
def test_refuses(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_folder_for_output(capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit):
        command_line.main(["--output", str(tmp_path / "folder.png")])
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_checking_the_output_leaves_it_as_it_was(tmp_path):
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_bytes(b"old")
    assert command_line._parse(["--output", str(old)]).output == old
    assert command_line._parse(["--output", str(new)]).output == new
    assert old.read_bytes() == b"old"
    assert not new.exists()


@pytest.mark.parametrize(
    ("absent", "packages"),
    [(["fedjax"], "fedjax"), (["sklearn", "rich"], "scikit-learn, rich"), (["matplotlib"], "matp")],
)
def test_says_in_one_line_what_is_missing(absent, packages, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(SystemExit) as caught:
        command_line.main([])
    message = caught.value.code
    assert message.startswith(f"fedfuse_jax.demo: {packages}")
    assert message.endswith('not installed; run: pip install "fedfuse-jax[demo]"')
    assert "\n" not in message


@every_attack
def test_help_names_every_attack(attack_name, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{attack_name} +bad clients {ATTACKS[attack_name].description}", shown)


@pytest.mark.parametrize("rule", RULES)
def test_help_names_every_rule(rule, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    assert re.search(
        rf"{re.escape(rule.replace(' ', '-'))} +{re.escape(RULES[rule].description)}", capsys.readouterr().out
    )
    assert command_line._parse(["--clients", "43", "--rules", rule.replace(" ", "-")]).rules == [rule]


def test_a_rule_is_one_row(federation, model, monkeypatch):
    monkeypatch.setitem(RULES, "lazy", Rule("", RULES["mean"].build, lambda f: 1))
    assert command_line._parse(["--rules", "lazy"]).rules == ["lazy"]
    assert len(list(simulation.train(federation, model, simulation.scenarios("nan", ["lazy"])[1], 1))) == 1


def test_an_attack_is_one_row(federation, model, monkeypatch):
    monkeypatch.setitem(ATTACKS, "zero", Attack("send zeros", corrupt_update=lambda leaf: 0 * leaf))
    assert command_line._parse(["--attack", "zero"]).attack == "zero"
    assert len(list(simulation.train(federation, model, simulation.scenarios("zero")[1], 1))) == 1
