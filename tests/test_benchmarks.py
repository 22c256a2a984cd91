"""The benchmark harness, run for real on problems too small to mean anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

import fedfuse_jax as ff
from benchmarks import __main__ as command_line
from benchmarks import (
    curves,
    footprint,
    forms,
    measure,
    operations,
    report,
    stopwatch,
    systems,
    trees,
)
from benchmarks.operations import FLOOR, OURS, ROWS, TINY, Problem
from fedfuse_jax import _core

ROOT = Path(__file__).resolve().parents[1]


def row_named(name: str) -> operations.Row:
    return next(row for row in ROWS if row.name == name)


def public_operations() -> list[str]:
    """Public names of primitives; what is only arithmetic on a number per client is not worth measuring."""
    return [name for name in ff.__all__ if name in _core.OPERATIONS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[report.Report, Path]:
    """A run of the command line itself over three operations, and the file it wrote."""
    folder = tmp_path_factory.mktemp("results")
    chosen = "weighted_sum,coordinate_median,stack_clients"
    arguments = ["--shapes", "4x64,4x64/3", "--repetitions", "2", "--operations", chosen, "--output", str(folder)]
    assert command_line.main(arguments) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path


# --- The table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", public_operations())
def test_every_operation_has_a_row(name: str) -> None:
    assert name in {row.name for row in ROWS}, f"{name} has no benchmark: add its entry to benchmarks/operations.py"


def test_row_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


PROBLEMS = {problem.label: problem for problem in (TINY, Problem(7, 96, "bfloat16"), Problem(130, 16))}


@tiered(
    lambda problem, row: row % len(PROBLEMS) == problem,  # one of the problems for each row
    problem=PROBLEMS,
    row={row.name: row for row in ROWS},
)
def test_all_contenders_agree(row: operations.Row, problem: Problem) -> None:
    if row.variant == "backward" and problem.dtype != "float32":
        pytest.skip("clients that agree in low precision have no one derivative")
    measured = measure.measure_row(row, problem, repetitions=1)
    assert measured["errors"] == {}
    expected = {"jnp natural": row.natural, "jnp best": row.best, "numpy": row.numpy}
    assert {name for name, form in expected.items() if form} <= set(measured["contenders"])


DONATING = [row for row in ROWS if row.donated]


@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize("row", DONATING, ids=lambda row: row.name)
def test_state_is_donated_and_threaded(row: operations.Row) -> None:
    arguments = jax.jit(partial(row.arguments, TINY))(jax.random.key(0))
    before = jax.tree.map(np.array, arguments)
    expected = jax.jit(row.call)(*jax.jit(row.call)(*arguments), *arguments[len(row.donated) :])
    others = ["torch"] if importlib.util.find_spec("torch") else []
    for contender in measure.contenders(row, TINY, arguments, "cpu", others):
        first, _ = stopwatch.first_call(contender)
        assert contender.answer is not None
        contender.answer(first)
        second = contender.start()
        for result, wanted in zip(contender.answer(second), expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-4, err_msg=contender.name)
        if isinstance(first[0], jax.Array):
            assert all(old.is_deleted() for old in first), contender.name
    jax.tree.map(np.testing.assert_array_equal, arguments, before)  # everybody wrote over copies


def test_torch_forms_agree() -> None:
    pytest.importorskip("torch")
    for row in ROWS:
        measured = measure.measure_row(row, TINY, repetitions=1, others=["torch"])
        assert measured["errors"] == {}, row.name


def test_other_systems_agree() -> None:
    if set(systems.installed()) != set(systems.SYSTEMS):
        pytest.skip("byzfl or flwr is not installed")
    compared = [row for row in operations.ROWS if row.systems]
    for row in compared:
        measured = measure.measure_row(row, operations.Problem(7, 300), repetitions=1, others=systems.installed())
        assert measured["errors"] == {}, row.name
        assert row.systems.keys() <= measured["ratios"].keys()
    assert {system for row in compared for system in row.systems} == set(systems.SYSTEMS)


def test_goals_are_about_contenders_that_run() -> None:
    for row in ROWS:
        known = {*operations.PEERS, FLOOR, "one array", *row.references}
        for problem in (*row.problems, *row.gpu_problems):
            assert {*row.goals(problem), *row.gpu_goals(problem)} <= known, row.name
    assert row_named("coordinate_median").goals(Problem(32, 10**6))["numpy"].least == 18
    assert row_named("coordinate_median").goals(Problem(32, 10**4)) == {}


def test_nobody_with_a_goal_is_left_out() -> None:
    for row in ROWS:
        for problem in (*row.problems, *row.gpu_problems):
            assert not row.left_out(problem).keys() & row.goals(problem).keys(), (row.name, problem.label)
            assert OURS not in row.left_out(problem)


def test_who_is_left_out_is_said() -> None:
    row = dataclasses.replace(row_named("weighted_sum"), left_out=lambda problem: {"jnp natural": "too slow, years"})
    measured = measure.measure_row(row, TINY, repetitions=1)
    assert "jnp natural" not in measured["contenders"] and "jnp best" in measured["contenders"]
    assert report.left_out_words({"rows": [measured]}) == [
        "jnp natural of weighted_sum, 4 x 64 float32 (too slow, years)"
    ]


def test_labels_are_short() -> None:
    labels = [Problem(32, size).label for size in (64, 1000, 1024, 2**20, 10**6, 3000, 200, 1234)]
    assert labels == [f"32 x {size} float32" for size in ("64", "1e3", "2^10", "2^20", "1e6", "3e3", "200", "1234")]


def test_quick_problems_are_small_and_sensible() -> None:
    options = command_line._parse(["--quick"])
    for row in ROWS:
        chosen = command_line.problems(row, options, "cpu")
        assert chosen and all(problem.clients * problem.parameters <= 4 * 10**6 for problem in chosen), row.name
        assert {problem.clients for problem in chosen} <= {10, *(problem.clients for problem in row.problems)}
    assert command_line.problems(row_named("fedadam_weighted_update"), options, "cpu") == (Problem(4, 10**6),)


def test_shapes_are_read() -> None:
    assert command_line._shapes("32x1e6,10x2^20/100,3x64/1") == (
        Problem(32, 10**6),
        Problem(10, 2**20, tree="100 leaves"),
        Problem(3, 64),
    )


# --- The forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 10, 31, 64])
def test_the_network_sorts(size: int) -> None:
    values = np.random.default_rng(size).permutation(size)
    for low, high in forms.batcher_network(size):
        values[low], values[high] = min(values[low], values[high]), max(values[low], values[high])
    assert values.tolist() == list(range(size))


def test_bisection_withstands_ties_and_signs() -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (151, 40)), jnp.float32)
    np.testing.assert_array_equal(forms.best_median(values), np.median(values, axis=0))
    expected = np.sort(values, axis=0)[30:-30].mean(axis=0)
    np.testing.assert_allclose(forms.best_trimmed_mean(values, 30), expected, rtol=1e-5, atol=1e-6)


def test_no_two_clients_of_a_coordinate_are_alike() -> None:
    updates = np.asarray(operations.client_updates(Problem(100, 500), jax.random.key(0)))
    assert (np.diff(np.sort(updates, axis=0), axis=0) > 0).all()


@pytest.mark.parametrize(("parameters", "leaves"), [(64, 3), (100, 100), (10**6, 100)])
def test_leaf_sizes_add_up(parameters: int, leaves: int) -> None:
    sizes = trees.leaf_sizes(parameters, leaves)
    assert sum(sizes) == parameters and len(sizes) == leaves and min(sizes) >= 1


def test_networks_have_their_sizes() -> None:
    counted = {tree: (len(shapes), trees.num_parameters(tree)) for tree, shapes in trees.NETWORKS.items()}
    # As torchvision counts resnet18, and as GPT-2's published 124 million divide into embeddings and 12 blocks.
    assert counted == {trees.RESNET: (62, 11_689_512), trees.GPT_BLOCK: (12, 7_087_872)}
    assert all(tree.split()[1] == str(count) for tree, (count, _) in counted.items())


@pytest.mark.parametrize("name", ["weighted_sum", "squared_norms", "stack_clients", "fedadam_weighted_update"])
def test_a_tree_is_one_array(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "NETWORKS", {"a network": ((2, 3, 4), (4,), (5, 2))})
    row, problem = row_named(name), Problem(3, 38, tree="a network")
    arguments = jax.jit(partial(row.arguments, problem))(jax.random.key(0))
    leaves = [leaf.shape for leaf in jax.tree.leaves(measure.as_tree(problem, arguments))]
    assert any(shape[-3:] == (2, 3, 4) for shape in leaves) and not any(38 in shape for shape in leaves)
    measured = measure.measure_row(row, problem, repetitions=1)
    assert measured["errors"] == {} and {OURS, "one array"} == set(measured["contenders"])


def test_goals_of_trees_are_judged() -> None:
    measured = measure.measure_row(row_named("weighted_sum"), Problem(3, 64, tree="4 leaves"), repetitions=1)
    measured["ratios"]["one array"] = 1 / 1.25
    measured["goals"] = measure.judged(
        row_named("weighted_sum").goals(operations.TREE_PROBLEM), measured["ratios"], {}, True
    )
    (cells,) = report.tree_cells({"rows": [measured]})
    assert cells[1] == "3 x 64 float32 in 4 leaves" and cells[3:] == ["1.25x", "at most 1.1x: missed"]


# --- The stopwatch --------------------------------------------------------------------------------------------


def measured_beside(answer: np.ndarray) -> report.Report:
    extra = stopwatch.Contender("planted", lambda: answer, answer=lambda result: [result])
    return measure.measure_row(row_named("weighted_sum"), TINY, repetitions=1, extra=[extra])


def right_answer() -> np.ndarray:
    row = row_named("weighted_sum")
    arguments = jax.jit(partial(row.arguments, TINY))(jax.random.key(0))
    return np.array(row.call(*arguments))


def test_a_right_contender_is_timed() -> None:
    assert "planted" in measured_beside(right_answer())["contenders"]


@pytest.mark.parametrize("fault", [1e-2, np.nan, np.inf])
def test_a_wrong_contender_is_named_and_not_timed(fault: float) -> None:
    wrong = right_answer()
    wrong[17] += fault
    measured = measured_beside(wrong)
    assert set(measured["errors"]) == {"planted"}
    assert "disagrees with fedfuse" in measured["errors"]["planted"]
    assert "planted" not in measured["contenders"] and "planted" not in measured["ratios"]


def test_a_wrong_shape_is_wrong() -> None:
    assert set(measured_beside(right_answer()[:-1])["errors"]) == {"planted"}


def test_a_contender_that_raises_stops_nobody() -> None:
    def start() -> None:
        raise RuntimeError("no such thing here\nand a long story")

    extra = stopwatch.Contender("planted", start)
    measured = measure.measure_row(row_named("weighted_sum"), TINY, repetitions=1, extra=[extra])
    assert measured["errors"] == {"planted": "RuntimeError: no such thing here"}
    assert OURS in measured["contenders"]


def test_two_that_disagree_are_both_wrong() -> None:
    assert set(measure.wrong_contenders({"a": [np.ones(2)], "b": [np.zeros(2)]}, 1e-4)) == {"a", "b"}


def test_probes_that_differ_make_a_row_inconclusive() -> None:
    assert stopwatch.probes_agree([1.0, 1.1, 1.3, 1.35])
    assert not stopwatch.probes_agree([1.0, 1.1, 1.6, 1.7])
    assert not stopwatch.probes_agree([1.7, 1.6, 1.0, 1.1])
    assert stopwatch.probes_agree([1.0])


def test_an_inconclusive_row_meets_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "probes_agree", lambda samples: False)
    measured = measure.measure_row(row_named("weighted_sum"), TINY, repetitions=1)
    assert not measured["conclusive"]
    assert "inconclusive" in report.cells(measured)[0]


def test_goals_are_judged() -> None:
    wanted = operations.goals(best=2, torch=3, floor=(0.5, 0.8))
    judged = measure.judged(wanted, {"jnp best": 2.5, FLOOR: 0.4}, {}, True)
    assert {name: goal["met"] for name, goal in judged.items()} == {"jnp best": True, "torch": None, FLOOR: False}
    assert all(
        goal["met"] is None for goal in measure.judged(wanted, {"jnp best": 2.5, FLOOR: 0.4}, {}, False).values()
    )
    # Faster than the memory: the probe is at fault, so nothing is proven.
    assert measure.judged(wanted, {FLOOR: 1.3}, {}, True)[FLOOR]["met"] is None


def test_a_turn_begins_with_a_cold_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not among the samples; long calls do without."""
    turns = []

    def sample(contender: stopwatch.Contender, calls: int, platform: str) -> float:
        cold = not turns or turns[-1] != contender.name
        turns.append(contender.name)
        return {"short": 0.03 if cold else 0.01, "long": 1.0}[contender.name]

    monkeypatch.setattr(stopwatch, "sample", sample)
    timings = {name: stopwatch.Timing(0.0) for name in ("short", "long")}
    stopwatch.interleave([stopwatch.Contender(name, lambda: None) for name in timings], timings, 2, "cpu")
    assert timings["long"].samples == [1.0, 1.0] and timings["long"].cold_samples == []
    assert timings["long"].cold is None
    assert timings["short"].samples == [0.01, 0.01] and len(timings["short"].cold_samples) == 2


def test_nobody_holds_anothers_result() -> None:
    results: list[weakref.ref[Any]] = []

    class Held(np.ndarray):
        pass

    def start() -> Held:
        result = right_answer().view(Held)
        results.append(weakref.ref(result))
        return result

    def watch() -> np.ndarray:
        assert all(result() is None for result in results)
        return right_answer()

    extra = [
        stopwatch.Contender("watcher", watch, answer=lambda result: [result]),
        stopwatch.Contender("planted", start, answer=lambda result: [np.array(result)]),
    ]
    measured = measure.measure_row(row_named("weighted_sum"), TINY, repetitions=3, extra=extra)
    assert measured["errors"] == {} and len(results) > 3


def test_impatience_stops_after_three_samples() -> None:
    slow = stopwatch.Contender("slow", lambda: time.sleep(0.01))
    timings = {"slow": stopwatch.Timing(0.0)}
    stopwatch.interleave([slow], timings, 7, "cpu", patience=0.02)
    assert len(timings["slow"].samples) == 3


def test_long_calls_are_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "sample", lambda contender, calls, platform: 6.0)
    for repetitions, patience, samples in ((7, 1.0, 2), (1, 1.0, 1), (7, 7.0, 3), (7, 13.0, 3), (7, math.inf, 7)):
        timings = {"slow": stopwatch.Timing(0.0)}
        stopwatch.interleave([stopwatch.Contender("slow", lambda: None)], timings, repetitions, "cpu", patience)
        assert len(timings["slow"].samples) == samples


# --- The curves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_of_a_curve_have_the_same_bytes(dtype: str) -> None:
    for clients in curves.CLIENTS:
        parameters = curves.num_parameters(clients, dtype, 64 * 10**6)
        assert parameters % 64 == 0
        assert clients * parameters * jnp.dtype(dtype).itemsize == pytest.approx(64 * 10**6, rel=0.01)
        power = curves.aligned_parameters(clients, 64 * 10**6)
        if power is None:
            assert clients < 12
        else:
            assert power.bit_count() == 1 and power <= 2**20 and 48 * 10**6 <= 4 * power * clients <= 128 * 10**6


def test_lines_of_curves_are_rows() -> None:
    assert {name for name, _ in curves.LINES} | set(curves.ALIGNED_LINES) <= {row.name for row in ROWS}
    assert {*curves.QUICK_CLIENTS, *report.CURVE_CLIENTS} <= set(curves.CLIENTS)
    assert set(curves.CLIENTS) >= {127 + 1, 129, 64, 65, 16, 17}


def test_curves_are_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(curves.BUFFER_BYTES, "cpu", 2**16)
    monkeypatch.setattr(curves, "QUICK_CLIENTS", (4, 10))
    rows = ["--shapes", "4x64", "--operations", "finite_clients"]
    for chosen in (rows, ["--curves"]):
        assert command_line.main([*chosen, "--quick", "--repetitions", "1", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = report.load(path)
    assert [row["row"] for row in result["rows"]] == ["finite_clients"]  # kept
    assert {point["clients"] for point in result["curves"]} == {4, 10}
    assert len(result["curves"]) == 2 * (len(curves.LINES) + len(curves.ALIGNED_LINES))
    point = next(point for point in result["curves"] if (point["row"], point["dtype"]) == ("weighted_sum", "bfloat16"))
    assert point["parameters"] == 2**16 // 4 // 2
    assert point["bytes"] == 4 * point["parameters"] * 2 + 4 * 4 + point["parameters"] * 4
    assert point["bytes_per_second"] == pytest.approx(point["bytes"] / point["seconds"])
    assert point["fraction_of_roof"] == pytest.approx(point["bytes_per_second"] / point["roof_bytes_per_second"])
    assert "| of the memory's rate, by clients | 4 | 10 |" in report.markdown(result)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / f"{path.stem}-roofline.png").read_bytes().startswith(b"\x89PNG")


# --- The footprint --------------------------------------------------------------------------------------------


def test_a_wheel_is_built_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")

    def run(command: list[str], *, env: dict[str, str], check: bool) -> None:
        assert command[:4] == [sys.executable, "-m", "pip", "wheel"] and command[-1] == str(ROOT) and check
        assert env["CCACHE_DISABLE"] == "1" and "CMAKE_CXX_COMPILER_LAUNCHER" not in env
        Path(command[command.index("-w") + 1], "fedfuse_jax-0-any.whl").write_bytes(bytes(12 * 10**6))

    monkeypatch.setattr(footprint.subprocess, "run", run)
    rows = ["--shapes", "4x64", "--operations", "finite_clients", "--repetitions", "1"]
    assert command_line.main([*rows, "--build", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    text = report.markdown(report.load(path))
    assert "wheel 12 MB (goal: under 10 MB): missed" in text and "by 2 jobs (goal: under 240 s): met" in text


def test_modules_are_weighed() -> None:
    for name, size in footprint.module_bytes().items():
        assert size > 10**5, name
    words = report.footprint_words({"module_bytes": {"cpu": 9_900_000}, "build": {}})
    assert words == [("cpu module 9.9 MB (goal: under 10 MB)", True)]


# --- The report -----------------------------------------------------------------------------------------------


def test_the_file_has_its_schema(finished: tuple[report.Report, Path]) -> None:
    result, path = finished
    assert result["schema"] == report.SCHEMA
    assert path.stem.startswith(f"{result['date']}-cpu-")
    assert {"cpu", "cores", "device", "versions", "kernels"} <= set(result["machine"])
    assert result["machine"]["versions"]["jax"] == jax.__version__
    assert result["machine"]["versions"]["fedfuse-jax"] == ff.__version__
    assert {(row["row"], row["tree"]) for row in result["rows"]} >= {("weighted_sum", ""), ("weighted_sum", "3 leaves")}
    for row in result["rows"]:
        assert row["bytes"]["read"] > 0 and row["bytes"]["written"] > 0
        assert row["floor"]["bytes_per_second"] > 0 and row["bound"]["seconds"] > 0
        assert all(len(probe["samples"]) == 2 for probe in row["probes"].values())
        assert isinstance(row["conclusive"], bool) and row["fraction_of_floor"] > 0
        assert all(len(timing["samples"]) == 2 for timing in row["contenders"].values())
        assert len(row["contenders"][OURS]["cold_samples"]) == 2 and row["cold"] > 0
        ours = row["contenders"][OURS]["seconds"]
        for name, ratio in row["ratios"].items():
            assert ratio == pytest.approx(row["contenders"][name]["seconds"] / ours)
        assert ("one array" in row["ratios"]) == bool(row["tree"])
    for row in result["overhead"]:
        assert {f"{OURS}, eager", f"{OURS}, jitted"} <= set(row["microseconds"])


def test_bytes_are_counted(finished: tuple[report.Report, Path]) -> None:
    row = next(row for row in finished[0]["rows"] if row["row"] == "weighted_sum" and not row["tree"])
    assert (row["bytes"]["read"], row["bytes"]["written"]) == (4 * 64 * 4 + 4 * 4, 64 * 4)


def test_plots_are_drawn(finished: tuple[report.Report, Path]) -> None:
    pytest.importorskip("matplotlib")
    path = finished[1]
    pictures = {picture.name: picture for picture in path.parent.glob("*.png")}
    assert set(pictures) == {f"{path.stem}-sums.png", f"{path.stem}-order-statistics.png"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures.values())


def test_every_operation_has_a_picture() -> None:
    assert {report.family(row.operation) for row in ROWS} == set(report._FAMILIES.values())


README = """Before.
<!-- benchmarks:begin -->
*old machine*

| operation | clients x parameters | goals |
| --- | --- | --- |
| stack_clients (inconclusive) | 4 x 64 float32 | 1 |
| weighted_sum | 4 x 64 float32, donated | 2 |
<!-- benchmarks:end -->
After.
"""


def test_rows_of_the_readme_are_renewed(finished: tuple[report.Report, Path]) -> None:
    table = report.markdown(finished[0])
    lines = report.with_rows(README, table).splitlines()
    assert (lines[:2], lines[-2:]) == (README.splitlines()[:2], README.splitlines()[-2:])
    assert lines[2] == table.splitlines()[0] and lines[3] == ""
    assert [line.split()[1] for line in lines[4:-2]] == ["operation", "---", "stack_clients", "weighted_sum"]
    assert all(line in table.splitlines() for line in lines[2:-2])
    again = report.with_rows("\n".join(lines), table)
    assert again == "\n".join(lines)
    with pytest.raises(ValueError, match="shows weighted_sum 7 x 64 float32"):
        report.with_rows(README.replace("4 x 64 float32, d", "7 x 64 float32, d"), table)


def test_a_report_is_published(
    finished: tuple[report.Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "a.json"
    report.save(finished[0], path)
    assert command_line.main(["--publish", str(path)]) == 0
    table = (tmp_path / "docs" / "benchmarks_table.md").read_text()
    assert table.startswith(report.markdown(finished[0]))
    links = re.findall(r"!\[.*\]\((.*)\)", table)
    assert links == ["../results/a-sums.png", "../results/a-order-statistics.png"]
    assert all((tmp_path / "docs" / link).exists() for link in links)
    assert "old machine" not in (tmp_path / "README.md").read_text()


def test_the_table_is_markdown(finished: tuple[report.Report, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result, path = finished
    assert command_line.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.replace(" (inconclusive)", "") for line in lines]  # as problems so small may be
    assert sum(line.startswith("| coordinate_median | 4 x 64 float32 |") for line in shown) == 1
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert any(line.startswith(f"*{result['machine']['device']}") for line in lines)


def test_resume_measures_nothing_twice(
    finished: tuple[report.Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = finished
    arguments = ["--shapes", "4x64,4x64/3", "--repetitions", "2", "--operations", "weighted_sum", "--resume"]
    assert command_line.main([*arguments, "--output", str(path.parent)]) == 0
    assert "[1/" not in capsys.readouterr().out
    assert report.load(path)["rows"] == before["rows"]


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    hidden = ("torch", "matplotlib", "rich")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    arguments = ["--shapes", "4x64", "--repetitions", "1", "--operations", "finite_clients", "--output", str(tmp_path)]
    assert command_line.main(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"{name} is not installed" in output for name in hidden)
    assert "| finite_clients |" in output
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments",
    [["--operations", "nonsense"], ["--shapes", "3y4"], ["--dtypes", "int8"], ["--repetitions", "0"], ["--table", "x"]],
)
def test_bad_options_say_what_is_needed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "needs" in message or "No such file" in message


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_gpu_without_a_gpu_is_one_clear_line() -> None:
    with pytest.raises(SystemExit, match="--gpu needs a GPU"):
        command_line.main(["--gpu"])
