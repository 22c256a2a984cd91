"""The median, the trimmed mean and the mean around the median, coordinate by coordinate."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax._core import Operation
from fedfuse_jax._primitives.order_statistics import COORDINATE_MEDIAN, MEAN_AROUND_MEDIAN, TRIMMED_MEAN

PyTree = Any


def coordinate_median(updates: PyTree, *, where: Any = None, out_dtype: Any = None) -> PyTree:
    """Takes the median of the clients in every coordinate.

    .. math:: y_j = \\operatorname{median}_i x_{ij}

    For an even number of clients, the mean of the two middle values. Every leaf ``(n_clients, *shape)`` becomes
    ``(*shape)``. NaN counts as the greatest value, so that the median gives NaN only when half of the clients do.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).

    Returns:
      A pytree like ``updates`` without the client axis; NaN when nobody takes part.

    Raises:
      TypeError: A leaf is not floating point, or ``where`` is not bool.
      ValueError: Leaves and ``where`` disagree on the number of clients, or there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.coordinate_median(jnp.array([[1.0, 5.0], [2.0, -4.0], [1e9, jnp.nan]])).tolist()
      [2.0, 5.0]

    Source:
      Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
      *Differentiability*: almost everywhere; the cotangent goes to the middle client or, in halves, to the two;
      at ties to the client of lower rank (smaller value, then lower index).
      *Sharding*: parameters may be sharded in any way, without collectives; sharded clients are first resharded
      to parameters.
      *Determinism*: the same bits for any number of threads, chunking, sharding and instruction set.
    """
    name = "coordinate_median"
    leaves, n_clients = checks.client_stacked(name, updates)
    where = checks.participation(name, where, n_clients)
    trim: int | Array
    if where is not None:
        trim = reference.median_trim_count(jnp.sum(where, dtype=jnp.int32))
    elif isinstance(n_clients, int):
        trim = reference.median_trim_count(n_clients)
    else:  # a symbolic number of clients, in an export
        trim = reference.median_trim_count(jnp.asarray(n_clients, jnp.int32))
    return _bind_order_statistic(COORDINATE_MEDIAN, leaves, trim, where, out_dtype)


def trimmed_mean(
    updates: PyTree,
    trim_count: Any = None,
    *,
    trim_fraction: float = 0.2,
    where: Any = None,
    out_dtype: Any = None,
) -> PyTree:
    """Averages, in every coordinate, what is left without the k smallest and the k largest values.

    .. math:: y_j = \\frac{1}{m - 2k} \\sum_{r=k}^{m-k-1} x_{(r)j}

    with :math:`x_{(0)j} \\le \\dots \\le x_{(m-1)j}` the sorted values of the m clients that take part. Every leaf
    ``(n_clients, *shape)`` becomes ``(*shape)``. NaN counts as the greatest value: up to k NaN clients are trimmed
    like any other bad ones.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      trim_count: k, a Python integer, or a traced integer scalar that may change without a recompile. Wins over
        ``trim_fraction``.
      trim_fraction: A Python number f in [0, 1): k = int(f · m), as SciPy and Flower compute it, for the m clients
        that take part.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).

    Returns:
      A pytree like ``updates`` without the client axis; NaN when nobody takes part, or a traced k leaves nobody.

    Raises:
      TypeError: A leaf is not floating point, ``where`` is not bool, ``trim_count`` is not an integer, or
        ``trim_fraction`` is not a Python number.
      ValueError: 2k ≥ n_clients, or a negative k; leaves and ``where`` disagree on the number of clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0], [2.0], [3.0], [jnp.nan], [-1e9]])
      >>> ff.trimmed_mean(updates).tolist(), ff.trimmed_mean(updates, 2).tolist()
      ([2.0], [2.0])

    Source:
      Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
      *Differentiability*: almost everywhere; every kept client gets its share of the cotangent, at ties the client
      of lower rank (smaller value, then lower index) comes first.
      *Sharding*: parameters may be sharded in any way, without collectives; sharded clients are first resharded
      to parameters.
      *Determinism*: the same bits for any number of threads, chunking and sharding.
    """
    name = "trimmed_mean"
    leaves, n_clients = checks.client_stacked(name, updates)
    where = checks.participation(name, where, n_clients)
    trim = _trim_count(trim_count, trim_fraction, where, n_clients)
    return _bind_order_statistic(TRIMMED_MEAN, leaves, trim, where, out_dtype)


def mean_around_median(updates: PyTree, num_byzantine: int, *, where: Any = None, out_dtype: Any = None) -> PyTree:
    """Averages, in every coordinate, all values but the f farthest from the median.

    .. math:: y_j = \\frac{1}{m - f} \\sum_{i \\in N_j} x_{ij}

    with :math:`N_j` the m − f clients whose values are nearest :math:`\\operatorname{median}_i x_{ij}`, of the m that
    take part. Of two equally near values the smaller is taken. Every leaf ``(n_clients, *shape)`` becomes ``(*shape)``.
    Known as MeaMed. NaN counts as the greatest value and is farther from anything than infinity is.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      num_byzantine: f, a Python integer, less than the number of clients. The paper's guarantee needs 2f < m.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      out_dtype: Dtype of every result leaf, rounded once. Default: float32 (float64 for float64 leaves).

    Returns:
      A pytree like ``updates`` without the client axis; NaN when no more than f clients take part.

    Raises:
      TypeError: A leaf is not floating point, ``where`` is not bool, or ``num_byzantine`` is not a Python integer.
      ValueError: ``num_byzantine`` is negative or leaves nobody; leaves and ``where`` disagree on the number of
        clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0], [2.0], [3.0], [2.5], [1e9]])
      >>> ff.mean_around_median(updates, 2).tolist()
      [2.5]

    Source:
      Xie et al. 2018, https://arxiv.org/abs/1802.10116.

    Notes:
      *Differentiability*: almost everywhere; every kept client gets its share of the cotangent. The kept clients are
      consecutive in rank (value, then index), also where some tie.
      *Sharding*: parameters may be sharded in any way, without collectives; sharded clients are first resharded
      to parameters.
      *Determinism*: the same bits for any number of threads, chunking and sharding.
    """
    name = "mean_around_median"
    leaves, n_clients = checks.client_stacked(name, updates)
    where = checks.participation(name, where, n_clients)
    f = checks.python_int(name, "num_byzantine", num_byzantine, 0)
    if isinstance(n_clients, int) and f >= n_clients:
        raise ValueError(
            f"{name}: num_byzantine is {f}; it needs to be less than n_clients, and there are {n_clients} clients."
        )
    dtypes = checks.result_dtypes(name, leaves.arrays, out_dtype)
    operands = {"updates": leaves.arrays, "where": where, "trim_count": None}
    return leaves.unflatten(MEAN_AROUND_MEDIAN.bind(operands, dtypes, trim=f, around_median=True))


def _trim_count(trim_count: Any, trim_fraction: Any, where: Array | None, n_clients: Any) -> int | Array:
    """k as a Python integer where it is known, as an int32 scalar where it is not."""
    name = "trimmed_mean"
    if trim_count is None:
        return _trim_count_from_fraction(trim_fraction, where, n_clients)
    if isinstance(trim_count, int | np.integer | float | str):
        k = checks.python_int(name, "trim_count", trim_count, 0)
        # `where` can only make it worse: k that leaves nobody out of everybody leaves nobody out of fewer.
        if isinstance(n_clients, int) and 2 * k >= n_clients:
            raise ValueError(
                f"{name}: trim_count is {k}; it needs 2 · trim_count < n_clients, and there are {n_clients} clients."
            )
        return k
    needed = "an integer scalar"
    array = checks.as_given(name, "trim_count", trim_count, needed)
    if not checks.is_integer(array):
        raise TypeError(f"{name}: trim_count has dtype {array.dtype}; it needs {needed}.")
    if array.shape != ():
        raise ValueError(f"{name}: trim_count has shape {array.shape}; it needs {needed}.")
    # A count beyond int32 leaves nobody, as -1 and the largest int32 do.
    if isinstance(array, np.ndarray):
        return jnp.asarray(min(max(array.item(), -1), checks.LARGEST_INT32), np.int32)
    limits = jnp.iinfo(array.dtype)
    return jnp.clip(array, max(-1, limits.min), min(checks.LARGEST_INT32, limits.max)).astype(jnp.int32)


def _trim_count_from_fraction(trim_fraction: Any, where: Array | None, n_clients: Any) -> int | Array:
    name = "trimmed_mean"
    checks.python_number(name, "trim_fraction", trim_fraction, needed="a Python number (trim_count may be traced)")
    if not 0 <= trim_fraction < 1:
        raise ValueError(f"{name}: trim_fraction is {trim_fraction}; it needs to be at least 0 and less than 1.")
    if not isinstance(n_clients, int):
        raise ValueError(f"{name}: the number of clients is symbolic ({n_clients}); it needs trim_count then.")
    if where is not None:
        counts = jnp.asarray(reference.trim_counts(trim_fraction, n_clients))
        return counts[jnp.sum(where, dtype=jnp.int32)]
    k = int(trim_fraction * n_clients)
    if 2 * k >= n_clients:
        raise ValueError(
            f"{name}: trim_fraction is {trim_fraction}, which drops {k} clients at either end; it needs to leave at "
            f"least one of {n_clients} clients."
        )
    return k


def _bind_order_statistic(
    operation: Operation, leaves: checks.Leaves, trim: int | Array, where: Array | None, out_dtype: Any
) -> PyTree:
    dtypes = checks.result_dtypes(operation.name, leaves.arrays, out_dtype)
    static = isinstance(trim, int)
    operands = {"updates": leaves.arrays, "where": where, "trim_count": None if static else trim}
    return leaves.unflatten(operation.bind(operands, dtypes, trim=trim if static else -1))
