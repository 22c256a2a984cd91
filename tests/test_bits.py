"""Same bits whatever the number of threads; same selections whatever the instruction set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from operations import all_kernels_built

from fedfuse_jax import _native

SCRIPT = Path(__file__).with_name("bits.py")
pytestmark = pytest.mark.skipif(not all_kernels_built(), reason="promised of the kernels, which are not built")


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_thread():
    """XLA makes its pool as large as NPROC says."""
    return run(NPROC="1")


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [7, pytest.param(2, marks=pytest.mark.full)])
def test_any_number_of_threads(one_thread, threads):
    many = run(NPROC=str(threads))
    assert (one_thread["threads"], many["threads"]) == (1, threads)
    assert many["digests"] == one_thread["digests"]


def instruction_sets():
    details = _native.load("cpu").details
    return details.get("supported_here", "baseline").split(", ")


@pytest.fixture(scope="module")
def baseline():
    return run("check", FEDFUSE_CPU_ISA="baseline")


@pytest.mark.full
@pytest.mark.parametrize("isa", [name for name in instruction_sets() if name != "baseline"])
def test_every_instruction_set(baseline, isa):
    """Each passes the oracle (inside the script), and medians are the same to the bit."""
    assert run("check", FEDFUSE_CPU_ISA=isa) == baseline


def test_instruction_set_is_what_was_asked_for():
    code = "from fedfuse_jax import _native; print(_native.load('cpu').details['instruction_set'])"
    for isa in instruction_sets():
        environment = {**os.environ, "FEDFUSE_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == isa, done.stderr
