"""The table itself: whoever adds an operation and forgets one of its pieces is told here."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from operations import CASES, ROWS, Problem, to_jax

import fedfuse_jax as ff
from fedfuse_jax import _core, _native, reference

ROOT = Path(__file__).parents[1]
NOT_OPERATIONS = {
    "ServerState", "adaptive_clip_norm", "export_checks", "init_server_state", "reference", "show_versions",
}  # fmt: skip
# Rules that are made of operations, and have no custom call of their own: see tests/test_robust_properties.py.
RULES = {
    "bucketing", "bulyan", "centered_clipping", "geometric_median", "krum", "krum_scores", "multi_krum",
    "nearest_neighbor_mixing",
}  # fmt: skip
# What runs on the client, in jax.numpy.
ON_CLIENTS = {"hadamard_rotation", "inverse_hadamard_rotation", "quantize", "topk_sparsify"}
PUBLIC = sorted(set(ff.__all__) - NOT_OPERATIONS - RULES - ON_CLIENTS)
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:", "Source:", "Notes:")
LISTED = re.compile(r"^  X\((\w+), \w+, \w+\)", re.M)


def listed_handlers():
    """The operations in the one list of handlers."""
    return sorted(LISTED.findall((ROOT / "ffi" / "handlers" / "operations.h").read_text()))


def test_every_operation_has_a_row():
    assert {row.operation for row in ROWS} == set(_core.OPERATIONS)


def test_every_public_operation_has_a_row_and_a_primitive():
    assert sorted({row.operation for row in ROWS if row.public}) == PUBLIC
    assert set(PUBLIC) <= set(_core.OPERATIONS)


@pytest.mark.parametrize("name", sorted(_core.OPERATIONS))
def test_every_operation_has_a_definition(name):
    assert inspect.getdoc(getattr(reference, name))


def test_every_operation_has_a_handler():
    assert listed_handlers() == sorted(_core.OPERATIONS)


@pytest.mark.parametrize("platform", _native.MODULES)
def test_what_is_loaded_is_what_the_source_lists(platform):
    kernels = _native.load(platform)
    if kernels.reason:
        pytest.skip(kernels.reason)
    assert sorted(kernels.operations) == listed_handlers()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_operation_has_a_benchmark(name):
    from benchmarks.operations import ROWS as BENCHMARKS

    assert name in {row.operation for row in BENCHMARKS}


@pytest.mark.parametrize("name", sorted({*PUBLIC, *RULES, *ON_CLIENTS, "export_checks", "show_versions"}))
def test_every_public_name_has_a_whole_docstring(name):
    doc = inspect.getdoc(getattr(ff, name))
    positions = [doc.find(f"\n{section}") for section in SECTIONS]
    assert -1 not in positions, f"{name} lacks {[s for s, p in zip(SECTIONS, positions, strict=True) if p < 0]}"
    assert positions == sorted(positions)
    assert ".. math::" in doc
    assert ">>> " in doc[positions[3] : positions[4]]
    notes = doc[positions[5] :]
    for topic in ("ifferentiability*", "harding*", "eterminism*"):
        assert topic in notes, f"{name}: the notes say nothing of *{topic}"


@pytest.mark.parametrize("name", sorted({*PUBLIC, *RULES, *ON_CLIENTS, "export_checks"}))
def test_every_docstring_describes_every_argument(name):
    function = getattr(ff, name)
    described = inspect.getdoc(function).split("\nArgs:")[1].split("\nReturns:")[0]
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^\s+{argument}: ", described, re.M), f"{name}: {argument} is not described"


# --- What rows claim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_means_linear(case):
    """In each argument so called: f(a + 2b) = f(a) + 2 f(b). 1e-5: ten roundings or so of numbers of order 1."""
    claimed = [name for name in case.names if name in case.row.linear]
    first, second = (to_jax(case.sample(Problem(seed=seed))) for seed in (1, 2))
    for name in claimed:
        at = case.names.index(name)
        a, b = first[at], second[at]
        both = jax.tree.map(lambda x, y: x + 2 * y, a, b)
        results = [case.call(*first[:at], value, *first[at + 1 :]) for value in (a, b, both)]
        wanted = jax.tree.map(lambda x, y: x + 2 * y, results[0], results[1])
        for got, leaf in zip(jax.tree.leaves(results[2]), jax.tree.leaves(wanted), strict=True):
            assert jnp.allclose(got, leaf, rtol=1e-5, atol=1e-5)


def test_variants_name_optional_arguments():
    for row in ROWS:
        assert row.optional <= set(row.arguments)
        assert set(row.linear) <= set(row.arguments)
        assert set(row.differentiable) <= set(row.arguments)
    assert len({str(case) for case in CASES}) == len(CASES)
