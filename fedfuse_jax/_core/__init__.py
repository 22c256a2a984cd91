"""The factory: an operation is declared once, and becomes a JAX primitive.

Read `operation` first, then `declaration`, `lowering` and `sharding`.
"""

from fedfuse_jax._core.bound_call import BoundCall
from fedfuse_jax._core.declaration import (
    MAX_BATCH_DIMS,
    Axis,
    Layout,
    MeshAxes,
    Operand,
    Operands,
    coordinates_of_leaves,
)
from fedfuse_jax._core.operation import OPERATIONS, Operation
from fedfuse_jax._core.reductions import REDUCTIONS, all_reduce

__all__ = [
    "MAX_BATCH_DIMS",
    "OPERATIONS",
    "REDUCTIONS",
    "Axis",
    "BoundCall",
    "Layout",
    "MeshAxes",
    "Operand",
    "Operands",
    "Operation",
    "all_reduce",
    "coordinates_of_leaves",
]
