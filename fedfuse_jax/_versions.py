"""What is installed, what is loaded, and why something is not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings

import jax
import jaxlib

from fedfuse_jax import _native

NEWEST_TESTED_JAX = (0, 12)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def warn_of_newer_jax() -> None:
    """Warns where JAX is of a release line that these tests have not seen: it may work, so nothing forbids it."""
    if jax.__version_info__[:2] > NEWEST_TESTED_JAX:
        newest = ".".join(map(str, NEWEST_TESTED_JAX))
        warnings.warn(
            f"fedfuse_jax: JAX {jax.__version__} is newer than {newest}, the newest that fedfuse-jax was tested with; "
            f"should something fail, look for a newer fedfuse-jax, or install 'jax=={newest}.*'.",
            stacklevel=3,
        )


def show_versions() -> None:
    """Prints the versions of everything that matters here, and which kernels are loaded or why they are not.

    .. math:: \\text{(prints a table; computes nothing)}

    Args:
      None.

    Returns:
      Nothing; the table goes to standard output. Paste it into a bug report.

    Raises:
      Nothing.

    Example:
      >>> import fedfuse_jax as ff
      >>> ff.show_versions()  # doctest: +ELLIPSIS
      fedfuse-jax ...

    Source:
      In the manner of ``numpy.show_config`` and ``sklearn.show_versions``.

    Notes:
      *Differentiability*, *sharding* and *determinism* do not apply.
    """
    runtime = _native.runtime_ffi_version()
    rows = [
        ("fedfuse-jax", _installed("fedfuse-jax")),
        ("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
        ("jax", jax.__version__),
        ("jaxlib", jaxlib.__version__),
        ("numpy", _installed("numpy")),
        ("XLA FFI API", "unknown" if runtime is None else f"{runtime[0]}.{runtime[1]}"),
    ]
    for name in _native.MODULES:
        kernels = _native.load(name)
        rows.append((f"{name} kernels", kernels.reason or f"loaded, {len(kernels.operations)} operations"))
        rows.extend((f"  {key.replace('_', ' ')}", value) for key, value in kernels.details.items())
    disabled = _native.disabled_operations()
    if disabled != frozenset():
        rows.append((_native.DISABLE_VARIABLE, "all operations" if disabled is None else ", ".join(sorted(disabled))))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
