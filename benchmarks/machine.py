"""Where it ran: processor, cores, kernels loaded, versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax

import fedfuse_jax
from fedfuse_jax import _native

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "byzfl", "flwr")


def installed(package: str) -> str | None:
    """The version of an installed package; ``None``: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether an optional module is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def cpu_model() -> str:
    """The processor's name, as well as the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """What the operations run on: the GPU's name, or the processor's."""
    device = jax.devices()[0]
    return cpu_model() if device.platform == "cpu" else device.device_kind


def describe() -> dict[str, Any]:
    """Everything a reader needs to judge the figures, or to get them again."""
    kernels = {}
    for name in _native.MODULES:
        loaded = _native.load(name)
        kernels[name] = {"loaded": not loaded.reason, "reason": loaded.reason, **loaded.details}
    return {
        "cpu": cpu_model(),
        "cores": _cores(),
        "device": device_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        # Ours is what was imported: a checkout is not installed, or an older one is.
        "versions": {"fedfuse-jax": fedfuse_jax.__version__} | {package: installed(package) for package in PACKAGES},
        "kernels": kernels,
    }
