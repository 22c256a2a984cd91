"""The second form in which clients may send: Flower's `NDArrays`, a list of arrays per client."""

from typing import Any

import numpy as np

from fedfuse_jax.compat._host import as_floats

PyTree = Any


def are_lists_of_arrays(updates: PyTree) -> bool:
    return isinstance(updates, list) and bool(updates) and all(isinstance(client, list) for client in updates)


def floats_of_clients(clients: list[list[Any]]) -> list[list[np.ndarray]]:
    """The same arrays, of the host, with floats for integers."""
    return [[as_floats(np.asarray(array)) for array in client] for client in clients]


def as_list_of_arrays(arrays: list[Any], like: list[np.ndarray]) -> list[np.ndarray]:
    """NumPy arrays with the dtypes of others."""
    return [np.asarray(array).astype(other.dtype) for array, other in zip(arrays, like, strict=True)]
