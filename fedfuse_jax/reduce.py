"""Linear reductions over clients, and the small whole-tree operations around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax._jax_internals import ad
from fedfuse_jax._primitive import (
    OPERATIONS,
    Axis,
    BoundCall,
    MeshAxes,
    Operand,
    Operands,
    Operation,
    all_reduce,
    coordinates_of_leaves,
)

PyTree = Any


# --- Operations -----------------------------------------------------------------------------------------------


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


def squared_norms(updates: PyTree, *, where: Any = None, axis_name: Any = None) -> Array:
    """Squares and sums each client's coordinates, over the whole tree.

    .. math:: s_i = \\|x_i\\|^2

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      where: ``(n_clients,)`` bool, the clients that take part; an absent client's norm is 0, NaN or not.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded, and the norms are summed over them.

    Returns:
      ``(n_clients,)``, float32, or float64 if any leaf is. Sums are kept in float64, so that a billion
      coordinates keep their digits; a squared norm beyond float32 is inf.

    Raises:
      TypeError: A leaf is not floating point, or ``where`` is not bool.
      ValueError: Leaves and ``where`` disagree on the number of clients, there is none, or
        ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> ff.squared_norms({"w": jnp.array([[3.0, 0.0], [1.0, 2.0]]), "b": jnp.array([4.0, 2.0])}).tolist()
      [25.0, 9.0]

    Source:
      The norm that clipping rules clip: McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Notes:
      *Differentiability*: in ``updates``, to any order.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients`` numbers, sharded clients nothing.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves them by a few ulp.
    """
    leaves, n_clients = checks.client_stacked("squared_norms", updates)
    where = checks.participation("squared_norms", where, n_clients)
    axis_name = checks.mesh_axes("squared_norms", axis_name)
    dtype = checks.tree_accumulator(leaves.arrays)
    (norms,) = SQUARED_NORMS.bind({"updates": leaves.arrays, "where": where}, (dtype.name,))
    return norms if axis_name is None else lax.psum(norms, axis_name)


def finite_clients(updates: PyTree, *, axis_name: Any = None) -> Array:
    """Tells which clients sent nothing but finite numbers, over the whole tree.

    .. math:: f_i = \\bigwedge_j |x_{ij}| < \\infty

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded.

    Returns:
      ``(n_clients,)`` bool, made to be passed as ``where``.

    Raises:
      TypeError: A leaf is not floating point.
      ValueError: Leaves disagree on the number of clients, there is none, or
        ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, jnp.inf]])
      >>> ff.finite_clients(updates).tolist()
      [True, False, False]
      >>> ff.weighted_mean(updates, where=ff.finite_clients(updates)).tolist()
      [1.0, 2.0]

    Source:
      The guard TensorFlow Federated's finalizers apply to a whole round, per client.

    Notes:
      *Differentiability*: none; the result is boolean.
      *Sharding*: sharded parameters cost one all-reduce of ``n_clients`` numbers, sharded clients nothing.
      *Determinism*: exact.
    """
    leaves, _ = checks.client_stacked("finite_clients", updates)
    axis_name = checks.mesh_axes("finite_clients", axis_name)
    (finite,) = FINITE_CLIENTS.bind({"updates": leaves.arrays}, ("bool",))
    return finite if axis_name is None else all_reduce("all", finite, axis_name)


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


def export_checks() -> list[Any]:
    """Lists the exemptions that ``jax.export`` needs for this package's custom calls.

    .. math:: \\{\\texttt{fedfuse.}o\\texttt{.v1} : o \\text{ an operation}\\}

    Args:
      None.

    Returns:
      One ``jax.export.DisabledSafetyCheck`` per operation; the targets' names are stable.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax import export
      >>> import fedfuse_jax as ff
      >>> updates = jax.ShapeDtypeStruct((3, 4), jnp.float32)
      >>> exported = export.export(jax.jit(ff.coordinate_median), disabled_checks=ff.export_checks())(updates)
      >>> export.deserialize(exported.serialize()).call(jnp.ones((3, 4))).tolist()
      [1.0, 1.0, 1.0, 1.0]

    Source:
      https://docs.jax.dev/en/latest/export/export.html.

    Notes:
      *Differentiability*: does not apply. *Sharding*: a program exported for several devices runs each
      operation on gathered operands; export the per-device program of a ``shard_map`` instead.
      *Determinism*: does not apply.
    """
    from jax import export

    return [export.DisabledSafetyCheck.custom_call(operation.target) for operation in OPERATIONS.values()]


# --- Derivatives and shards of the linear family ----------------------------------------------------------------


def _per_leaf(function: Any, updates: Sequence[Array], out_dtypes: Sequence[str]) -> list[Array]:
    return [function(leaf, dtype) for leaf, dtype in zip(updates, out_dtypes, strict=True)]


def _with_tangents(tangents: Sequence[Array | None]) -> list[int]:
    """The leaves that have a tangent: derivatives run over those alone."""
    return [leaf for leaf, tangent in enumerate(tangents) if tangent is not None]


def _masked(weights: Array, where: Array | None) -> Array:
    return weights if where is None else jnp.where(where, weights, 0)


def _linear_definition(*, updates: Any, weights: Any, where: Any, out_dtypes: Any, divide: bool) -> list[Array]:
    define = reference.weighted_mean if divide else reference.weighted_sum
    # One call for the whole list, so that the total weight is summed in the tree's accumulator.
    results = define(updates, weights, where=where)
    return [result.astype(dtype) for result, dtype in zip(results, out_dtypes, strict=True)]


def _linear_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, divide = call.layout, call.layout.attribute("divide")
    weights, where = primals["weights"], primals["where"]
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = _with_tangents(tangents["updates"])
    if leaves:
        operands = {"updates": [tangents["updates"][i] for i in leaves], "weights": weights, "where": where}
        dtypes = [layout.out_dtypes[i] for i in leaves]
        for leaf, value in zip(leaves, call.bind(call.operation, operands, dtypes, divide=divide), strict=True):
            out[leaf] = value
    if tangents["weights"] is not None:
        dtypes = [reference.accumulator_dtype(x.dtype).name for x in primals["updates"]]
        operands = {"updates": primals["updates"], "weights": tangents["weights"], "where": where}
        values = call.bind(WEIGHTED_SUM, operands, dtypes, divide=False)
        assert call.results is not None
        for leaf, (value, result) in enumerate(zip(values, call.results, strict=True)):
            if divide:
                total = _masked(weights, where).sum(-1).astype(value.dtype)
                slope = _masked(tangents["weights"], where).sum(-1).astype(value.dtype)
                drift = result.astype(value.dtype) * call.scalar(slope, value.ndim)
                value = (value - drift) / call.scalar(total, value.ndim)
            value, known = value.astype(result.dtype), out[leaf]
            out[leaf] = value if known is None else known + value
    return out


def _linear_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, where = operands["weights"], operands["where"]
    if ad.is_undefined_primal(weights):
        dots_of = {"updates": operands["updates"], "others": cotangents, "where": where}
        (dots,) = call.bind(CLIENT_DOTS, dots_of, (weights.aval.dtype.name,), shared=True)
        return {"weights": dots}
    scale = weights
    if call.layout.attribute("divide"):
        scale = weights / _masked(weights, where).sum(-1, keepdims=True)
    return {"updates": _spread(call, scale, where, cotangents, operands["updates"])}


def _spread(
    call: BoundCall, scale: Array, where: Array | None, cotangents: list[Array], leaves: list[Any]
) -> list[Array | None]:
    """``scaleᵢ · cotangent`` for every client of the leaves whose cotangent is asked for."""
    out: list[Array | None] = [None] * len(leaves)
    apart: list[int] = []
    for leaf, (cotangent, primal) in enumerate(zip(cotangents, leaves, strict=True)):
        if not ad.is_undefined_primal(primal):
            continue
        shape, batch = primal.aval.shape, range(call.batch_dims)
        summed = [i for i in batch if shape[i] == 1 and scale.shape[i] != 1 and cotangent.shape[i] != 1]
        if summed:
            out[leaf] = _contracted_product(call, scale, where, cotangent, summed, primal.aval.dtype)
        else:
            apart.append(leaf)
    if apart:
        operands = {"weights": scale, "cotangents": [cotangents[leaf] for leaf in apart], "where": where}
        dtypes = [leaves[leaf].aval.dtype.name for leaf in apart]
        for leaf, spread in zip(apart, call.bind(WEIGHTED_SPREAD, operands, dtypes), strict=True):
            out[leaf] = spread
    return out


def _contracted_product(
    call: BoundCall, scale: Array, where: Array | None, cotangent: Array, summed: list[int], dtype: Any
) -> Array:
    """The same for a leaf that batch axes share: contracting over them never makes the batch of products."""
    accumulator = reference.accumulator_dtype(dtype)
    scale = _masked(scale, where).astype(accumulator)
    batch, clients = range(call.batch_dims), call.batch_dims
    parameters = [clients + 1 + i for i in range(cotangent.ndim - clients)]
    product = jnp.einsum(
        scale,
        [*batch, clients],
        cotangent.astype(accumulator),
        [*batch, *parameters],
        [*(i for i in batch if i not in summed), clients, *parameters],
        precision=lax.Precision.HIGHEST,
    )
    product = jnp.expand_dims(product, summed)
    if where is not None:
        # Not even a NaN cotangent may reach a client that is absent from all of the batch.
        present = jnp.any(where, axis=[i for i in summed if where.shape[i] != 1], keepdims=True)
        product = jnp.where(call.per_client(present, product.ndim), product, 0)
    return product.astype(dtype)


def linear_partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Sharded clients are summed where they are, in the accumulator's dtype, and all-reduced."""
    names = mesh_axes.get("clients", ())
    if not names:
        return call.run_local(operands)
    dtypes = tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in operands["updates"])
    # A mean of shards is the mean of sums: the division waits until the sums are whole.
    layout = call.layout._replace(out_dtypes=dtypes, attributes=(("divide", False),))
    sums = WEIGHTED_SUM.run_local(operands, layout)
    totals, total_weight = lax.psum((sums, _masked(operands["weights"], operands["where"]).sum(-1)), names)
    if call.layout.attribute("divide"):
        totals = [total / call.scalar(total_weight, total.ndim).astype(total.dtype) for total in totals]
    return [total.astype(dtype) for total, dtype in zip(totals, call.layout.out_dtypes, strict=True)]


def _linear(name: str) -> Operation:
    return Operation(
        name,
        operands=(
            Operand("updates", ("clients",), per_leaf=True),
            Operand("weights", ("clients",)),
            Operand("where", ("clients",), optional=True),
        ),
        results=(Operand("reduced", per_leaf=True),),
        definition=_linear_definition,
        partitioned=linear_partitioned,
        jvp=_linear_jvp,
        transpose=_linear_transpose,
    )


WEIGHTED_SUM = _linear("weighted_sum")
WEIGHTED_MEAN = _linear("weighted_mean")


def _spread_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, where = call.layout, primals["where"]
    out: list[Array | None] = [None] * layout.num_leaves
    leaves = _with_tangents(tangents["cotangents"])
    if leaves:
        chosen = [tangents["cotangents"][leaf] for leaf in leaves]
        operands = {"weights": primals["weights"], "cotangents": chosen, "where": where}
        dtypes = [layout.out_dtypes[leaf] for leaf in leaves]
        for leaf, value in zip(leaves, call.bind(WEIGHTED_SPREAD, operands, dtypes), strict=True):
            out[leaf] = value
    if tangents["weights"] is not None:
        operands = {"weights": tangents["weights"], "cotangents": primals["cotangents"], "where": where}
        values = call.bind(WEIGHTED_SPREAD, operands, layout.out_dtypes)
        out = [value if known is None else known + value for known, value in zip(out, values, strict=True)]
    return out


def _spread_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    weights, where, inner = operands["weights"], operands["where"], operands["cotangents"]
    if ad.is_undefined_primal(weights):
        dots_of = {"updates": cotangents, "others": inner, "where": where}
        return {"weights": call.bind(CLIENT_DOTS, dots_of, (weights.aval.dtype.name,), shared=True)[0]}
    dtypes = [x.aval.dtype.name for x in inner]
    summed = {"updates": cotangents, "weights": weights, "where": where}
    return {"cotangents": call.bind(WEIGHTED_SUM, summed, dtypes, divide=False)}


def _spread_definition(*, weights: Any, cotangents: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return reference.weighted_spread(weights, cotangents, where=where, dtypes=out_dtypes)


WEIGHTED_SPREAD = Operation(
    "weighted_spread",
    operands=(
        Operand("weights", ("clients",)),
        Operand("cotangents", per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("spread", ("clients",), per_leaf=True),),
    definition=_spread_definition,
    jvp=_spread_jvp,
    transpose=_spread_transpose,
)


# --- Norms and dots ---------------------------------------------------------------------------------------------


def num_blocks(sizes: Any, layout: Any) -> Any:
    """The blocks of coordinates that sums over coordinates are taken in, of all leaves; see ffi/contract."""
    block, blocks = 16384, 0
    for coordinates in coordinates_of_leaves(sizes, layout.num_leaves):
        blocks = blocks + (coordinates + block - 1) // block
    return blocks


def block_sums_workspace(sizes: Any, layout: Any) -> Any:
    """One float64 per client and block of coordinates."""
    bytes_per_partial = 8
    partials = num_blocks(sizes, layout) * sizes["clients"]
    for i in range(layout.batch_dims):
        partials = partials * sizes[f"batch{i}"]
    return partials * bytes_per_partial


def _dots_definition(*, updates: Any, others: Any, where: Any, out_dtypes: Any, shared: bool) -> list[Array]:
    return [reference.client_dots(updates, others, shared=shared, where=where).astype(out_dtypes[0])]


def _dots_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    total: Array | None = None
    for varied, fixed in (("updates", "others"), ("others", "updates")):
        leaves = _with_tangents(tangents[varied])
        if leaves:
            operands = {
                varied: [tangents[varied][i] for i in leaves],
                fixed: [primals[fixed][i] for i in leaves],
                "where": primals["where"],
            }
            dtypes = call.layout.out_dtypes
            (dots,) = call.bind(call.operation, operands, dtypes, shared=call.layout.attribute("shared"))
            total = dots if total is None else total + dots
    return [total]


def _dots_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    (cotangent,) = cotangents
    where, shared = operands["where"], call.layout.attribute("shared")
    updates, others = operands["updates"], operands["others"]
    if shared and any(map(ad.is_undefined_primal, others)):
        dtypes = [reference.accumulator_dtype(other.aval.dtype).name for other in others]
        summed = {"updates": updates, "weights": cotangent, "where": where}
        return {"others": call.bind(WEIGHTED_SUM, summed, dtypes, divide=False)}
    wanted, known = ("updates", others) if any(map(ad.is_undefined_primal, updates)) else ("others", updates)
    if where is not None:
        cotangent = jnp.where(where, cotangent, 0)
    products = []
    for leaf in known:
        factor = call.over_clients(leaf) if shared else leaf
        if where is not None:
            # Before anything is multiplied, so that an absent client's NaN makes no other.
            factor = jnp.where(call.per_client(where, factor.ndim), factor, 0)
        products.append(call.per_client(cotangent, factor.ndim) * factor.astype(cotangent.dtype))
    return {wanted: products}


def _dots_operands(shared: bool) -> tuple[Operand, ...]:
    return (
        Operand("updates", ("clients",), per_leaf=True),
        Operand("others", () if shared else ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    )


CLIENT_DOTS = Operation(
    "client_dots",
    operands=_dots_operands,
    results=lambda shared: (Operand("dots", ("clients",)),),
    definition=_dots_definition,
    reduce="sum",
    jvp=_dots_jvp,
    transpose=_dots_transpose,
    workspace=block_sums_workspace,
)


def _norms_definition(*, updates: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.squared_norms(updates, where=where).astype(out_dtypes[0])]


def _norms_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    leaves = _with_tangents(tangents["updates"])
    operands = {
        "updates": [primals["updates"][i] for i in leaves],
        "others": [tangents["updates"][i] for i in leaves],
        "where": primals["where"],
    }
    (dots,) = call.bind(CLIENT_DOTS, operands, call.layout.out_dtypes, shared=False)
    return [2 * dots]


SQUARED_NORMS = Operation(
    "squared_norms",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("norms", ("clients",)),),
    definition=_norms_definition,
    reduce="sum",
    jvp=_norms_jvp,
    workspace=block_sums_workspace,
)

FINITE_CLIENTS = Operation(
    "finite_clients",
    operands=(Operand("updates", ("clients",), per_leaf=True),),
    results=(Operand("finite", ("clients",)),),
    definition=lambda updates, out_dtypes: [reference.finite_clients(updates)],
    reduce="all",
)


# --- Streaming and stacking -------------------------------------------------------------------------------------


def _accumulate_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    out: list[Array | None] = []
    for leaf, total in enumerate(primals["total"]):
        terms = []
        if tangents["total"][leaf] is not None:
            terms.append(tangents["total"][leaf])
        if tangents["update"][leaf] is not None:
            weight = call.scalar(primals["weight"].astype(total.dtype), total.ndim)
            terms.append(weight * tangents["update"][leaf].astype(total.dtype))
        if tangents["weight"] is not None:
            slope = call.scalar(tangents["weight"].astype(total.dtype), total.ndim)
            terms.append(slope * primals["update"][leaf].astype(total.dtype))
        out.append(sum(terms[1:], terms[0]) if terms else None)
    assert call.results is not None
    return [
        None if tangent is None else jnp.broadcast_to(tangent, result.shape)
        for tangent, result in zip(out, call.results, strict=True)
    ]


ACCUMULATE_WEIGHTED = Operation(
    "accumulate_weighted",
    operands=(
        Operand("total", per_leaf=True),
        Operand("update", per_leaf=True),
        Operand("weight"),
    ),
    results=(Operand("total", per_leaf=True),),
    definition=lambda total, update, weight, out_dtypes: reference.accumulate_weighted(total, update, weight),
    jvp=_accumulate_jvp,
    aliased=("total",),
)


def _stack_definition(*, out_dtypes: Any, num_clients: int, **clients: Any) -> list[Array]:
    return reference.stack_clients([clients[f"client{i}"] for i in range(num_clients)])


def _stack_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    instantiated = {
        name: [jnp.zeros_like(x) if t is None else t for x, t in zip(primals[name], tangents[name], strict=True)]
        for name in primals
    }
    return list(call.bind(STACK_CLIENTS, instantiated, call.layout.out_dtypes, **dict(call.layout.attributes)))


def _stack_transpose(call: BoundCall, cotangents: list[Array], operands: Operands) -> Operands:
    return {
        f"client{i}": [lax.index_in_dim(ct, i, call.batch_dims, keepdims=False) for ct in cotangents]
        for i in range(call.layout.attribute("num_clients"))
    }


STACK_CLIENTS = Operation(
    "stack_clients",
    operands=lambda num_clients: tuple(Operand(f"client{i}", per_leaf=True) for i in range(num_clients)),
    results=lambda num_clients: (Operand("stacked", ("clients",), per_leaf=True),),
    new_axes=lambda num_clients: {"clients": num_clients},
    definition=_stack_definition,
    jvp=_stack_jvp,
    transpose=_stack_transpose,
)
