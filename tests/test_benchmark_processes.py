"""What the benchmarks measure in processes of their own."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks import instruction_sets, kept_memory, processes, report
from benchmarks.kept_memory import BEST, DEFAULT, KEPT
from benchmarks.operations import OURS, ROWS, TINY, Problem
from benchmarks.processes import Case

ROOT = Path(__file__).resolve().parents[1]


# --- Processes ------------------------------------------------------------------------------------------------


def test_a_process_has_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        return type("Finished", (), {"stdout": "[]"})

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("ANOTHER", "1")
    assert processes.run([], {"MINE": "2"}, without=["MALLOC_MMAP_MAX_"]) == []
    assert seen["MINE"] == "2" and seen["ANOTHER"] == "1" and seen["JAX_PLATFORMS"] == "cpu"
    assert "MALLOC_MMAP_MAX_" not in seen and os.environ["MALLOC_MMAP_MAX_"] == "7"
    processes.run([], {"MALLOC_MMAP_MAX_": "0"}, without=["MALLOC_MMAP_MAX_"])
    assert seen["MALLOC_MMAP_MAX_"] == "0"


def test_cases_are_measured_by_problem_and_form() -> None:
    cases = [
        Case("weighted_sum", TINY),
        Case("weighted_sum", Problem(3, 8)),
        Case("weighted_sum", TINY, BEST),
        Case("fedyogi_weighted_update", TINY, BEST),  # which there is none of
    ]
    measured = processes.measure_here(cases, 2)
    found = processes.medians([{"kind": "here", "rows": measured}], "kind")
    assert set(found) == set(cases[:3]) and all(by_kind["here"] > 0 for by_kind in found.values())


def test_medians_are_over_the_processes_of_a_kind() -> None:
    def run(kind: str, seconds: float) -> dict[str, Any]:
        return {"kind": kind, "rows": [{"row": "a", "form": OURS, **asdict(TINY), "seconds": seconds}]}

    runs = [run("x", 1.0), run("y", 9.0), run("x", 5.0), run("x", 2.0)]
    assert processes.medians(runs, "kind") == {Case("a", TINY): {"x": 2.0, "y": 9.0}}


# --- The instruction sets -------------------------------------------------------------------------------------


def test_instruction_sets_are_compared() -> None:
    def run(name: str, seconds: float) -> dict[str, Any]:
        row = {
            "row": "trimmed_mean",
            "form": OURS,
            "clients": 32,
            "parameters": 64,
            "dtype": "float32",
            "tree": "",
            "seconds": seconds,
        }
        return {"instruction_set": name, "rows": [row]}

    seconds = {"avx512": (2e-3, 9e-3, 1e-3), "avx2": (3e-3, 5e-3, 1e-3), "baseline": (9e-3, 9e-3, 9e-3)}
    runs = [run(name, values[turn]) for turn in range(3) for name, values in seconds.items()]
    (row,) = instruction_sets.compared(runs)
    assert row["ratios"] == pytest.approx({"avx512": 1, "avx2": 1.5, "baseline": 4.5})
    assert {name: goal["met"] for name, goal in row["goals"].items()} == {"avx2": True, "baseline": False}
    (cells,) = report.instruction_set_cells({"instruction_sets": runs})[1]
    assert cells[2:5] == ["2.00", "1.50x", "4.50x"] and "baseline at most 4x: missed" in cells[5]
    (row,) = instruction_sets.compared(runs[1:3])
    assert row["ratios"] == row["goals"] == {}  # nothing to compare with
    assert report.instruction_set_cells({"instruction_sets": runs[1:3]})[1][0][2:] == ["-", "-", "-", "-"]


def test_instruction_sets_are_measured_in_their_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instruction_sets, "QUICK_PROBLEMS", (TINY,))
    assert command_line.main(["--instruction-sets", "--quick", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = report.load(path)
    assert [run["instruction_set"] for run in result["instruction_sets"]] == instruction_sets.supported()
    for run in result["instruction_sets"]:
        assert {row["row"] for row in run["rows"]} == set(instruction_sets.NAMES)
        assert all(row["seconds"] > 0 for row in run["rows"])


# --- Memory that is kept --------------------------------------------------------------------------------------


def test_what_is_kept_is_compared() -> None:
    problem = Problem(10, 10**6)

    def run(kind: str, forward: float, backward: float, best: float) -> dict[str, Any]:
        seconds = {("weighted_sum", OURS): forward, ("weighted_sum/backward", OURS): backward}
        seconds[("weighted_sum/backward", BEST)] = best
        rows = [{"row": row, "form": form, **asdict(problem), "seconds": s} for (row, form), s in seconds.items()]
        return {"memory": kind, "rows": rows}

    runs = [run(DEFAULT, 1e-3, 4e-3, 9e-3), run(KEPT, 1e-3, 2e-3, 5e-3)]
    forward, backward = kept_memory.compared(runs)
    assert forward["over_forward"] == forward["goals"] == {}
    assert backward["over_forward"] == pytest.approx({DEFAULT: 4, KEPT: 2})
    assert {kind: goal["met"] for kind, goal in backward["goals"].items()} == {DEFAULT: False, KEPT: True}
    header, cells = report.kept_memory_cells({"kept_memory": runs})
    assert cells[0] == ["weighted_sum", problem.label, "1.00", "1.00", "-", "-", "-", "-"]
    assert cells[1][2:] == ["4.00", "2.00", "9.00", "5.00", "4.00x: missed", "2.00x: met"]
    assert all(len(line) == len(header) for line in cells)
    (_, (_, half)) = report.kept_memory_cells({"kept_memory": runs[:1]})
    assert half[2:] == ["4.00", "-", "9.00", "-", "4.00x: missed", "-"]


def test_kept_memory_has_forms_and_goals_of_rows() -> None:
    rows = {row.name: row for row in ROWS}
    for case in kept_memory.cases(kept_memory.PROBLEMS, kept_memory.MERGE_PROBLEM):
        assert rows[case.row].best is not None and case.problem in rows[case.row].problems
    for name in kept_memory.FORWARD:
        for problem in kept_memory.PROBLEMS:
            assert rows[f"{name}/backward"].goals(problem)["forward"].least == pytest.approx(1 / kept_memory.MOST)


def test_the_documentation_names_the_settings() -> None:
    settings = " ".join(f"{name}={value}" for name, value in kept_memory.SETTINGS.items())
    assert f"{settings} python" in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.skipif(not kept_memory.supported(), reason="the C library is not glibc")
def test_kept_memory_is_measured_in_its_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept_memory, "QUICK_PROBLEMS", (TINY,))
    monkeypatch.setattr(kept_memory, "QUICK_MERGE_PROBLEM", TINY)
    arguments = ["--kept-memory", "--quick", "--output", str(tmp_path)]
    assert command_line.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    result = report.load(path)
    assert [run["memory"] for run in result["kept_memory"]] == [DEFAULT, KEPT]
    for run in result["kept_memory"]:
        assert {row["row"] for row in run["rows"]} == {
            kept_memory.MERGE,
            *kept_memory.FORWARD,
            *(f"{name}/backward" for name in kept_memory.FORWARD),
        }
        assert all(row["seconds"] > 0 for row in run["rows"])
    assert "| by memory |" in report.markdown(result)
    capsys.readouterr()
    assert command_line.main([*arguments, "--resume"]) == 0
    assert "[1/" not in capsys.readouterr().out and report.load(path)["kept_memory"] == result["kept_memory"]


def test_another_c_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("", ""))
    options = command_line._parse(["--kept-memory", "--quick"])
    result = command_line._new_report(options, "cpu")
    assert any("the C library is not glibc" in line for line in result["skipped"])
    assert command_line.tasks(options, "cpu", result) == []
