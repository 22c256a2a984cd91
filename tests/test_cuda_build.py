"""The CUDA backend without a card: its own sources run on the host, its launches are checked on impossible shapes.

tools/check_cuda_build.py compiles the kernels and reads what ptxas says; here, that it reads right.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cxx import FFI, compile_cxx, needs_compiler, run
from scripts import load_script

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for path in (FFI / "cuda").glob("*.cu") if path.name != "runtime.cu")

needs_sources = pytest.mark.skipif(not SOURCES, reason="the sources are not here")


def load_tool():
    return load_script(ROOT / "tools" / "check_cuda_build.py")


# --- On the host ------------------------------------------------------------------------------------------------


@needs_sources
@needs_compiler
def test_launch_geometry(tmp_path):
    """One coordinate, more than 2³¹, batches beyond 65535, thousands of leaves and clients."""
    program = tmp_path / "launch_test"
    compile_cxx(program, "-fsanitize=address,undefined", FFI / "cuda" / "tests" / "launch_test.cc")
    assert " 0 failed" in run(program)


@needs_sources
@needs_compiler
@pytest.mark.full
def test_kernels_on_the_host(tmp_path):
    """The kernels' own source, thread by thread, against plain definitions; see ffi/cuda/team.h."""
    generated = tmp_path / "generated" / "networks.h"
    subprocess.run([sys.executable, FFI / "math" / "networks.py", "--output", generated], check=True)
    objects = []
    for source in SOURCES:
        objects.append(tmp_path / f"{source.stem}.o")
        compile_cxx(objects[-1], f"-I{tmp_path}", "-c", "-x", "c++", source)
    for test in ("kernels_test", "private_test"):
        program = tmp_path / test
        compile_cxx(program, f"-I{tmp_path}", FFI / "cuda" / "tests" / f"{test}.cc", *objects)
        assert " 0 failed" in run(program)


@needs_sources
@needs_compiler
@pytest.mark.full
def test_kernels_for_compressed_updates_on_the_host(tmp_path):
    """The same, without the networks that take minutes to compile."""
    sources = [FFI / "cuda" / f"{name}.cu" for name in ("sparse", "quantized")]
    program = tmp_path / "compressed_test"
    compile_cxx(program, "-fsanitize=address,undefined", "-x", "c++", *sources, FFI / "cuda/tests/compressed_test.cc")
    assert " 0 failed" in run(program)


# --- What ptxas says --------------------------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 144 bytes smem, 4432 bytes cmem[0]
"""
MEDIAN_64 = (
    "_ZN7fedfuse4cuda9run_tasksINS0_11NetworkBodyILNS_4TypeE0ENS_13MedianNetworkILi64EEELb0EEEEEvNT_10ParametersE"
)
WEIGHTED_SUM = "_ZN7fedfuse4cuda9run_tasksINS0_12_GLOBAL__N_111WeightedSumILNS_4TypeE0EEEEEvNT_10ParametersE"
WEIGHTED_SUM_OF_FEW = WEIGHTED_SUM.replace("9run_tasks", "16run_tasks_of_few").replace(
    "10ParametersE", "10Parameters9FewLeavesE"
)
BIT_PLANES = (
    "_ZN7fedfuse4cuda9run_tasksINS0_12_GLOBAL__N_113SelectionBodyINS0_14BitPlaneSearchILNS_4TypeE3ELi16EEEEEEEvNT_"
    "10ParametersE"
)

needs_demangler = pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")


@needs_sources
@needs_demangler
def test_the_check_reads_a_log():
    tool = load_tool()
    (kernel,) = tool.parse(LOG.format(name=MEDIAN_64, stack=0, spill=0, registers=80))
    assert kernel == tool.Kernel("network float32 Median<64>", "90", 80, 0, 0, 144)
    assert kernel.occupancy == 6 * 128 / 2048
    assert tool.complaints([kernel], ["90"]) == []
    assert "network float32 Median<64>" in tool.table([kernel], ["90"])
    (other,) = tool.parse(LOG.format(name=WEIGHTED_SUM, stack=0, spill=0, registers=64))
    assert other.label == "WeightedSum<float32>"
    (few,) = tool.parse(LOG.format(name=WEIGHTED_SUM_OF_FEW, stack=0, spill=0, registers=64))
    assert few.label == "WeightedSum<float32>, few leaves"
    (planes,) = tool.parse(LOG.format(name=BIT_PLANES, stack=0, spill=0, registers=64))
    assert planes.label == "BitPlane<float16, 16 warps>"
    assert planes.occupancy == 1024 / 2048


@needs_sources
def test_the_check_knows_the_threads_of_every_kernel():
    tool = load_tool()
    threads_of = lambda label: tool.Kernel(label, "90", 64, 0, 0, 0).threads  # noqa: E731
    text = "".join(path.read_text() for path in sorted((FFI / "cuda").glob("*.*")))
    (usual,) = re.findall(r"kReductionThreads = (\d+);", text)
    constant = r"static constexpr int kThreads = ([^;]+);"
    # Each with the last struct that begins at a line's start before it.
    threads = dict(re.findall(rf"^struct (\w+)\b(?:(?!^struct )[\s\S])*?{constant}", text, re.MULTILINE))
    assert len(threads) == len(re.findall(constant, text)) > 20
    assert threads.pop("SelectionBody") == "Search::kThreads"
    assert threads.pop("BitPlaneSearch") == "32 * kWarps"
    assert threads_of("BitPlane<float32, 4 warps>") == 128
    labels = {"NetworkBody": "network float32 Sort<4>", "RadixSearch": "Radix<float32>"}
    for body, number in threads.items():
        label = labels.get(body, f"{body}<float32>")
        assert threads_of(label) == int(number.replace("kReductionThreads", usual)), label
    assert set(tool.THREADS) <= {"network", *threads}


@needs_sources
@needs_demangler
def test_the_table_of_the_docs():
    """Types of which the same is said share a row, and so do large and small tables of leaves."""
    tool = load_tool()
    logs = [
        LOG.format(name=WEIGHTED_SUM.replace("E0E", f"E{number}E"), stack=0, spill=0, registers=registers)
        for number, registers in enumerate((64, 80, 64, 64))
    ]
    logs += [LOG.format(name=WEIGHTED_SUM_OF_FEW, stack=0, spill=0, registers=64)]
    logs += [LOG.format(name=WEIGHTED_SUM_OF_FEW.replace("E0E", "E2E"), stack=0, spill=0, registers=63)]
    lines = tool.markdown(tool.parse("".join(logs)), ["90"]).splitlines()
    assert lines == [
        "| kernel | sm_90 |",
        "|---|---|",
        "| `WeightedSum<float32, bfloat16, float16>` | 64, 50% |",
        "| `WeightedSum<bfloat16>, few leaves` | 63, 50% |",
        "| `WeightedSum<float64>` | 80, 38% |",
    ]


@needs_sources
@needs_demangler
def test_the_check_finds_faults():
    tool = load_tool()
    spilled = tool.parse(LOG.format(name=MEDIAN_64, stack=16, spill=12, registers=80))
    assert tool.complaints(spilled, ["90"]) == ["network float32 Median<64> for sm_90 spills 12 bytes"]
    few = tool.parse(LOG.format(name=MEDIAN_64, stack=0, spill=0, registers=255))
    assert "leaves room for 12% of the threads" in tool.complaints(few, ["90"])[0]
    assert "was not compiled for sm_80" in tool.complaints(few, ["80", "90"])[-1]
    assert tool.complaints([], ["90"]) != []


@needs_sources
def test_no_exception_is_for_nothing():
    """The exceptions are patterns of labels that networks have, and give a reason."""
    tool = load_tool()
    labels = [
        f"network {kind} {family}<{size}>"
        for kind in tool.TYPES
        for family in ("Sort", "Median", "TrimmedMean")
        for size in (48, 64, 96, 128)
    ]
    for pattern, reason in (*tool.MAY_SPILL, *tool.MAY_BE_FEW):
        assert any(re.fullmatch(pattern, label) for label in labels), pattern
        assert len(reason) > 20
    assert not any(re.match(r".*(float32|float16)", pattern) for pattern, _ in tool.MAY_SPILL)
