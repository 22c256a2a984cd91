"""A compiled module that is missing, broken or not this package's own: nothing fails, show_versions says what to do.

No card is needed: Python meets all of them when it imports the module.
"""

import subprocess
import sys

import pytest

import fedfuse_jax as ff
from fedfuse_jax import _native

CURE = 'pip install -C cmake.define.FEDFUSE_CUDA=ON ".[cuda]"'

# Lets Python look for the CUDA module in one folder alone, then says what is there, and computes something.
CODE = """
import importlib.machinery, importlib.metadata, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, [sys.argv[1]] if name == "fedfuse_jax._cuda" else path, target)

def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import jax
importlib.metadata.distribution = not_installed
import fedfuse_jax as ff

ff.show_versions()
assert ff.coordinate_median(jax.numpy.ones((3, 2))).tolist() == [1, 1]
"""

MODULE = """
def build_info():
    return {info!r}
def handlers():
    raise AssertionError("handlers that do not fit are not asked for")
"""


def said_of_cuda(folder):
    """The line of show_versions about CUDA kernels, and those below that tell more."""
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("cuda kernels")]
    return lines[first].removeprefix("cuda kernels").strip(), lines[first + 1 :]


def test_no_module(tmp_path):
    said, more = said_of_cuda(tmp_path)
    assert said == f"not built: fedfuse_jax._cuda is not installed; to build it, {CURE}"
    assert more == []


@pytest.mark.parametrize("content", [b"", b"no shared object", b"\x7fELF" + bytes(200)], ids=("empty", "text", "cut"))
def test_a_broken_module(tmp_path, content):
    (tmp_path / "_cuda.abi3.so").write_bytes(content)
    said, more = said_of_cuda(tmp_path)
    assert said.startswith("fedfuse_jax._cuda does not load: ")
    assert "_cuda.abi3.so" in said
    assert said.endswith(f"; to build it anew, {CURE}")
    assert more == []


def write_module(folder, **changes):
    major, minor = _native.runtime_ffi_version()
    info = {"version": ff.__version__, "ffi_api_major": str(major), "ffi_api_minor": str(minor), "cuda_targets": "90"}
    (folder / "_cuda.py").write_text(MODULE.format(info=info | changes))


def test_a_module_of_another_version(tmp_path):
    write_module(tmp_path, version="0.0.9")
    said, more = said_of_cuda(tmp_path)
    assert said == (
        f"fedfuse_jax._cuda is of fedfuse-jax 0.0.9, and this is {ff.__version__}; to build it anew, {CURE}"
    )
    assert any(line.split() == ["cuda", "targets", "90"] for line in more), "what the module says of itself"


def test_a_module_for_a_newer_xla(tmp_path):
    minor = _native.runtime_ffi_version()[1] + 1
    write_module(tmp_path, ffi_api_minor=str(minor))
    said, _ = said_of_cuda(tmp_path)
    assert f"was built for XLA FFI 0.{minor}, newer than the 0.{minor - 1} of the installed jaxlib" in said
    assert "upgrade jax and jaxlib" in said


def test_modules_say_their_version():
    details = _native.load("cpu").details
    if not details:
        pytest.skip("the CPU module is not built")
    assert details["version"] == ff.__version__


def test_the_warning_says_it_too(monkeypatch):
    """Where the definitions run on a platform, the user is told once why."""
    monkeypatch.setattr(_native, "_said", set())
    monkeypatch.setattr(_native, "load", lambda platform: _native.Kernels(reason="not built: a reason"))
    monkeypatch.setattr(_native, "disabled_operations", frozenset)
    with pytest.warns(UserWarning, match=r"'cuda' \(not built: a reason\)"):
        _native.say_once_that_definitions_run(["cuda"])
