"""Weighted sums and means of the clients' updates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fedfuse_jax import _checks as checks
from fedfuse_jax._primitives.linear import WEIGHTED_MEAN, WEIGHTED_SUM

PyTree = Any


def weighted_sum(updates: PyTree, weights: Any, *, where: Any = None, out_dtype: Any = None) -> PyTree:
    """Sums the clients' updates, each times its weight, in mixed precision.

    .. math:: y = \\sum_i w_i x_i

    Every leaf ``(n_clients, *shape)`` becomes ``(*shape)``. Sums accumulate in float32 (float64 for float64
    leaves) in client order, whatever the dtype of the leaves.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised. Zero times NaN is NaN: to leave a client
        out, use ``where``.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: the accumulator's.

    Returns:
      A pytree like ``updates`` without the client axis; zeros when nobody takes part.

    Raises:
      TypeError: A leaf is not floating point, or ``weights`` or ``where`` is not what it needs to be.
      ValueError: Leaves, ``weights`` and ``where`` disagree on the number of clients, or there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.weighted_sum(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([2, -1])).tolist()
      [-1.0, 0.0]

    Source:
      The linear aggregation under FedAvg: McMahan et al. 2017, https://arxiv.org/abs/1602.05629.

    Notes:
      *Differentiability*: in ``updates`` and ``weights``, to any order; an absent client's gradient is exactly 0.
      *Sharding*: parameters may be sharded in any way, without collectives; sharded clients are summed where
      they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    leaves, n_clients = checks.client_stacked("weighted_sum", updates)
    weights = checks.per_client("weighted_sum", "weights", weights, n_clients, checks.tree_accumulator(leaves.arrays))
    where = checks.participation("weighted_sum", where, n_clients)
    dtypes = checks.result_dtypes("weighted_sum", leaves.arrays, out_dtype)
    operands = {"updates": leaves.arrays, "weights": weights, "where": where}
    return leaves.unflatten(WEIGHTED_SUM.bind(operands, dtypes, divide=False))


def weighted_mean(updates: PyTree, weights: Any = None, *, where: Any = None, out_dtype: Any = None) -> PyTree:
    """Averages the clients' updates, each with its weight, in mixed precision.

    .. math:: y = \\sum_i w_i x_i \\Big/ \\sum_i w_i

    Every leaf ``(n_clients, *shape)`` becomes ``(*shape)``. Both sums run over the clients that take part, in
    client order, in float32 (float64 for float64 leaves).

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised, such as numbers of examples. ``None``: the
        plain mean. Zero times NaN is NaN: to leave a client out, use ``where``.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: the accumulator's.

    Returns:
      A pytree like ``updates`` without the client axis; NaN when nobody takes part.

    Raises:
      TypeError: A leaf is not floating point, or ``weights`` or ``where`` is not what it needs to be.
      ValueError: Leaves, ``weights`` and ``where`` disagree on the number of clients, or there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([0.0, 8.0])}
      >>> mean = ff.weighted_mean(updates, jnp.array([3, 1]))
      >>> mean["w"].tolist(), mean["b"].tolist()
      ([1.5, 2.5], 2.0)

    Source:
      FedAvg: McMahan et al. 2017, https://arxiv.org/abs/1602.05629.

    Notes:
      *Differentiability*: in ``updates`` and ``weights``, to any order; an absent client's gradient is exactly 0.
      *Sharding*: parameters may be sharded in any way, without collectives; sharded clients are summed where
      they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    leaves, n_clients = checks.client_stacked("weighted_mean", updates)
    dtype = checks.tree_accumulator(leaves.arrays)
    if weights is None:
        weights = jnp.ones((n_clients,), dtype)
    weights = checks.per_client("weighted_mean", "weights", weights, n_clients, dtype)
    where = checks.participation("weighted_mean", where, n_clients)
    dtypes = checks.result_dtypes("weighted_mean", leaves.arrays, out_dtype)
    operands = {"updates": leaves.arrays, "weights": weights, "where": where}
    return leaves.unflatten(WEIGHTED_MEAN.bind(operands, dtypes, divide=True))
