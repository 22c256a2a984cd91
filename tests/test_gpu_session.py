"""What tools/gpu_session.sh will run on a card, as far as it goes without one."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import operations
import pytest
from scripts import load_script

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "gpu_session.sh"
HANDLERS = ROOT / "ffi" / "handlers" / "operations.h"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the tools are not here")


@pytest.fixture(scope="module")
def checks():
    return load_script(ROOT / "tools" / "gpu_checks.py")


@pytest.mark.parametrize("dtype", operations.DTYPES)
def test_the_sanitizer_watches_every_operation(checks, dtype):
    """Each handler is bound by the calls of each dtype, in the program that is run."""
    handlers = set(re.findall(r"X\((\w+),", HANDLERS.read_text()))
    assert len(handlers) > 20
    with jax.enable_x64(dtype == "float64"):
        program, values = checks.together(list(checks.kernel_calls(dtype)))
        bound = set(re.findall(r"\bfedfuse_(\w+)\[", str(jax.make_jaxpr(program)(values))))
    assert handlers <= bound, handlers - bound


def test_the_sizes_are_those_of_the_networks(checks):
    """A network that is added is watched as well."""
    sizes = set()
    for listed in re.findall(r"NetworkSizes<([\d, ]+)>", (ROOT / "ffi/cuda/network_kernels.h").read_text()):
        sizes |= set(map(int, listed.split(",")))
    assert sizes == set(checks.NETWORK_SIZES)
    assert min(checks.MANY_CLIENTS) > max(sizes)


def test_large_and_small_tables_are_watched(checks):
    few = int(re.search(r"kFewLeaves = (\d+);", (ROOT / "ffi" / "cuda" / "launch.h").read_text())[1])
    assert len(checks.SHAPES) <= few < len(checks.MANY_SHAPES)


def test_the_loop_gives_the_same_bits(checks, tmp_path):
    checks.run_loop(tmp_path / "result.npy")
    assert np.load(tmp_path / "result.npy").shape == (10010,)
    text = str(jax.make_jaxpr(checks.loop)(checks.inputs()))
    assert len(set(re.findall(r"\bfedfuse_(\w+)\[", text))) >= 12


def test_streams_and_threads(checks):
    checks.check_streams()


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_kernels_are_found_in_a_trace(checks, tmp_path):
    mangled = (
        "_ZN7fedfuse4cuda9run_tasksINS0_11NetworkBodyILNS_4TypeE0ENS_13MedianNetworkILi64EEELb0EEEEEvNT_10ParametersE"
    )
    readable = "void fedfuse::cuda::run_tasks<fedfuse::cuda::(anonymous namespace)::WeightedSum<(fedfuse::Type)0> >(x)"
    events = [{"name": name} for name in (mangled, readable, "loop_fusion")] + [{"ph": "M"}]
    (tmp_path / "host.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert checks.kernels_in_trace(tmp_path) == {"network float32 Median<64>", "WeightedSum<float32>"}


def run_script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )


def test_the_script_stops_where_it_needs_a_card(tmp_path):
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    listed = run_script("--list").stdout.split()
    assert listed[:2] == ["machine", "build"] and "benchmarks" in listed
    if shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("there may be a card here")
    done = run_script(PYTHON=sys.executable, OUT=str(tmp_path), WORK=str(tmp_path / "work"))
    assert done.returncode == 1
    assert "stage machine: FAILED" in done.stdout and "stage build" not in done.stdout


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    """The plugin remembers what passed, and neither what failed nor what was not run."""
    (tmp_path / "test_some.py").write_text(
        "import os\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_late(): assert not os.environ.get('CUT')\n"
    )
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "resume", "--passed", "passed.txt", "."
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT / "tools"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**environment, "CUT": "1"})
    assert "2 failed, 1 passed" in done.stdout
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "1 failed, 1 passed, 1 deselected" in done.stdout
