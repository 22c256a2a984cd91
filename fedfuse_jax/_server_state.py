"""The state of a server optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array

from fedfuse_jax import _jax_internals as internals

PyTree = Any


class ServerState(NamedTuple):
    """The state of a server optimizer, a pytree.

    Attributes:
      step: How many rounds moved the parameters, an int32 scalar; the greatest there is stays.
      first_moment: A tree like the parameters, float32 (float64 for float64 parameters).
      second_moment: Another.
    """

    step: Array
    first_moment: PyTree
    second_moment: PyTree


# So that an exported program may take and return one.
internals.register_namedtuple_serialization(ServerState, "fedfuse_jax.ServerState")
