"""The documentation is true: its examples run, its reference is whole, its figures were measured.

In Markdown, the ```python blocks of a page run one after the other, in one namespace. What a block prints has to be
what the ```text block that follows it says.
"""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import fedfuse_jax as ff
from fedfuse_jax import _core, _native

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = sorted(name for name in ff.__all__ if inspect.isfunction(getattr(ff, name)))
OPTIONAL = ("fedjax", "optax", "dp_accounting")  # what an example may need beside the package
ADAPTERS = {"fedjax": "fedfuse_jax.fedjax", "optax": "fedfuse_jax.optax"}  # the framework that each of them needs

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(page):
    return str(page.relative_to(ROOT))


def blocks_of(page):
    """(number of the line, language, text) of every fenced block."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in BLOCK.finditer(text)]


# --- Examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=page_name)
def test_examples_of_a_page(page):
    blocks = blocks_of(page)
    namespace = {"__name__": "example"}
    left_out = []
    for (line, language, source), (_, next_language, expected) in zip(blocks, [*blocks[1:], (0, "", "")], strict=True):
        if language != "python":
            continue
        if missing := [name for name in OPTIONAL if name in source and importlib.util.find_spec(name) is None]:
            left_out += missing
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Lines are numbered as in the page, for tracebacks.
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
        if next_language == "text":
            assert printed.getvalue() == expected, f"{page_name(page)}, the block in line {line}"
    if left_out:
        pytest.skip(f"everything ran but the blocks that need {', '.join(left_out)}")


def modules():
    """Every module of the installed package with Python in it, by name; only packages are imported."""
    for module in pkgutil.walk_packages(ff.__path__, "fedfuse_jax."):
        if not re.search(r"\._(cpu|cuda)$|\.__main__$", module.name):
            yield module.name


@pytest.mark.parametrize("name", ["fedfuse_jax", *modules()])
def test_examples_of_docstrings(name):
    if name.startswith((*ADAPTERS.values(), "fedfuse_jax.demo")):
        for framework in ("fedjax", *(("sklearn", "matplotlib", "rich") if "demo" in name else ())):
            pytest.importorskip(framework)
    module = importlib.import_module(name)
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    for test in doctest.DocTestFinder().find(module, name):
        runner.run(test, out=output.write)
    assert runner.failures == 0, output.getvalue()


# --- The reference ----------------------------------------------------------------------------------------------


def sections_of(function):
    """The sections of a Google docstring, and under "" what stands before them."""
    sections, current = {"": []}, ""
    for line in inspect.getdoc(function).splitlines():
        if match := re.fullmatch(r"(Args|Returns|Raises|Example|Source|Notes):", line):
            current = match[1]
        sections.setdefault(current, []).append(line)
    return {name: "\n".join(lines) for name, lines in sections.items()}


def check_docstring(function, notes):
    sections = sections_of(function)
    lines = sections[""].splitlines()
    assert lines[0].endswith("."), "the summary is one line, a sentence"
    assert lines[1:2] in ([], [""]), "the summary is one line, then there is none"
    assert ".. math::" in sections[""], "what it computes, in mathematics"
    needed = ["Returns", "Raises", "Example", "Source", "Notes"]
    parameters = inspect.signature(function).parameters
    if parameters:
        needed.insert(0, "Args")
    missing = [name for name in needed if name not in sections]
    assert not missing, f"sections are missing: {missing}"
    for parameter in parameters:
        assert re.search(rf"^ +{parameter}: ", sections["Args"], re.MULTILINE), f"Args says nothing of {parameter}"
    assert ">>> " in sections["Example"]
    for note in notes:
        assert re.search(rf"\*{note}\*", sections["Notes"], re.IGNORECASE), f"Notes says nothing of {note}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_docstring_of_an_operation(name):
    check_docstring(getattr(ff, name), notes=("Differentiability", "Sharding", "Determinism"))


@pytest.mark.parametrize("module_name", ADAPTERS.values())
def test_docstrings_of_an_adapter(module_name):
    pytest.importorskip(module_name.rpartition(".")[2])
    module = importlib.import_module(module_name)
    for name in module.__all__:
        if inspect.isfunction(getattr(module, name)):
            check_docstring(getattr(module, name), notes=("Determinism",))


def documented(page):
    return re.findall(r"^\.\. autofunction:: (\w+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_the_reference_is_whole():
    assert sorted(documented("operations.md")) == OPERATIONS
    definitions = re.search(r":members: (.+)", (ROOT / "docs" / "operations.md").read_text())[1].split(", ")
    assert sorted(definitions) == sorted(name for name in OPERATIONS if callable(getattr(ff.reference, name, None)))


@pytest.mark.parametrize(("framework", "module_name"), ADAPTERS.items())
def test_the_reference_of_an_adapter_is_whole(framework, module_name):
    pytest.importorskip(framework)
    module = importlib.import_module(module_name)
    functions = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    assert sorted(documented(f"{framework}.md")) == sorted(functions)


def test_every_operation_is_in_the_readme_and_the_changelog():
    for page in ("README.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text()
        assert not [name for name in OPERATIONS if name in _core.OPERATIONS and f"`{name}`" not in text], page


# --- What a page says of the rest -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_is_reachable():
    listed = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {
        "index",
        "benchmarks_table",
        "gpu_table",
        "robustness_table",
    } <= set(listed)


def test_figures_in_the_readme_were_measured():
    """Rows of tables between the marks are rows of the generated file; nothing is typed."""
    (shown,) = re.findall(
        r"<!-- benchmarks:begin -->\n(.*?)<!-- benchmarks:end -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    generated = (ROOT / "docs" / "benchmarks_table.md").read_text().splitlines()
    assert not [line for line in shown.splitlines() if line.startswith("|") and line not in generated]


@pytest.mark.skipif(
    os.environ.get(_native.DISABLE_VARIABLE, "").strip() not in ("", "0"), reason="kernels are switched off"
)
def test_what_is_tested_has_kernels():
    """The source tree alone has none: whoever tests it by accident tests the definitions only."""
    if jax.default_backend() == "cpu":
        assert not _native.load("cpu").reason, ff.__file__


# --- Keys that are to be secret -----------------------------------------------------------------------------------


def test_no_secret_key_is_made_of_a_seed():
    """JAX keeps 32 bits of a seed: whatever randomness went into it, all the keys it can be are soon tried."""
    sources = [*PAGES, *sorted((ROOT / "fedfuse_jax").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    of_a_seed = re.compile(r"(?:(?:random|jr)\.(?:key|PRNGKey)|seed)\(\s*(?:int\.from_bytes|secrets\.|os\.urandom)")
    for source in sources:
        text = source.read_text(encoding="utf-8").replace("Not `jax.random.key(secrets.randbits(63))`", "")
        assert not of_a_seed.search(text), source
        assert "randbits" not in text, source


def test_the_documented_secret_key_has_64_random_bits():
    namespace = {"jax": jax}
    (block,) = [
        code for kind, code in BLOCK.findall((ROOT / "docs/private.md").read_text()) if "def secret_key" in code
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block, namespace)
    words = np.array([jax.random.key_data(namespace["secret_key"]()) for _ in range(64)])
    assert len(np.unique(words)) == words.size == 128
    assert (np.bitwise_or.reduce(words) == 2**32 - 1).all()  # no bit is always 0, nor always 1
    assert (np.bitwise_and.reduce(words) == 0).all()
