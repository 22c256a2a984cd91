"""Standalone C++ programs among the sources: compiles and runs them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FFI = Path(__file__).parents[1] / "ffi"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def compile_cxx(output, *arguments):
    """Compiles, without a warning."""
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{FFI}"]
    done = subprocess.run([*command, *map(str, arguments), "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def run_host_test(folder, name, *arguments):
    """Has one source of the CPU module tested by its own program, under sanitizers."""
    source, program = FFI / "cpu" / f"{name}.cc", folder / f"{name}_test"
    if not source.exists():
        pytest.skip("the sources are not here")
    test = FFI / "cpu" / "tests" / f"{name}_test.cc"
    compile_cxx(program, "-fsanitize=address,undefined", *arguments, source, test)
    assert " 0 failed" in run(program)


def run(program, *arguments):
    """What a program says that ends well."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
