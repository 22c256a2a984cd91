#!/usr/bin/env python3
"""Checks what ptxas says of the CUDA kernels: no spilled registers, and room for enough threads.

    python tools/check_cuda_build.py --build build/cuda            # compile for every target, then check
    python tools/check_cuda_build.py --build build/cuda --targets 90
    python tools/check_cuda_build.py --build build/cuda --targets gate      # three of them, as .ci/run does
    python tools/check_cuda_build.py build.log                     # check the output of a build with -Xptxas -v
    python tools/check_cuda_build.py build.log --markdown FILE     # and write the table of the docs

Needs no GPU. Prints a table of registers, shared memory and occupancy by kernel and target, and fails on any spilled
byte and on any occupancy under a quarter that is not in the reviewed tables below.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_TARGETS = ("80", "86", "89", "90", "100", "120")
GATE_TARGETS = ("80", "90", "120")  # the oldest, the largest, the newest; before a release, all are checked
TYPES = ("float32", "float64", "bfloat16", "float16")  # as ffi/contract/types.h numbers them
CODES = ("uint8", "int8", "uint4", "int4")  # as ffi/contract/compressed.h does
LEAST_OCCUPANCY = 0.25
USUAL_THREADS = 256  # of a block
THREADS = {"network": 128, "QuantizedDotLarge": 1024, "Rounds": 128}  # where their sources say otherwise
FEW = ", few leaves"  # ends the labels of the kernels that ffi/cuda/team.h launches for trees of few leaves


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of a target holds (CUDA C++ Programming Guide, Compute Capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


MULTIPROCESSORS = {
    "80": Multiprocessor(2048, 32, 164 * 1024),
    "86": Multiprocessor(1536, 16, 100 * 1024),
    "89": Multiprocessor(1536, 24, 100 * 1024),
    "90": Multiprocessor(2048, 32, 228 * 1024),
    "100": Multiprocessor(2048, 32, 228 * 1024),
    "120": Multiprocessor(1536, 24, 100 * 1024),
}

# Reviewed exceptions, (pattern of the kernel's label, reason). There is none for spills: add one for a float64 kernel
# at most, with its reason.
MAY_SPILL: tuple[tuple[str, str], ...] = ()
MAY_BE_FEW = (
    (
        r"network (float32|bfloat16|float16) \w+<(80|96|112|128|160|192)>",
        "a thread holds a whole column in registers: its 80 to 192 loads in flight hide what other warps would",
    ),
    (
        r"network (bfloat16|float16) Sort<(48|64)>",
        "two columns a register, and the sorting kernel serves masks and derivatives as well",
    ),
    (
        r"network float64 \w+<(48|64|96)>",
        "a value takes two registers: a thread has up to 96 loads of 8 bytes in flight",
    ),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one target, as ptxas describes it."""

    label: str
    target: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block; the kernels' sources say the same."""
        if warps := re.search(r"(\d+) warps", self.label):
            return 32 * int(warps[1])
        return THREADS.get(self.label.split("<")[0].split()[0], USUAL_THREADS)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be resident."""
        unit = MULTIPROCESSORS[self.target]
        warps = self.threads // 32
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        resident_warps = unit.registers // registers_of_warp // 4 * 4  # evenly over four partitions
        blocks = min(unit.blocks, unit.threads // self.threads, resident_warps // warps)
        blocks = min(blocks, unit.shared_bytes // (self.shared_bytes + 1024))
        return blocks * self.threads / unit.threads


def label_of(name: str) -> str:
    """A kernel's short name from its demangled one: ``network float32 Median<64>``."""
    name = re.sub(r"\(anonymous namespace\)::|fedfuse::|cuda::", "", name)
    body = re.search(r"run_tasks(_of_few)?<(.*)>\(", name)
    if body and body[1]:  # the second kernel of a body, for few leaves
        return label_of(f"run_tasks<{body[2]}>(") + FEW
    text = body[2].strip() if body else name
    text = re.sub(r"\(Type\)(\d)", lambda match: TYPES[int(match[1])], text)
    text = re.sub(r"\(Codes\)(\d)", lambda match: CODES[int(match[1])], text)
    network = re.match(r"NetworkBody<(\w+), (\w+)Network<(\d+)>, (?:true|false)>", text)
    if network:
        return f"network {network[1]} {network[2]}<{network[3]}>"
    search = re.match(r"SelectionBody<(\w+)Search<(\w+)(?:, (\d+))?> ?>", text)
    if search:
        return f"{search[1]}<{search[2]}{f', {search[3]} warps' if search[3] else ''}>"
    return re.sub(r"Body\b", "", text).strip()


def demangle(names: Sequence[str]) -> dict[str, str]:
    """By the binutils, or cu++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        sys.exit("check_cuda_build: needs c++filt (binutils) to read the kernels' names")
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def parse(log: str) -> list[Kernel]:
    """The kernels in the output of a build."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(pattern.finditer(log))
    names = demangle(sorted({match["name"] for match in found})) if found else {}
    kernels = []
    for match in found:
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                label_of(names[match["name"]]),
                match["target"],
                int(match["registers"]),
                int(match["stack"]),
                max(int(match["stores"]), int(match["loads"])),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def reason_for(label: str, table: Iterable[tuple[str, str]]) -> str | None:
    """Why a kernel may do what others may not."""
    return next((reason for pattern, reason in table if re.fullmatch(pattern, label)), None)


def complaints(kernels: Sequence[Kernel], targets: Sequence[str]) -> list[str]:
    """What is wrong, a line each."""
    lines = []
    by_label: dict[str, set[str]] = {}
    for kernel in kernels:
        by_label.setdefault(kernel.label, set()).add(kernel.target)
        where = f"{kernel.label} for sm_{kernel.target}"
        if kernel.spilled_bytes and not reason_for(kernel.label, MAY_SPILL):
            lines.append(f"{where} spills {kernel.spilled_bytes} bytes")
        if kernel.occupancy < LEAST_OCCUPANCY and not reason_for(kernel.label, MAY_BE_FEW):
            lines.append(
                f"{where} leaves room for {kernel.occupancy:.0%} of the threads ({kernel.registers} registers)"
            )
    for label, found in by_label.items():
        missing = [target for target in targets if target not in found]
        if missing:
            lines.append(f"{label} was not compiled for sm_{', sm_'.join(missing)}")
    return lines or ([] if kernels else ["there are no kernels: was the build's log made with -Xptxas -v?"])


def table(kernels: Sequence[Kernel], targets: Sequence[str]) -> str:
    """By kernel: registers and occupancy on each target, and shared memory."""
    order = sorted({kernel.label for kernel in kernels}, key=_natural)
    cells = {(kernel.label, kernel.target): kernel for kernel in kernels}
    width = max(map(len, order), default=0)
    lines = [f"{'kernel':<{width}}  {'shared':>6}  " + "  ".join(f"{'sm_' + target:>11}" for target in targets)]
    for label in order:
        row = [cells.get((label, target)) for target in targets]
        shared = max(kernel.shared_bytes for kernel in row if kernel)
        texts = [
            f"{kernel.registers:>3} r {kernel.occupancy:>4.0%}{'!' if kernel.spilled_bytes else ' '}" if kernel else "-"
            for kernel in row
        ]
        lines.append(f"{label:<{width}}  {shared:>6}  " + "  ".join(f"{text:>11}" for text in texts))
    return "\n".join(lines)


def markdown(kernels: Sequence[Kernel], targets: Sequence[str]) -> str:
    """The same for the docs.

    Kernels that differ in their type alone, or in how many leaves they have room for, and not in what is said of them,
    share a row.
    """
    cells = {(kernel.label, kernel.target): f"{kernel.registers}, {kernel.occupancy:.0%}" for kernel in kernels}
    rows: dict[tuple[str, ...], list[str]] = {}
    for label in sorted({kernel.label for kernel in kernels}, key=_natural):
        texts = tuple(cells.get((label, target), "") for target in targets)
        if label.endswith(FEW) and texts == tuple(cells.get((label.removesuffix(FEW), t), "") for t in targets):
            continue
        family = re.sub("|".join(TYPES), "…", label)
        rows.setdefault((family, *texts), []).append(label)
    lines = [f"| kernel | {' | '.join(f'sm_{target}' for target in targets)} |", "|---" * (len(targets) + 1) + "|"]
    for (family, *texts), labels in rows.items():
        kinds = [kind for kind in TYPES if any(kind in re.findall(r"\w+", label) for label in labels)]
        name = family.replace("…", ", ".join(kinds)) if kinds else family
        lines.append(f"| `{name}` | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _natural(label: str) -> list[object]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label)]


def build(directory: Path, targets: Sequence[str]) -> str:
    """Compiles the kernels alone, no Python module; gives what the compilers print."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake", *generator, str(ROOT), "-DFEDFUSE_CUDA=ON", "-DFEDFUSE_PYTHON=OFF", "-DFEDFUSE_CUDA_STATISTICS=ON",
        f"-DFEDFUSE_CUDA_TARGETS={';'.join(targets)}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(configure, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", ".", "--clean-first", "--target", "fedfuse_cuda", "-j", str(os.cpu_count() or 1)]
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (directory / "ptxas.log").write_text(done.stdout)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + "\ncheck_cuda_build: the build failed")
    print(f"Compiled for sm_{', sm_'.join(targets)} in {time.monotonic() - start:.0f} s on {os.cpu_count()} cores.")
    return done.stdout


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="?", type=Path, help="the output of a build with -Xptxas -v")
    parser.add_argument("--build", type=Path, metavar="DIRECTORY", help="build there first")
    parser.add_argument(
        "--targets", default=",".join(ALL_TARGETS), help="compute capabilities, with commas between; or gate"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, for the docs")
    options = parser.parse_args()
    targets = GATE_TARGETS if options.targets == "gate" else options.targets.split(",")
    if (options.log is None) == (options.build is None):
        parser.error("give either a log or --build")
    text = options.log.read_text() if options.log else build(options.build.resolve(), targets)
    kernels = parse(text)
    print(table(kernels, targets))
    if options.markdown:
        options.markdown.write_text(markdown(kernels, targets))
    wrong = complaints(kernels, targets)
    for line in wrong:
        print(f"check_cuda_build: {line}")
    few = sorted({kernel.label for kernel in kernels if kernel.occupancy < LEAST_OCCUPANCY}, key=_natural)
    for label in few:
        if reason := reason_for(label, MAY_BE_FEW):
            print(f"under {LEAST_OCCUPANCY:.0%}, reviewed: {label}: {reason}")
    print(f"{len({k.label for k in kernels})} kernels, {len(kernels)} compiled, {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
