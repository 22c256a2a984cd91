"""The randomised Hadamard rotation, which spreads an update's values before they are quantised."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax._client_update import leaves_of_client, whole_leaves

PyTree = Any


def hadamard_rotation(update: PyTree, key: Any) -> PyTree:
    """Rotates an update by random signs and a Walsh-Hadamard transform, which evens out its coordinates.

    .. math:: y = \\frac{1}{\\sqrt d} H D x, \\qquad D = \\operatorname{diag}(\\pm 1), \\quad
       H = H_2 \\otimes \\dots \\otimes H_2

    Before quantisation, it makes the range that the codes must span as small as the norm allows. It keeps norms
    and inner products, and the server may average rotated updates and rotate back once, if all clients use one key.

    Args:
      update: An array of any shape, or a pytree, rotated leaf by leaf: float32, bfloat16, float16 or float64.
      key: A JAX key, typed or raw ``uint32[2]``. An array, or a tree of one leaf, uses ``key`` itself; leaf i of
        several uses ``jax.random.split(key, n_leaves)[i]``.

    Returns:
      A pytree like ``update``, float32 (float64 for float64 leaves): each leaf becomes a vector whose length d is
      the leaf's size, padded with zeros to the next power of two.

    Raises:
      TypeError: A leaf is not floating point, or ``key`` is not a key.
      ValueError: There are no leaves, or ``key`` is not a single key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> spike = jnp.array([4.0, 0.0, 0.0, 0.0])
      >>> jnp.abs(ff.hadamard_rotation(spike, jax.random.key(0))).tolist()
      [2.0, 2.0, 2.0, 2.0]

    Source:
      Suresh et al. 2017, https://arxiv.org/abs/1611.00429. The same signs and order as FedJAX's
      ``structured_rotation``.

    Notes:
      *Differentiability*: linear in ``update``.
      *Sharding*: a client's own business; a sharded update is gathered.
      *Determinism*: the same key gives the same rotation.
    """
    leaves = leaves_of_client("hadamard_rotation", "update", update)
    for leaf, path in zip(leaves.arrays, leaves.paths, strict=True):
        _check_size_to_pad("hadamard_rotation", path, leaf.shape)
    key = checks.random_key("hadamard_rotation", key)
    return leaves.unflatten(reference.hadamard_rotation(whole_leaves(leaves), key))


def _check_size_to_pad(operation: str, argument: str, shape: tuple[Any, ...]) -> None:
    if not isinstance(math.prod(shape), int):
        raise ValueError(f"{operation}: {argument} has the symbolic shape {shape}; it needs sizes that are known.")


def inverse_hadamard_rotation(rotated: PyTree, key: Any, like: PyTree) -> PyTree:
    """Undoes ``hadamard_rotation``: transforms back, takes the signs away and cuts to shape.

    .. math:: x = \\frac{1}{\\sqrt d} D H y

    Args:
      rotated: What ``hadamard_rotation`` gave, or a weighted sum of such.
      key: The key of the rotation.
      like: A pytree of the same structure whose leaves have the shapes wanted: the update that was rotated, say, or
        ``jax.ShapeDtypeStruct``. Their values and dtypes do not matter.

    Returns:
      A pytree of the shapes of ``like``, float32 (float64 for float64 leaves).

    Raises:
      TypeError: A leaf is not floating point, or ``key`` is not a key.
      ValueError: The structures differ, or a leaf does not have the length that the rotation gives its shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> x, key = jnp.array([[1.0, 2.0, 3.0]]), jax.random.key(0)
      >>> ff.inverse_hadamard_rotation(ff.hadamard_rotation(x, key), key, like=x).tolist()
      [[1.0, 2.0, 3.0]]

    Source:
      Suresh et al. 2017, https://arxiv.org/abs/1611.00429; FedJAX's ``inverse_structured_rotation``.

    Notes:
      *Differentiability*: linear in ``rotated``.
      *Sharding*: a sharded vector is gathered.
      *Determinism*: the same key gives the same rotation.
    """
    name = "inverse_hadamard_rotation"
    leaves = leaves_of_client(name, "rotated", rotated)
    key = checks.random_key(name, key)
    models, treedef = jax.tree.flatten(like)
    if treedef != leaves.treedef:
        raise ValueError(f"{name}: like has the structure {treedef}; it needs rotated's, {leaves.treedef}.")
    for leaf, path, model in zip(leaves.arrays, leaves.paths, models, strict=True):
        shape = np.shape(model)
        _check_size_to_pad(name, path.replace("rotated", "like", 1), shape)
        length = reference.padded_size(math.prod(shape))
        if leaf.shape != (length,):
            raise ValueError(
                f"{name}: {path} has shape {leaf.shape}; it needs ({length},) for a leaf of shape {shape}."
            )
    return leaves.unflatten(reference.inverse_hadamard_rotation(whole_leaves(leaves), key, models))
