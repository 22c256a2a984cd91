"""The least time of a row, and what a report makes of it: planted seconds, and real runs too small to mean anything."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bounds, measure, operations, report, stopwatch
from benchmarks.bounds import ARITHMETIC, LEAVES, MEMORY, NEW_PAGES, ONE_ARRAY, Probe
from benchmarks.operations import FLOOR, OURS, ROWS, TINY, Problem


def row_named(name: str) -> operations.Row:
    return next(row for row in ROWS if row.name == name)


def timings_of(seconds: dict[str, float]) -> dict[str, stopwatch.Timing]:
    return {name: stopwatch.Timing(0.0, samples=[value] * 4) for name, value in seconds.items()}


def probe(name: str, part: str = MEMORY, amount: int = 1) -> Probe:
    return Probe(name, lambda: None, part=part, amount=amount)


# --- Probes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_probes_touch_every_word(copy: bool) -> None:
    arrays = [jnp.ones((4, 64), jnp.bfloat16), jnp.ones(7)]
    probing = bounds.memory_probes(arrays, copy, "cpu")
    assert all(one.name.startswith(bounds.COPY_PROBE if copy else bounds.READ_PROBE) for one in probing)
    assert {one.amount for one in probing} == {(4 * 64 * 2 + 7 * 4) * (1 + copy)}
    pieces = bounds._pieces([np.asarray(array) for array in arrays], 3)
    assert sum(piece.nbytes for piece in pieces) == 4 * 64 * 2 + 6 * 4


def test_a_product_reads_large_matrices() -> None:
    updates, weights = jnp.ones((8, 2**15)), jnp.ones(8)
    *others, product = bounds.memory_probes((updates, weights), False, "cpu")
    assert product.amount == updates.nbytes and all("product" not in one.name for one in others)
    (result,), _ = stopwatch.first_call(product)
    np.testing.assert_array_equal(result, np.full(2**15, 8))
    for arguments, copy in (((updates, updates[0]), True), ((updates[0],), False), ((updates[:, :9],), False)):
        assert not any("product" in one.name for one in bounds.memory_probes(arguments, copy, "cpu"))
    assert not any("product" in one.name for one in bounds.memory_probes((updates, jnp.ones(2**17)), False, "cpu"))


@pytest.mark.parametrize("row", [row for row in ROWS if row.gpu_problems], ids=lambda row: row.name)
def test_a_copy_probes_a_gpu(row: operations.Row) -> None:
    arguments = jax.jit(partial(row.arguments, TINY))(jax.random.key(0))
    (copy,) = bounds.memory_probes(arguments, False, "gpu")
    negated, _ = stopwatch.first_call(copy)
    assert copy.amount == 2 * sum(leaf.nbytes for leaf in negated) > 0


def test_a_gpu_has_no_other_probes() -> None:
    measured = measure.measure_row(row_named("coordinate_median/where"), TINY, platform="gpu", repetitions=1)
    assert measured["bound"]["parts"].keys() == {MEMORY} and len(measured["probes"]) == 1


def test_new_pages_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bounds.new_bytes([np.empty(2**25 + 8, np.uint8), np.empty(2**25, np.uint8)]) == [2**25 + 8]
    monkeypatch.setattr(np, "empty", lambda size, dtype: np.full(size, 7, dtype))
    arrays, _ = stopwatch.first_call(bounds.new_page_probe([8000, 1600]))
    assert [array.nbytes for array in arrays] == [8000, 1600] and not any(array.any() for array in arrays)


@pytest.mark.parametrize(("name", "returned"), [("weighted_sum", 5), ("squared_norms", 1)])
def test_as_many_leaves_are_taken_and_returned(name: str, returned: int) -> None:
    problem = Problem(3, 64, tree="5 leaves")
    measured = measure.measure_row(row_named(name), problem, repetitions=1)
    parts = {one["part"] for one in measured["probes"].values()}
    assert parts == {MEMORY, LEAVES, bounds._LEAVES_OF_ONE}
    assert measured["bound"]["parts"].keys() == {ONE_ARRAY, LEAVES}
    assert measured["bound"]["parts"][ONE_ARRAY] == measured["contenders"]["one array"]["seconds"]
    tree, one = bounds.leaf_probes([jnp.zeros(3)] * 5, jnp.zeros(15), returned, 1)
    assert [len(stopwatch.first_call(each)[0]) for each in (tree, one)] == [returned, 1]


def test_distances_have_a_floor_in_arithmetic() -> None:
    measured = measure.measure_row(row_named("pairwise_squared_distances"), Problem(64, 4096), repetitions=2)
    products = [one for one in measured["probes"].values() if one["part"] == ARITHMETIC]
    assert len(products) == 2 and measured["floor"]["parts"].keys() == {ARITHMETIC}
    rate = max(one["amount"] / one["seconds"] for one in products)
    assert measured["floor"]["seconds"] == pytest.approx(64 * 63 / 2 * 4096 / rate)
    ours = measured["contenders"][OURS]["seconds"]
    assert measured["fraction_of_floor"] == pytest.approx(measured["floor"]["seconds"] / ours)


@pytest.mark.parametrize("name", ["stack_clients", "fedadam_weighted_update"])
def test_new_pages_count_for_large_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "KEPT_BYTES", 500)
    measured = measure.measure_row(row_named(name), Problem(4, 256), repetitions=1)
    donated = bool(row_named(name).donated)  # then nothing is allocated
    assert (NEW_PAGES in measured["bound"]["parts"]) is not donated
    monkeypatch.undo()
    measured = measure.measure_row(row_named(name), Problem(4, 256), repetitions=1)
    assert measured["bound"]["parts"] == measured["floor"]["parts"]


# --- The least time -------------------------------------------------------------------------------------------


def test_the_fastest_probe_counts() -> None:
    probing = [probe("slow", amount=100), probe("fast", amount=50), probe("other", ARITHMETIC, 1000)]
    timings = timings_of({"slow": 10.0, "fast": 4.0, "other": 1.0})
    assert bounds.fastest(MEMORY, probing, timings) is probing[1]
    assert bounds.floor(25, 0, probing, timings) == bounds.Bound({MEMORY: 2.0}, ("fast",))
    assert bounds.floor(25, 3000, probing, timings).parts == {ARITHMETIC: 3.0}


def test_a_bound_is_made_of_what_nobody_is_spared() -> None:
    probing = [probe("read", amount=100), probe("pages", NEW_PAGES)]
    timings = timings_of({"read": 1.0, "pages": 3.0, "tree": 0.5, "one": 0.125, ONE_ARRAY: 2.0})
    least = bounds.bound(500, 200, 0, probing, timings)
    assert least == bounds.Bound({MEMORY: 3.0, NEW_PAGES: 3.0}, ("read", "pages")) and least.seconds == 6.0
    probing = [probe("read", amount=100), probe("tree", LEAVES), probe("one", bounds._LEAVES_OF_ONE)]
    least = bounds.bound(500, 200, 0, probing, timings)
    assert least is not None and least.parts == {ONE_ARRAY: 2.0, LEAVES: 0.375}
    del timings[ONE_ARRAY]  # wrong, say
    assert bounds.bound(500, 200, 0, probing, timings) is None


def test_a_bound_that_is_beaten_or_moves_does_not_hold() -> None:
    timings = timings_of({"read": 1.0})
    least = bounds.Bound({MEMORY: 1.0}, ("read",))
    assert least.holds(0.95, timings) and not least.holds(0.8, timings)
    timings["read"].samples = [1.0, 1.0, 1.5, 1.5]
    assert not least.holds(2.0, timings)


def test_goals_beyond_the_least_time_are_out_of_reach() -> None:
    wanted = operations.goals(natural=2, best=2, numpy=2, torch=2, floor=0.9)
    reached = {"jnp natural": 1.5, "jnp best": 1.5, "numpy": 2.5, FLOOR: 0.5}
    reach = {"jnp natural": 1.9, "jnp best": 2.1, "numpy": 2.6}
    judged = measure.judged(wanted, reached, reach, True)
    assert {name for name, goal in judged.items() if goal["out_of_reach"]} == {"jnp natural"}
    assert [report.sign(goal) for goal in judged.values()] == ["out of reach", "missed", "met", "open", "missed"]
    assert judged["jnp natural"]["met"] is False and judged[FLOOR]["reach"] is None
    assert not any(goal["out_of_reach"] for goal in measure.judged(wanted, reached, reach, False).values())


def planted(seconds: dict[str, float], goals: operations.Goals) -> dict[str, Any]:
    """A row whose times are given: ``read`` is the probe of 600 bytes, of which 600 move."""
    row = dataclasses.replace(row_named("coordinate_median"), goals=lambda problem: goals)
    return measure._row_report(row, TINY, "cpu", timings_of(seconds), {}, [probe("read", amount=600)], 500, 100, 0)


def test_what_could_be_reached_is_reported() -> None:
    goals = operations.goals(natural=6, best=2.5, numpy=5)
    row = planted({"read": 1e-3, OURS: 2e-3, "jnp natural": 8e-3, "jnp best": 2e-3, "numpy": 12e-3}, goals)
    assert row["bound"] == {"seconds": pytest.approx(1e-3), "parts": {MEMORY: pytest.approx(1e-3)}, "holds": True}
    assert [words for words, _ in report.goal_words(row)] == [
        "jnp natural 4.00x of 6x",
        "jnp best 1.00x of 2.5x, 2.00x at the bound",
        "numpy 6.00x of 5x",
    ]
    result = {"rows": [row]}
    assert report.goal_counts(result) == (
        "Of 3 goals for operations 1 are met, 1 missed (1 by more than 30 %), 1 out of reach of any code on this "
        "machine in this run, and 0 open."
    )
    problem = "4 x 64 float32"
    assert report.missed_cells(result) == [
        ["coordinate_median", problem, "jnp natural 6x", "4.00x", "8.00x", "2.00", "memory 1.00"],
        ["coordinate_median", problem, "jnp best 2.5x", "1.00x", "2.00x: out of reach", "2.00", "memory 1.00"],
    ]
    assert report.goal_counts({"rows": []}) == ""


def test_a_beaten_bound_excuses_nothing() -> None:
    row = planted({"read": 2e-3, OURS: 1e-3, "jnp best": 1.5e-3}, operations.goals(best=4))
    assert not row["bound"]["holds"] and not row["goals"]["jnp best"]["out_of_reach"]
    (cells,) = report.missed_cells({"rows": [row]})
    assert cells[4:] == ["-", "1.00", "memory 2.00 (unsure)"]
    # Within the tolerance what was reached can be reached.
    row = planted({"read": 1e-3, OURS: 0.95e-3, "jnp best": 1.9e-3}, operations.goals(best=4))
    assert row["goals"]["jnp best"]["reach"] == pytest.approx(2.0) and row["goals"]["jnp best"]["out_of_reach"]


def test_titles_fit_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(report, "_headline", lambda report: "a long word " * 30)
    figure = pyplot.figure(figsize=(11, 6))
    report._entitle(figure, "bytes moved a second", {})
    extent = figure.texts[0].get_window_extent(figure.canvas.get_renderer())
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
    pyplot.close(figure)
