"""Sparse updates: their weighted sum, and top-k with error feedback."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._client_update import leaves_of_client, whole_leaves
from fedfuse_jax._primitives.sparse import TOPK_SPARSE_WEIGHTED_SUM

PyTree = Any


def topk_sparse_weighted_sum(values: Any, indices: Any, weights: Any, num_params: int, *, where: Any = None) -> Array:
    """Sums sparse client updates, each times its weight, into one dense vector.

    .. math:: y_p = \\sum_i \\sum_{j : \\iota_{ij} = p} w_i x_{ij}

    Client i sends the values x and their indices ι, both rows of the same length. No client's update is made
    dense on the way. Sorted indices, as ``topk_sparsify`` gives them, are fastest; any order is right.

    Args:
      values: ``(n_clients, k)`` float32, bfloat16, float16 or float64.
      indices: ``(n_clients, k)`` of any integer dtype. Duplicates add. An index outside [0, num_params) is
        ignored with its value, so that rows may be padded with −1.
      weights: ``(n_clients,)`` real numbers, signed, not normalised. Zero times NaN is NaN: to leave a client
        out, use ``where``.
      num_params: The length of the dense vector, a Python integer.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.

    Returns:
      ``(num_params,)`` float32 (float64 for float64 values); zeros where nobody sent anything. NaN and infinity
      reach the coordinates that they were sent for.

    Raises:
      TypeError: ``values`` are not floating point, ``indices`` not integers, ``num_params`` not a Python
        integer, or ``weights`` or ``where`` not what they need to be.
      ValueError: The shapes do not fit together, there is no client, or ``num_params`` is negative or beyond
        2³¹ − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> values = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> indices = jnp.array([[0, 2], [2, -1]])
      >>> ff.topk_sparse_weighted_sum(values, indices, jnp.array([1.0, 0.5]), 4).tolist()
      [1.0, 0.0, 3.5, 0.0]

    Source:
      The server's half of sparsified SGD: Aji and Heafield 2017, https://arxiv.org/abs/1704.05021; Lin et al.
      2018, https://arxiv.org/abs/1712.01887.

    Notes:
      *Differentiability*: in ``values`` and ``weights``, to any order; what is ignored has a gradient of exactly 0.
      *Sharding*: sharded clients are summed where they are and all-reduced (client order is waived then).
      *Determinism*: every coordinate is summed client after client, and within a client by position: the same
      bits for any number of threads and any order of the indices of different coordinates.
    """
    name = "topk_sparse_weighted_sum"
    needed = "floating-point values of shape (n_clients, k)"
    values = checks.matrix_per_client(name, "values", values, None, jnp.floating, needed)
    checks.supported_float(name, "values", values)
    values = jnp.asarray(values)
    n_clients = values.shape[0]
    num_params = checks.python_int(name, "num_params", num_params, 0)
    indices = _int32_indices(name, indices, values.shape, num_params)
    dtype = reference.accumulator_dtype(values.dtype)
    operands = {
        "values": values,
        "indices": indices,
        "weights": checks.per_client(name, "weights", weights, n_clients, dtype),
        "where": checks.participation(name, where, n_clients),
    }
    return TOPK_SPARSE_WEIGHTED_SUM.bind(operands, (dtype.name,), num_params=num_params)[0]


def _int32_indices(operation: str, indices: Any, shape: Any, num_params: int) -> Array:
    """Indices as the kernels take them; one that int32 cannot hold is out of range, not another index."""
    needed = f"integers of shape {shape}, one for each of the values"
    array = checks.as_given(operation, "indices", indices, needed)
    if isinstance(array, np.ndarray) and checks.is_integer(array):
        # JAX would cut them to 32 bits.
        array = np.where((array >= 0) & (array < num_params), array, -1).astype(np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{operation}: indices has dtype {array.dtype}; it needs {needed}.")
    if array.shape != shape:
        raise ValueError(f"{operation}: indices has shape {array.shape}; it needs {needed}.")
    if array.dtype.itemsize == 8:
        array = jnp.where((array >= 0) & (array < num_params), array, -1)
    # A uint32 beyond int32 turns negative, and so stays out of range.
    return jnp.asarray(array.astype(np.int32))


def topk_sparsify(update: PyTree, k: int, residual: PyTree | None = None) -> tuple[Array, Array, PyTree]:
    """Keeps the k entries of greatest magnitude of one client's update, and what it did not send for next time.

    .. math:: u = x + r, \\qquad \\text{send } (u_p, p) \\text{ for the } k \\text{ greatest } |u_p|,
       \\qquad r \\leftarrow u \\text{ with those entries } 0

    Runs on the client; ``vmap`` does many clients at once. What it sends is what ``topk_sparse_weighted_sum`` takes.

    Args:
      update: One client's update: an array of any shape, or a pytree, which counts as one vector, leaf after
        leaf in row-major order. float32, bfloat16, float16 or float64 leaves.
      k: How many entries to send, a Python integer.
      residual: What earlier rounds left over, as the last call returned it. ``None``: nothing.

    Returns:
      ``(values, indices, residual)``. ``values``: ``(k,)`` float32 (float64 for float64 updates). ``indices``:
      ``(k,)`` int32 positions in the vector, in ascending order. ``residual``: like ``update``, float32
      (float64), what was not sent. Of equal magnitudes the lower index is sent; NaN counts as the greatest magnitude.

    Raises:
      TypeError: A leaf is not floating point, ``k`` is not a Python integer, or ``residual`` is not float32
        (float64).
      ValueError: ``k`` is negative or more than there are entries, or ``residual`` has another structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> values, indices, residual = ff.topk_sparsify(jnp.array([1.0, -3.0, 2.0]), 1)
      >>> values.tolist(), indices.tolist(), residual.tolist()
      ([-3.0], [1], [1.0, 0.0, 2.0])
      >>> values, indices, residual = ff.topk_sparsify(jnp.array([1.0, 0.5, 2.0]), 1, residual)
      >>> values.tolist(), indices.tolist(), residual.tolist()
      ([4.0], [2], [2.0, 0.5, 0.0])

    Source:
      Error feedback: Stich et al. 2018, https://arxiv.org/abs/1809.07599; Karimireddy et al. 2019,
      https://arxiv.org/abs/1901.09847.

    Notes:
      *Differentiability*: ``values`` and the new residual in ``update`` and ``residual``, through the entries chosen.
      *Sharding*: a client's own business; a sharded update is gathered.
      *Determinism*: exact.
    """
    name = "topk_sparsify"
    leaves = leaves_of_client(name, "update", update)
    size = sum(leaf.size for leaf in leaves.arrays)
    k = checks.python_int(name, "k", k, 0)
    if not internals.is_known(lambda: k <= size):
        raise ValueError(
            f"{name}: update has a symbolic number of entries, {size}; it needs one known to be at least k."
        )
    if k > size:
        raise ValueError(f"{name}: k is {k}; it needs to be at most the number of entries of update, {size}.")
    if isinstance(size, int) and size > checks.LARGEST_INT32:
        raise ValueError(f"{name}: update has {size} entries; it needs to have at most {checks.LARGEST_INT32}.")
    old = None
    if residual is not None:
        left = leaves_of_client(name, "residual", residual)
        if left.treedef != leaves.treedef:
            raise ValueError(f"{name}: residual has the structure {left.treedef}; it needs update's, {leaves.treedef}.")
        for array, path, model in zip(left.arrays, left.paths, leaves.arrays, strict=True):
            needed = reference.accumulator_dtype(model.dtype)
            if array.shape != model.shape:
                raise ValueError(f"{name}: {path} has shape {array.shape}; it needs update's, {model.shape}.")
            if array.dtype != needed:
                raise TypeError(f"{name}: {path} has dtype {array.dtype}; it needs {needed}.")
        old = left.arrays
    arrays = whole_leaves(leaves)
    values, indices, rest = reference.topk_sparsify(arrays, k, old and [internals.replicated(array) for array in old])
    return values, indices, leaves.unflatten(rest)
