"""One client's update at a time: the running sum, and the stack of trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax._primitives.streaming import ACCUMULATE_WEIGHTED, STACK_CLIENTS

PyTree = Any


def accumulate_weighted(total: PyTree, update: PyTree, weight: Any) -> PyTree:
    """Adds one client's weighted update to a running sum: the streaming form of ``weighted_sum``.

    .. math:: t \\leftarrow t + w \\, x

    Donate ``total`` to a jitted caller and its buffers are updated in place.

    Args:
      total: Pytree of running sums: float32 leaves, float64 where the update's leaf is.
      update: One client's pytree (no client axis) of the same structure and shapes, of float32, bfloat16,
        float16 or float64 leaves.
      weight: A real scalar.

    Returns:
      The new running sums, like ``total``.

    Raises:
      TypeError: A leaf is not floating point, ``total`` is not in the accumulator's dtype, or ``weight`` is not
        a real number.
      ValueError: The two trees differ in structure or shapes, or ``weight`` is not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> total = {"w": jnp.zeros(2)}
      >>> for update, weight in [([1.0, 2.0], 3), ([5.0, 0.0], 1)]:
      ...     total = ff.accumulate_weighted(total, {"w": jnp.array(update)}, weight)
      >>> total["w"].tolist()
      [8.0, 6.0]

    Source:
      The streaming mean of FedJAX's ``tree_mean`` (Ro et al. 2021, https://arxiv.org/abs/2108.02117), with a
      float32 sum for low-precision leaves.

    Notes:
      *Differentiability*: in all three arguments.
      *Sharding*: any, without collectives.
      *Determinism*: the same bits for any number of threads, chunking and sharding.
    """
    name = "accumulate_weighted"
    new = checks.float_leaves(name, "update", update)
    old = checks.float_leaves(name, "total", total)
    if old.treedef != new.treedef:
        raise ValueError(f"{name}: update has the structure {new.treedef}; it needs total's, {old.treedef}.")
    for running, leaf, old_path, new_path in zip(old.arrays, new.arrays, old.paths, new.paths, strict=True):
        needed = reference.accumulator_dtype(leaf.dtype)
        if running.shape != leaf.shape:
            raise ValueError(f"{name}: {new_path} has shape {leaf.shape}; it needs {old_path}'s, {running.shape}.")
        if running.dtype != needed:
            raise TypeError(
                f"{name}: {old_path} has dtype {running.dtype}; it needs {needed}, the accumulator of "
                f"{leaf.dtype} updates."
            )
    scalar = checks.real_scalar(name, "weight", weight, checks.tree_accumulator(old.arrays))
    operands = {"total": old.arrays, "update": new.arrays, "weight": scalar}
    return old.unflatten(ACCUMULATE_WEIGHTED.bind(operands, tuple(x.dtype.name for x in old.arrays)))


def stack_clients(updates: Sequence[PyTree]) -> PyTree:
    """Stacks a list of n clients' trees into one client-stacked tree, in one pass over the bytes.

    .. math:: y_i = x_i

    Args:
      updates: A list (or any sequence) of n ≥ 1 pytrees of the same structure, shapes and floating dtypes.

    Returns:
      A pytree whose leaves have a leading client axis ``(n, *shape)``, of the leaves' dtypes.

    Raises:
      TypeError: A leaf is not floating point, or ``updates`` is not a sequence of trees.
      ValueError: There is no client, or a client's tree differs from the first one's.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.stack_clients([{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}])["w"].tolist()
      [[1.0], [2.0]]

    Source:
      What every FedJAX-like server does before an order statistic; ``jnp.stack`` leaf by leaf.

    Notes:
      *Differentiability*: linear; the cotangent of client i is the i-th slice.
      *Sharding*: parameters may be sharded in any way, without collectives.
      *Determinism*: exact.
    """
    name = "stack_clients"
    if not isinstance(updates, Sequence) or isinstance(updates, str | bytes):
        got = checks.describe(updates)
        raise TypeError(f"{name}: updates is {got}; it needs a list of pytrees, one per client.")
    if len(updates) == 0:
        raise ValueError(f"{name}: updates has no clients; it needs a list of at least one pytree.")
    clients = [checks.float_leaves(name, f"updates[{i}]", client) for i, client in enumerate(updates)]
    first = clients[0]
    for i, client in enumerate(clients):
        if client.treedef != first.treedef:
            raise ValueError(
                f"{name}: updates[{i}] has the structure {client.treedef}; it needs {first.treedef}, like the first "
                "client's."
            )
        for array, path, model in zip(client.arrays, client.paths, first.arrays, strict=True):
            if array.shape != model.shape or array.dtype != model.dtype:
                got, needed = checks.describe(array), checks.describe(model)
                raise ValueError(f"{name}: {path} is {got}; it needs {needed}, like the first client's.")
    operands = {f"client{i}": client.arrays for i, client in enumerate(clients)}
    dtypes = tuple(array.dtype.name for array in first.arrays)
    return first.unflatten(STACK_CLIENTS.bind(operands, dtypes, num_clients=len(clients)))
