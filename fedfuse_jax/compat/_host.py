"""Arrays as their host has them: NumPy computes in float64 whatever JAX is set to, and makes floats of integers."""

import contextlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_floats(array: Any) -> Any:
    """Integers and booleans as the floats that a mean of them is: float64, for a JAX array what JAX makes of it."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if array.dtype == bool or jnp.issubdtype(array.dtype, np.integer):
        return array.astype(float)
    return array


def precision_of(arrays: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Where float64 is float64 if one of ``arrays``, of the host, is; elsewhere JAX is left as it is."""
    if any(np.asarray(array).dtype == np.float64 for array in arrays):
        return jax.enable_x64(True)
    return contextlib.nullcontext()


def as_numbers(values: Any) -> Any:
    """Numbers of examples: those of the host as float64, so that JAX rounds large integers and does not cut them."""
    if values is None or any(isinstance(value, jax.Array) for value in jax.tree.leaves(values)):
        return values if values is None else jnp.asarray(values)
    return as_floats(values)
