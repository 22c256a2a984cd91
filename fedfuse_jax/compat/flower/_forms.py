"""The second form in which clients may send: Flower's `NDArrays`, a list of arrays per client."""

from typing import Any

import numpy as np
from jax import Array

PyTree = Any


def are_lists_of_arrays(updates: PyTree) -> bool:
    return isinstance(updates, list) and bool(updates) and all(isinstance(client, list) for client in updates)


def as_list_of_arrays(arrays: list[Array], models: list[Any]) -> list[np.ndarray]:
    """NumPy arrays with the models' dtypes."""
    return [np.asarray(a).astype(np.asarray(like).dtype) for a, like in zip(arrays, models, strict=True)]
