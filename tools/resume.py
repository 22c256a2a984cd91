"""A pytest plugin for runs that are cut off: tests that passed before are left out.

python -m pytest -p resume --passed FILE   # with this folder on PYTHONPATH
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Where the passed tests' names are kept."""
    parser.addoption("--passed", type=Path, metavar="FILE", help="leave out the tests named there, and add what passes")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what passed in an earlier run."""
    path = config.getoption("--passed")
    passed = set(path.read_text().splitlines()) if path is not None and path.exists() else set()
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in passed]


class _Recorder:
    """Where tests run side by side, only the process that hears of all results writes them down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")


def pytest_configure(config: Any) -> None:
    """Listens, unless this is one of several workers."""
    path = config.getoption("--passed")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(path))
