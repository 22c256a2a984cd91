"""Quantised updates: their weighted sum, and the codes of an update."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._client_update import leaves_of_client, whole_leaves
from fedfuse_jax._primitives.quantized import QUANTIZED_WEIGHTED_SUM, code_layout, is_regular

PyTree = Any


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
    layout = code_layout(num_bytes, num_params, num_bits, block_size)
    if is_regular(**layout):
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
    leaves = leaves_of_client(name, "update", update)
    _check_num_bits(name, num_bits)
    if block_size is not None:
        block_size = checks.python_int(name, "block_size", block_size, 1)
    if key is not None:
        key = checks.random_key(name, key)
    return reference.quantize(whole_leaves(leaves), num_bits=num_bits, block_size=block_size, key=key)


def _check_num_bits(operation: str, num_bits: Any) -> None:
    if isinstance(num_bits, bool) or not isinstance(num_bits, int | np.integer):
        raise TypeError(
            f"{operation}: num_bits is {checks.describe(num_bits)}; it needs to be the Python integer 8 or 4."
        )
    if num_bits not in (4, 8):
        raise ValueError(f"{operation}: num_bits is {num_bits}; it needs to be 8 or 4.")
