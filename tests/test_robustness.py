"""The robustness benchmark, run for real on problems too small to mean anything."""

import json
import re
from pathlib import Path

import pytest

for module in ("fedjax", "sklearn", "matplotlib"):
    pytest.importorskip(module)

from benchmarks import robustness  # noqa: E402
from fedfuse_jax.demo.attacks import ATTACKS  # noqa: E402
from fedfuse_jax.demo.rules import RULES  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run of the command line, the file it wrote, and what it showed."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--rounds", "1", "--rules", "mean", "krum", "bulyan", "--attacks", "nan", "ipm"]
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr(robustness, "show", lambda result: shown.append(result))
        robustness.main([*arguments, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path, shown


def test_a_quick_run(finished):
    result, path, shown = finished
    assert shown == [result]
    assert path.name.endswith("-robustness-quick.json")
    runs = [(row["rule"], row["attack"], row["num_bad"]) for row in result["rows"]]
    # Bulyan needs eleven clients for two bad ones, and there are eight.
    assert runs == [(rule, attack, 2) for rule in ("mean", "krum") for attack in ("none", "nan", "ipm")]
    assert all(len(row["accuracy"]) == 1 and 0 <= row["accuracy"][0] <= 1 for row in result["rows"])
    assert [row["finite"] for row in result["rows"]] == [True, False, True, True, True, True]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_table(finished, capsys):
    result, path, _ = finished
    robustness.main(["--table", str(path)])
    printed = capsys.readouterr().out
    assert printed == robustness.markdown(result)
    assert "| rule | none | nan | ipm |" in printed
    assert "2 of 8 clients bad, 1 rounds" in printed
    assert re.search(r"^\| mean \| \d+ \| \d+ \| \d+ \|$", printed, re.MULTILINE)
    assert "| bulyan | - | - | - |" in printed


def test_screen(finished, capsys):
    robustness.show(finished[0])
    printed = capsys.readouterr().out
    assert re.search(r"krum\W+\d+\W+\d+\W+\d+", printed)


def test_the_documented_table_was_measured():
    """Nothing is typed: the page's table is made of a file of results."""
    reports = (robustness.load(path) for path in robustness.DEFAULT_OUTPUT.glob("*-robustness.json"))
    table = (Path(__file__).resolve().parent.parent / "docs" / "robustness_table.md").read_text()
    assert table in [robustness.markdown(report) for report in reports]


def test_everything_by_default():
    options = robustness._parse([])
    runs = robustness.runs(options)
    assert {run.rule for run in runs} == set(RULES)
    assert {run.attack for run in runs} == {robustness.NOBODY, *ATTACKS}
    assert {run.num_bad for run in runs} == {2, 4}
    assert len(runs) == len(RULES) * (len(ATTACKS) + 1) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "meen"], "argument --rules: got 'meen', needs one of mean, "),
        (["--attacks", "rude"], "argument --attacks: invalid choice: 'rude'"),
        (["--percent", "50"], "argument --percent: got '50', needs a whole number from 1 to 49"),
        (["--percent", "4"], "4 percent of 20 clients is nobody"),
        (["--table", "missing.json"], "argument --table: "),
        (["--table", "pyproject.toml"], "argument --table: "),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        robustness.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_says_in_one_line_what_is_missing(monkeypatch):
    monkeypatch.setattr(robustness.machine, "is_importable", lambda name: name != "sklearn")
    with pytest.raises(SystemExit) as caught:
        robustness.main(["--quick"])
    assert (
        caught.value.code == 'benchmarks.robustness: scikit-learn not installed; run: pip install "fedfuse-jax[demo]"'
    )
