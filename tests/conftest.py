"""Settings that must be made before JAX starts: four CPU devices, so that every test may shard."""

import os
import sys
import zlib
from pathlib import Path

import pytest

DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if ROOT not in map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
    # What is tested is the installed package. The checkout comes last, for the benchmarks, even where `python -m
    # pytest` put it first; and subprocesses do not look in the folder where they are started.
    sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != ROOT), str(ROOT)]
    os.environ["PYTHONSAFEPATH"] = "1"

# The tests, and the scripts they run, import each other's tables (operations, oracle, helpers) by their plain names.
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--third", type=int, choices=(0, 1, 2), help="run this third of the tests alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By a hash of their names, so that a third is the same on every machine and in every worker."""
    third = config.getoption("--third")
    if third is not None:
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % 3 != third]
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % 3 == third]
        config.hook.pytest_deselected(items=others)
