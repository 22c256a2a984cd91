"""What a derivative or partitioning rule gets to know of the call that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from fedfuse_jax._core.declaration import (
    Layout,
    Operands,
)

if TYPE_CHECKING:
    from fedfuse_jax._core.operation import Operation


class BoundCall(NamedTuple):
    """What a derivative or partitioning rule gets to know of the call it stands for."""

    operation: Operation
    layout: Layout
    results: list[Array] | None  # the call's own results, in a derivative rule

    @property
    def batch_dims(self) -> int:
        return self.layout.batch_dims

    def bind(
        self, operation: Operation, operands: Operands, out_dtypes: Sequence[str], **attributes: Any
    ) -> list[Array]:
        """Calls another operation on operands with this call's batch axes."""
        return operation.bind_batched(operands, out_dtypes, self.batch_dims, tuple(sorted(attributes.items())))

    def run_local(self, operands: Operands, **changes: Any) -> list[Array]:
        """The kernel (or definition) on this device's shard; ``changes`` replace fields of the layout."""
        return self.operation.run_local(operands, self.layout._replace(**changes))

    def restrict(self, operands: Operands, leaves: Sequence[int]) -> Operands:
        """The operands of some of the leaves alone."""
        return {
            name: [value[leaf] for leaf in leaves] if isinstance(value, list) else value
            for name, value in operands.items()
        }

    def per_client(self, vector: Array, ndim: int) -> Array:
        """Reshapes ``(*batch, n_clients)`` to broadcast against a client-stacked leaf of ``ndim`` dimensions."""
        return vector.reshape(vector.shape + (1,) * (ndim - vector.ndim))

    def scalar(self, value: Array, ndim: int) -> Array:
        """Reshapes ``(*batch,)`` to broadcast against an array of ``ndim`` dimensions."""
        return value.reshape(value.shape + (1,) * (ndim - value.ndim))

    def over_clients(self, leaf: Array) -> Array:
        """Gives ``(*batch, *parameters)`` a client axis of size 1."""
        return jnp.expand_dims(leaf, self.batch_dims)
