"""What ``jax.export`` needs to know of our custom calls."""

from __future__ import annotations

from typing import Any

from fedfuse_jax._core import OPERATIONS


def export_checks() -> list[Any]:
    """Lists the exemptions that ``jax.export`` needs for this package's custom calls.

    .. math:: \\{\\texttt{fedfuse.}o\\texttt{.v1} : o \\text{ an operation}\\}

    Args:
      None.

    Returns:
      One ``jax.export.DisabledSafetyCheck`` per operation; the targets' names are stable.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax import export
      >>> import fedfuse_jax as ff
      >>> updates = jax.ShapeDtypeStruct((3, 4), jnp.float32)
      >>> exported = export.export(jax.jit(ff.coordinate_median), disabled_checks=ff.export_checks())(updates)
      >>> export.deserialize(exported.serialize()).call(jnp.ones((3, 4))).tolist()
      [1.0, 1.0, 1.0, 1.0]

    Source:
      https://docs.jax.dev/en/latest/export/export.html.

    Notes:
      *Differentiability*: does not apply. *Sharding*: a program exported for several devices runs each
      operation on gathered operands; export the per-device program of a ``shard_map`` instead.
      *Determinism*: does not apply.
    """
    from jax import export

    return [export.DisabledSafetyCheck.custom_call(operation.target) for operation in OPERATIONS.values()]
