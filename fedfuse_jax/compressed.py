"""Sparse and quantised updates: what clients send when bandwidth is dear, and their sum, never made dense."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._jax_internals import ad
from fedfuse_jax._primitive import Axis, BoundCall, Operand, Operands, Operation

PyTree = Any

# --- Sparse updates -------------------------------------------------------------------------------------------


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


def _whole(leaves: checks.Leaves) -> list[Array]:
    """The leaves of one client's update, gathered where types say that they are sharded."""
    return [internals.replicated(array) for array in leaves.arrays]


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
    leaves = _leaves(name, "update", update)
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
        left = _leaves(name, "residual", residual)
        if left.treedef != leaves.treedef:
            raise ValueError(f"{name}: residual has the structure {left.treedef}; it needs update's, {leaves.treedef}.")
        for array, path, model in zip(left.arrays, left.paths, leaves.arrays, strict=True):
            needed = reference.accumulator_dtype(model.dtype)
            if array.shape != model.shape:
                raise ValueError(f"{name}: {path} has shape {array.shape}; it needs update's, {model.shape}.")
            if array.dtype != needed:
                raise TypeError(f"{name}: {path} has dtype {array.dtype}; it needs {needed}.")
        old = left.arrays
    arrays = _whole(leaves)
    values, indices, rest = reference.topk_sparsify(arrays, k, old and [internals.replicated(array) for array in old])
    return values, indices, leaves.unflatten(rest)


# --- Quantised updates ----------------------------------------------------------------------------------------


def quantized_weighted_sum(
    codes: Any,
    scales: Any,
    zero_points: Any,
    weights: Any,
    *,
    num_bits: int = 8,
    num_params: int | None = None,
    block_size: int | None = None,
    where: Any = None,
) -> Array:
    """Sums quantised client updates, each times its weight, dequantising in registers.

    .. math:: y_p = \\sum_i w_i s_{ib} (q_{ip} - z_{ib}), \\qquad b = \\lfloor p / \\text{block\\_size} \\rfloor

    Args:
      codes: ``(n_clients, num_params)`` uint8 or int8; with ``num_bits=4``, ``(n_clients, ceil(num_params / 2))``
        of two codes a byte, the low half first: 0 … 15 in uint8, −8 … 7 (two's complement) in int8.
      scales: Real ``(n_clients,)``, or ``(n_clients, n_blocks)`` with ``block_size``.
      zero_points: Real numbers, integers or not, shaped like ``scales``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised. Zero times NaN is NaN: to leave a client
        out, use ``where``.
      num_bits: 8 or 4, the width of a code.
      num_params: The length of the result. ``None``: as many as there are codes; it is needed for an odd number
        of 4-bit codes.
      block_size: How many adjacent coordinates share a scale and a zero point; the last block may be short.
        ``None``: all of a client's.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.

    Returns:
      ``(num_params,)`` float32 (float64 if scales or zero points are); zeros when nobody takes part.

    Raises:
      TypeError: ``codes`` are not uint8 or int8, a size is not a Python integer, or the others are not real.
      ValueError: ``num_bits`` is neither 8 nor 4, ``block_size`` is less than 1, there is no client, or the shapes
        do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> codes = jnp.array([[0, 10, 255], [1, 2, 3]], jnp.uint8)
      >>> scales, zero_points = jnp.array([0.5, 1.0]), jnp.array([10, 0])
      >>> ff.quantized_weighted_sum(codes, scales, zero_points, jnp.array([2.0, 1.0])).tolist()
      [-9.0, 2.0, 248.0]
      >>> packed = jnp.array([[0x21, 0x03]], jnp.uint8)
      >>> ff.quantized_weighted_sum(packed, jnp.ones(1), jnp.zeros(1), jnp.ones(1), num_bits=4, num_params=3).tolist()
      [1.0, 2.0, 3.0]

    Source:
      Affine quantisation: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; of updates: Konečný et al. 2016,
      https://arxiv.org/abs/1610.05492; by blocks: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.

    Notes:
      *Differentiability*: in ``scales``, ``zero_points`` and ``weights``, to any order; codes are integers.
      *Sharding*: parameters may be sharded without collectives where every shard holds whole bytes of whole
      blocks (of one scale a client, any); otherwise they are gathered. Sharded clients are summed where they are and
      all-reduced (client order is waived then).
      *Determinism*: clients are added in order: the same bits for any number of threads and any chunking.
    """
    name = "quantized_weighted_sum"
    _check_num_bits(name, num_bits)
    needed = "uint8 or int8 of shape (n_clients, num_params)" if num_bits == 8 else (
        "uint8 or int8 of shape (n_clients, ceil(num_params / 2)), two 4-bit codes a byte"
    )  # fmt: skip
    codes = checks.matrix_per_client(name, "codes", codes, None, jnp.integer, needed)
    if codes.dtype not in (np.uint8, np.int8):
        raise TypeError(f"{name}: codes has dtype {codes.dtype}; it needs {needed}.")
    codes = jnp.asarray(codes)
    n_clients, num_bytes = codes.shape
    per_byte = 8 // num_bits
    if num_params is None:
        num_params = num_bytes * per_byte
    else:
        num_params = checks.python_int(name, "num_params", num_params, 0)
        if num_bytes != -(-num_params // per_byte):
            raise ValueError(
                f"{name}: codes has shape {codes.shape}; it needs ({n_clients}, {-(-num_params // per_byte)}) for "
                f"num_params = {num_params} codes of {num_bits} bits."
            )
    num_blocks = None
    if block_size is not None:
        block_size = checks.python_int(name, "block_size", block_size, 1)
        num_blocks = (num_params + block_size - 1) // block_size
    scales = _per_block(name, "scales", scales, n_clients, num_blocks)
    zero_points = _per_block(name, "zero_points", zero_points, n_clients, num_blocks)
    dtype = checks.accumulator_of(scales, zero_points)
    scales = checks.in_dtype(name, "scales", scales, dtype)
    zero_points = checks.in_dtype(name, "zero_points", zero_points, dtype)
    layout = _code_layout(num_bytes, num_params, num_bits, block_size)
    if _is_regular(**layout):
        codes = codes[:, None] if num_blocks is None else codes.reshape(n_clients, num_blocks, -1)
    if num_blocks is None:
        scales, zero_points = scales[:, None], zero_points[:, None]
    operands = {
        "codes": codes,
        "scales": scales,
        "zero_points": zero_points,
        "weights": checks.per_client(name, "weights", weights, n_clients, dtype),
        "where": checks.participation(name, where, n_clients),
    }
    (total,) = QUANTIZED_WEIGHTED_SUM.bind(operands, (dtype.name,), **layout)
    return internals.flattened(total)


def _per_block(operation: str, argument: str, value: Any, n_clients: Any, num_blocks: Any) -> Array | np.ndarray:
    """Real numbers as given, one for each client or for each block of each client."""
    shape: tuple[Any, ...] = (n_clients,) if num_blocks is None else (n_clients, num_blocks)
    whose = "one per client (more need a block_size)" if num_blocks is None else "one per client and block"
    needed = f"real numbers of shape {shape}, {whose}"
    array = checks.real_numbers(operation, argument, value, needed)
    if array.dtype == bool:
        raise TypeError(f"{operation}: {argument} has dtype {array.dtype}; it needs {needed}.")
    if array.shape != shape:
        raise ValueError(f"{operation}: {argument} has shape {array.shape}; it needs {needed}.")
    return array


def quantize(
    update: PyTree, *, num_bits: int = 8, block_size: int | None = None, key: Any = None
) -> tuple[Array, Array, Array]:
    """Quantises one client's update to 8 or 4 bits a coordinate, between the extremes of each block.

    .. math:: s = \\frac{\\max x - \\min x}{2^b - 1}, \\qquad z = -\\frac{\\min x}{s}, \\qquad
       q = \\operatorname{round}\\Big(\\frac{x}{s} + z\\Big), \\qquad x \\approx s (q - z)

    Runs on the client; ``vmap`` does many clients at once. What it gives is what ``quantized_weighted_sum`` takes.

    Args:
      update: One client's update: an array of any shape, or a pytree, which counts as one vector, leaf after
        leaf in row-major order. float32, bfloat16, float16 or float64 leaves.
      num_bits: 8 or 4, the width of a code.
      block_size: How many adjacent coordinates share a scale and a zero point; the last block may be short.
        ``None``: all of them.
      key: A JAX key, typed or raw ``uint32[2]``: round up or down at random, so that the expectation of what
        comes out is what went in. ``None``: to the nearest.

    Returns:
      ``(codes, scales, zero_points)``. ``codes``: uint8, ``(num_params,)``, or for 4 bits two a byte, the low
      half first, ``(ceil(num_params / 2),)``. The others: float32 (float64 for float64 updates), scalars, or
      ``(n_blocks,)`` with ``block_size``. Rounding to the nearest is off by half a scale at most (and a few ulp of the
      block's extremes); a block of equal values comes back exactly. The scale of a block with an infinity or NaN in it
      is NaN, and so is all that is made of it.

    Raises:
      TypeError: A leaf is not floating point, ``block_size`` is not a Python integer, or ``key`` is not a key.
      ValueError: ``num_bits`` is neither 8 nor 4, ``block_size`` is less than 1, or ``key`` is not a single key.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> codes, scale, zero_point = ff.quantize(jnp.array([-1.0, 0.0, 1.55]))
      >>> codes.tolist(), round(float(scale), 4), round(float(zero_point), 4)
      ([0, 100, 255], 0.01, 100.0)

    Source:
      Jacob et al. 2018, https://arxiv.org/abs/1712.05877; stochastic rounding: Suresh et al. 2017,
      https://arxiv.org/abs/1611.00429.

    Notes:
      *Differentiability*: none through the codes; scales and zero points in ``update``.
      *Sharding*: a client's own business; a sharded update is gathered.
      *Determinism*: the same key gives the same codes: ``jax.random.uniform(key, (num_params,))`` decides.
    """
    name = "quantize"
    leaves = _leaves(name, "update", update)
    _check_num_bits(name, num_bits)
    if block_size is not None:
        block_size = checks.python_int(name, "block_size", block_size, 1)
    if key is not None:
        key = checks.random_key(name, key)
    return reference.quantize(_whole(leaves), num_bits=num_bits, block_size=block_size, key=key)


def _leaves(operation: str, argument: str, tree: PyTree) -> checks.Leaves:
    """The tree's leaves, none of them offloaded to the host's memory: `jax.numpy` computes with them."""
    leaves = checks.float_leaves(operation, argument, tree)
    return leaves._replace(arrays=[internals.in_device_memory(array) for array in leaves.arrays])


def _check_num_bits(operation: str, num_bits: Any) -> None:
    if isinstance(num_bits, bool) or not isinstance(num_bits, int | np.integer):
        raise TypeError(
            f"{operation}: num_bits is {checks.describe(num_bits)}; it needs to be the Python integer 8 or 4."
        )
    if num_bits not in (4, 8):
        raise ValueError(f"{operation}: num_bits is {num_bits}; it needs to be 8 or 4.")


# --- Rotation -------------------------------------------------------------------------------------------------


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
    leaves = _leaves("hadamard_rotation", "update", update)
    for leaf, path in zip(leaves.arrays, leaves.paths, strict=True):
        _check_size_to_pad("hadamard_rotation", path, leaf.shape)
    key = checks.random_key("hadamard_rotation", key)
    return leaves.unflatten(reference.hadamard_rotation(_whole(leaves), key))


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
    leaves = _leaves(name, "rotated", rotated)
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
    return leaves.unflatten(reference.inverse_hadamard_rotation(_whole(leaves), key, models))


# --- The sparse sum and its derivatives -------------------------------------------------------------------------
#
# Three bilinear operations, each the transpose of another: Σᵢⱼ wᵢ xᵢⱼ e(ιᵢⱼ), wᵢ y(ιᵢⱼ) and Σⱼ xᵢⱼ y(ιᵢⱼ).


def _linear_jvp(*operands: str) -> Any:
    """The derivative of what is linear in each of ``operands`` alone: the operation itself on the tangents."""

    def jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
        total: Array | None = None
        attributes = dict(call.layout.attributes)
        for name in operands:
            if tangents[name] is None:
                continue
            varied = {**primals, name: tangents[name]}
            (term,) = call.bind(call.operation, varied, call.layout.out_dtypes, **attributes)
            total = term if total is None else total + term
        return [total]

    return jvp


def _sparse_sum_definition(
    *, values: Any, indices: Any, weights: Any, where: Any, out_dtypes: Any, num_params: int
) -> list[Array]:
    return [reference.topk_sparse_weighted_sum(values, indices, weights, num_params, where=where)]


def _sparse_sum_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    values, weights = operands["values"], operands["weights"]
    if ad.is_undefined_primal(weights):
        dots_of = {**operands, "vector": cotangents[0]}
        return {"weights": call.bind(SPARSE_DOTS, dots_of, (weights.aval.dtype.name,))[0]}
    spread_of = {**operands, "vector": cotangents[0]}
    return {"values": call.bind(SPARSE_SPREAD, spread_of, (values.aval.dtype.name,))[0]}


def _sparse_workspace(sizes: Any, layout: Any) -> Any:
    """Whether a client's indices are sorted, a byte each; see ffi/contract/compressed.h."""
    rows = sizes["clients"]
    for i in range(layout.batch_dims):
        rows = rows * sizes[f"batch{i}"]
    return rows


TOPK_SPARSE_WEIGHTED_SUM = Operation(
    "topk_sparse_weighted_sum",
    operands=lambda num_params: (
        Operand("values", ("clients", "k")),
        Operand("indices", ("clients", "k")),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda num_params: (Operand("total", ("params",)),),
    new_axes=lambda num_params: {"params": num_params},
    definition=_sparse_sum_definition,
    reduce="sum",
    jvp=_linear_jvp("values", "weights"),
    transpose=_sparse_sum_transpose,
    workspace=_sparse_workspace,
)


def _sparse_spread_definition(*, indices: Any, weights: Any, vector: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.sparse_spread(indices, weights, vector, where=where, dtype=out_dtypes[0])]


def _sparse_spread_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, vector = operands["weights"], operands["vector"]
    back = {**operands, "values": cotangents[0]}
    if ad.is_undefined_primal(weights):
        return {"weights": call.bind(SPARSE_DOTS, back, (weights.aval.dtype.name,))[0]}
    (total,) = call.bind(TOPK_SPARSE_WEIGHTED_SUM, back, (vector.aval.dtype.name,), num_params=vector.aval.shape[-1])
    return {"vector": total}


SPARSE_SPREAD = Operation(
    "sparse_spread",
    operands=(
        Operand("indices", ("clients", "k")),
        Operand("weights", ("clients",)),
        Operand("vector", ("params",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("spread", ("clients", "k")),),
    definition=_sparse_spread_definition,
    whole_axes=("params",),
    jvp=_linear_jvp("weights", "vector"),
    transpose=_sparse_spread_transpose,
)


def _sparse_dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    values, vector = operands["values"], operands["vector"]
    back = {**operands, "weights": cotangents[0]}
    if ad.is_undefined_primal(values):
        return {"values": call.bind(SPARSE_SPREAD, back, (values.aval.dtype.name,))[0]}
    (total,) = call.bind(TOPK_SPARSE_WEIGHTED_SUM, back, (vector.aval.dtype.name,), num_params=vector.aval.shape[-1])
    return {"vector": total}


SPARSE_DOTS = Operation(
    "sparse_dots",
    operands=(
        Operand("values", ("clients", "k")),
        Operand("indices", ("clients", "k")),
        Operand("vector", ("params",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("dots", ("clients",)),),
    definition=lambda values, indices, vector, where, out_dtypes: [
        reference.sparse_dots(values, indices, vector, where=where)
    ],
    whole_axes=("params",),
    reduce="sum",
    jvp=_linear_jvp("values", "vector"),
    transpose=_sparse_dots_transpose,
)


# --- The quantised sum and its derivatives ----------------------------------------------------------------------
#
# Codes lie in memory one client after the other, whatever their shape says. Where blocks are of equal size and whole
# bytes, an axis for the blocks and one for what is within them lets both be sharded. Elsewhere a client's bytes stay
# together.


def _code_layout(num_bytes: Any, num_params: Any, num_bits: int, block_size: int | None) -> dict[str, Any]:
    """The attributes that say how codes lie.

    ``block_size``: of irregular blocks; 0 where all are alike, as shapes show. ``num_params``: of an odd number of
    4-bit codes; −1 where there are as many as bytes have room for.
    """
    is_odd = num_bits == 4 and isinstance(num_params, int) and num_params != 2 * num_bytes
    irregular = block_size is not None and not (
        isinstance(num_params, int)
        and num_params > 0
        and num_params % block_size == 0
        and (num_bits == 8 or block_size % 2 == 0)
    )
    return {
        "num_bits": num_bits,
        "num_params": num_params if is_odd else -1,
        "block_size": block_size if irregular else 0,
    }


def _is_regular(*, num_bits: int, num_params: int, block_size: int) -> bool:
    return block_size == 0 and num_params < 0


def _blocks_axis(**layout: int) -> Axis:
    return "blocks" if _is_regular(**layout) else "irregular_blocks"


def _coordinate_axes(**layout: int) -> tuple[Axis, ...]:
    """The axes of one number per coordinate."""
    if layout["num_params"] >= 0:
        return ("params",)
    halves = ("half",) if layout["num_bits"] == 4 else ()
    return ("blocks", "within", *halves) if _is_regular(**layout) else ("bytes", *halves)


def _code_axes(**layout: int) -> tuple[Axis, ...]:
    return ("clients", "blocks", "within") if _is_regular(**layout) else ("clients", "bytes")


def _new_coordinate_axes(**layout: int) -> dict[Axis, int]:
    if layout["num_params"] >= 0:
        return {"params": layout["num_params"]}
    return {"half": 2} if layout["num_bits"] == 4 else {}


_WHOLE_COORDINATE_AXES = ("bytes", "half", "irregular_blocks", "params")


def _flat_options(codes: Array, blocks: int, layout: dict[str, int]) -> tuple[Array, dict[str, Any]]:
    """Unbatched codes and options as the definitions take them."""
    flat = codes.reshape(codes.shape[0], math.prod(codes.shape[1:]))
    block_size: Any = layout["block_size"]
    if block_size == 0:
        size = layout["num_params"] if layout["num_params"] >= 0 else flat.shape[1] * 8 // layout["num_bits"]
        block_size = size // blocks if isinstance(size, int) and blocks != 1 else None
    options = {"num_bits": layout["num_bits"], "block_size": block_size}
    return flat, options


def _per_block_arrays(block_size: int | None, *arrays: Array) -> list[Array]:
    return [x[:, 0] for x in arrays] if block_size is None else list(arrays)


def _quantized_sum_definition(
    *, codes: Any, scales: Any, zero_points: Any, weights: Any, where: Any, out_dtypes: Any, **layout: int
) -> list[Array]:
    flat, options = _flat_options(codes, scales.shape[1], layout)
    scales, zero_points = _per_block_arrays(options["block_size"], scales, zero_points)
    num_params = layout["num_params"] if layout["num_params"] >= 0 else None
    total = reference.quantized_weighted_sum(
        flat, scales, zero_points, weights, num_params=num_params, where=where, **options
    )
    if num_params is not None:
        return [total]
    return [total.reshape(codes.shape[1:] + ((2,) if layout["num_bits"] == 4 else ()))]


def _over_coordinates(per_block: Array, model: Any, call: BoundCall) -> Array:
    """``(*batch, n_blocks)`` numbers, one for each coordinate, in the shape of ``model``'s coordinates."""
    coordinates = model.shape[call.batch_dims :]
    block_size = call.layout.attribute("block_size")
    if block_size == 0:
        spread = per_block.reshape(per_block.shape + (1,) * (len(coordinates) - 1))
    else:
        block = jnp.arange(math.prod(coordinates)) // block_size
        spread = jnp.take(per_block, block, axis=-1)
        spread = spread.reshape(*spread.shape[:-1], *coordinates)
    return jnp.broadcast_to(spread, model.shape)


def _sum_over_coordinates(vector: Array, num_blocks: int, call: BoundCall) -> Array:
    """One number per coordinate, summed over each block: ``(*batch, n_blocks)``."""
    batch, block_size = vector.shape[: call.batch_dims], call.layout.attribute("block_size")
    if block_size == 0:
        first = call.batch_dims + (1 if _is_regular(**dict(call.layout.attributes)) else 0)
        total = vector.sum(tuple(range(first, vector.ndim)))
        return total if first > call.batch_dims else total[..., None]
    size = math.prod(vector.shape[call.batch_dims :])
    flat = vector.reshape(*batch, size)
    padded = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, num_blocks * block_size - size)])
    return padded.reshape(*batch, num_blocks, block_size).sum(-1)


def _product_of_present(where: Array | None, *factors: Array) -> Array:
    """A product of ``(*batch, clients, blocks)`` numbers, 0 for the absent; and so in derivatives, NaN or not."""

    def present(x: Array) -> Array:
        return x if where is None else jnp.where(where[..., None], x, 0)

    return present(functools.reduce(jnp.multiply, map(present, factors)))


def _quantized_sum_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    (total,) = _linear_jvp("scales", "weights")(call, primals, tangents)
    if tangents["zero_points"] is not None:
        assert call.results is not None
        slopes = _product_of_present(primals["where"], primals["scales"], primals["weights"][..., None])
        drifts = _product_of_present(primals["where"], slopes, tangents["zero_points"])
        drift = _over_coordinates(-drifts.sum(-2), call.results[0], call)
        total = drift if total is None else total + drift
    return [total]


def _quantized_sum_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    scales, weights = operands["scales"], operands["weights"]
    known = weights if ad.is_undefined_primal(scales) else scales
    (dots,) = call.bind(
        QUANTIZED_DOTS, {**operands, "vector": cotangents[0]}, (known.dtype.name,), **dict(call.layout.attributes)
    )
    if ad.is_undefined_primal(weights):
        return {"weights": _product_of_present(operands["where"], scales, dots).sum(-1)}
    return {"scales": _product_of_present(operands["where"], weights[..., None], dots)}


QUANTIZED_WEIGHTED_SUM = Operation(
    "quantized_weighted_sum",
    operands=lambda **layout: (
        Operand("codes", _code_axes(**layout)),
        Operand("scales", ("clients", _blocks_axis(**layout))),
        Operand("zero_points", ("clients", _blocks_axis(**layout))),
        Operand("weights", ("clients",)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda **layout: (Operand("total", _coordinate_axes(**layout)),),
    new_axes=_new_coordinate_axes,
    definition=_quantized_sum_definition,
    whole_axes=_WHOLE_COORDINATE_AXES,
    reduce="sum",
    jvp=_quantized_sum_jvp,
    transpose=_quantized_sum_transpose,
)


def _quantized_dots_definition(
    *, codes: Any, zero_points: Any, vector: Any, where: Any, out_dtypes: Any, **layout: int
) -> list[Array]:
    num_blocks = zero_points.shape[1]
    flat, options = _flat_options(codes, num_blocks, layout)
    (zero_points,) = _per_block_arrays(options["block_size"], zero_points)
    vector = vector.reshape(math.prod(vector.shape))
    dots = reference.quantized_dots(flat, zero_points, vector, where=where, **options)
    return [dots.reshape(flat.shape[0], num_blocks).astype(out_dtypes[0])]


def _quantized_dots_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    dots: Array | None = None
    if tangents["vector"] is not None:
        # Linear in the vector alone: the zero points stay.
        (dots,) = _linear_jvp("vector")(call, primals, tangents)
    if tangents["zero_points"] is not None:
        sums = _sum_over_coordinates(primals["vector"], primals["zero_points"].shape[-1], call)
        assert call.results is not None
        drift = -_product_of_present(primals["where"], tangents["zero_points"], sums[..., None, :])
        drift = jnp.broadcast_to(drift, call.results[0].shape)
        dots = drift if dots is None else dots + drift
    return [dots]


def _quantized_dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    (cotangent,) = cotangents
    ones = jnp.ones(cotangent.shape[:-1], cotangent.dtype)
    back = {**operands, "scales": cotangent, "weights": ones}
    dtypes = (operands["vector"].aval.dtype.name,)
    return {"vector": call.bind(QUANTIZED_WEIGHTED_SUM, back, dtypes, **dict(call.layout.attributes))[0]}


QUANTIZED_DOTS = Operation(
    "quantized_dots",
    operands=lambda **layout: (
        Operand("codes", _code_axes(**layout)),
        Operand("zero_points", ("clients", _blocks_axis(**layout))),
        Operand("vector", _coordinate_axes(**layout)),
        Operand("where", ("clients",), optional=True),
    ),
    results=lambda **layout: (Operand("dots", ("clients", _blocks_axis(**layout))),),
    definition=_quantized_dots_definition,
    whole_axes=_WHOLE_COORDINATE_AXES,
    reduce="sum",
    jvp=_quantized_dots_jvp,
    transpose=_quantized_dots_transpose,
)
