"""What the package weighs, and what building it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedfuse_jax import _native

ROOT = Path(__file__).resolve().parents[1]

BUILD_CORES = 2
MOST_SECONDS = 240  # of a build on so many
MOST_BYTES = 10 * 10**6  # of a wheel, or of a module


def module_bytes() -> dict[str, int]:
    """The sizes of the compiled modules that are loaded here."""
    files = {name: getattr(sys.modules.get(module), "__file__", None) for name, module in _native.MODULES.items()}
    return {name: os.path.getsize(file) for name, file in files.items() if file}


def build_wheel() -> dict[str, Any]:
    """Builds a wheel from nothing: an empty build folder, no compiler cache, as many jobs as the goal has cores."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_COMPILER_LAUNCHER")}
    environment |= {"CCACHE_DISABLE": "1", "CMAKE_BUILD_PARALLEL_LEVEL": str(BUILD_CORES)}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--quiet", "-C", f"build-dir={folder}/build", "-w", folder]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], env=environment, check=True)
        seconds = time.perf_counter() - start
        (wheel,) = Path(folder).glob("*.whl")
        return {"seconds": seconds, "jobs": BUILD_CORES, "wheel_bytes": wheel.stat().st_size}
