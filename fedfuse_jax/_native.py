"""Finds, loads and registers the compiled kernels, and knows why one is not there.

Nothing here fails an import: a module that is missing or does not fit leaves its platform to the ``jax.numpy``
definitions, and :func:`fedfuse_jax.show_versions` says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax

import fedfuse_jax

DISABLE_VARIABLE = "FEDFUSE_DISABLE_KERNELS"
ISA_VARIABLE = "FEDFUSE_CPU_ISA"

# The platforms a module of kernels can be built for, and what JAX calls them when targets are registered.
MODULES = {"cpu": "fedfuse_jax._cpu", "cuda": "fedfuse_jax._cuda"}
FFI_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}

# What makes a module that is missing or does not fit, in a checkout.
CURES = {"cpu": "pip install .", "cuda": 'pip install -C cmake.define.FEDFUSE_CUDA=ON ".[cuda]"'}


class Kernels(NamedTuple):
    """What a compiled module offers: the operations it has kernels for, or why it has none."""

    operations: frozenset[str] = frozenset()
    reason: str = ""  # why nothing is loaded; empty when something is
    details: dict[str, str] = {}  # noqa: RUF012 - what the module says of itself; never written to


def runtime_ffi_version() -> tuple[int, int] | None:
    """The FFI API version of the installed jaxlib, read from the headers it carries."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    header = Path(spec.submodule_search_locations[0], "include", "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        return None
    text = header.read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return None if None in found else tuple(int(match[1]) for match in found)  # type: ignore[index,return-value]


def _import_compiled(name: str) -> ModuleType | None:
    """The compiled module, from beside this file or, in a source checkout, from what is installed."""
    if importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    # Python puts the current folder first on its path: in a checkout, this package is the sources, which hold no
    # compiled modules, although `pip install .` has put some where the sources hide them.
    try:
        installed = importlib.metadata.distribution("fedfuse-jax")
    except importlib.metadata.PackageNotFoundError:
        return None
    stem = name.rpartition(".")[2]
    for file in installed.files or ():
        if file.parent.name == "fedfuse_jax" and file.name.startswith(f"{stem}.") and file.suffix == ".so":
            spec = importlib.util.spec_from_file_location(name, str(file.locate()))
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


@functools.cache
def load(platform: str) -> Kernels:
    """Imports the platform's module and registers its handlers with XLA, once."""
    name, cure = MODULES[platform], CURES[platform]
    try:
        module = _import_compiled(name)
        if module is None:
            return Kernels(reason=f"not built: {name} is not installed; to build it, {cure}")
    except ImportError as error:
        return Kernels(reason=f"{name} does not load: {error}; to build it anew, {cure}")
    isa = os.environ.get(ISA_VARIABLE, "").strip()
    if platform == "cpu" and isa and not module.choose_isa(isa):
        supported = module.build_info()["supported_here"]
        raise ValueError(f"fedfuse_jax: {ISA_VARIABLE} is {isa!r}; it needs one of what this machine has: {supported}.")
    details = dict(module.build_info())
    built = (int(details["ffi_api_major"]), int(details["ffi_api_minor"]))
    runtime = runtime_ffi_version()
    if runtime is not None and (built[0] != runtime[0] or built[1] > runtime[1]):
        # Registering it all the same would keep JAX's whole backend from starting.
        reason = (
            f"{name} was built for XLA FFI {built[0]}.{built[1]}, newer than the {runtime[0]}.{runtime[1]} of the "
            "installed jaxlib: upgrade jax and jaxlib, or rebuild fedfuse-jax against this jaxlib"
        )
        return Kernels(reason=reason, details=details)
    ours = fedfuse_jax.__version__
    if (version := details.get("version", ours)) != ours:
        # Its handlers may read their calls otherwise than this version writes them.
        reason = f"{name} is of fedfuse-jax {version}, and this is {ours}; to build it anew, {cure}"
        return Kernels(reason=reason, details=details)
    operations = set()
    for operation, handler in module.handlers().items():
        jax.ffi.register_ffi_target(f"fedfuse.{operation}.v1", handler, platform=FFI_PLATFORMS[platform])
        operations.add(operation)
    return Kernels(frozenset(operations), details=details)


@functools.cache
def disabled_operations() -> frozenset[str] | None:
    """The operations whose kernels the environment switches off; ``None`` for all. Read once, at import."""
    value = os.environ.get(DISABLE_VARIABLE, "").strip()
    if value in ("", "0"):
        return frozenset()
    if value == "1":
        return None
    return frozenset(name.strip() for name in value.split(",") if name.strip())


def has_kernel(operation: str, platform: str) -> bool:
    """Whether ``operation`` lowers to a compiled kernel on ``platform``."""
    disabled = disabled_operations()
    if disabled is None or operation in disabled:
        return False
    return operation in load(platform).operations


def check_disabled_names(operations: Iterable[str]) -> None:
    """Refuses a name in the environment variable that is no operation: a typo would switch nothing off."""
    known = sorted(operations)
    unknown = sorted((disabled_operations() or frozenset()) - set(known))
    if unknown:
        raise ValueError(
            f"fedfuse_jax: {DISABLE_VARIABLE} names {', '.join(map(repr, unknown))}, which is no operation; "
            f"it needs 1 or names out of: {', '.join(known)}."
        )


_said: set[str] = set()


def say_once_that_definitions_run(platforms: Iterable[str]) -> None:
    """Warns, once a platform, that there is no kernel for it; silent where the user switched kernels off."""
    if disabled_operations() != frozenset():
        return
    for platform in platforms:
        if platform in _said:
            continue
        _said.add(platform)
        kernels = load(platform) if platform in MODULES else Kernels(reason="no kernels exist for this platform")
        if kernels.reason:
            warnings.warn(
                f"fedfuse_jax: no compiled kernels on platform {platform!r} ({kernels.reason}); the slower "
                "jax.numpy definitions run instead. fedfuse_jax.show_versions() says more.",
                stacklevel=2,
            )
