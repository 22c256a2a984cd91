"""Sums that tell little of any one client: clipped, with Gaussian noise, or both."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._primitive import Axis, BoundCall, MeshAxes, Operand, Operands, Operation, all_reduce
from fedfuse_jax.reduce import CLIENT_DOTS, WEIGHTED_SUM, block_sums_workspace

PyTree = Any


# --- Operations -----------------------------------------------------------------------------------------------


def clipped_weighted_sum(
    updates: PyTree,
    weights: Any,
    max_norm: Any,
    *,
    where: Any = None,
    return_norms: bool = False,
    axis_name: Any = None,
) -> Any:
    """Sums the clients' updates, each shortened to a norm of at most ``max_norm``, times its weight.

    .. math:: y = \\sum_i w_i \\min(1, C / \\|x_i\\|) \\, x_i

    The norm is that of the whole tree. A client adds or takes away at most :math:`|w_i| C`, whatever it sends: one
    with a NaN or an infinity contributes exactly 0, and one whose squared norm overflows is clipped like any other.

    Args:
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised.
      max_norm: C, a real scalar, at least 0. A traced one below 0, or NaN, makes the result NaN.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      return_norms: Whether to return the clients' norms too; they cost nothing.
      axis_name: Inside your own ``shard_map`` the operation sees its block alone: name the mesh axes (one or a
        tuple) over which the parameters are sharded, and the norms are taken over all of them.

    Returns:
      A pytree like ``updates`` without the client axis, float32 (float64 for float64 leaves); zeros when nobody
      takes part. With ``return_norms``, a pair of it and the norms ``(n_clients,)``, before clipping, 0 for an
      absent client; a norm that is not finite is returned as it is, and so is one beyond their dtype, as infinity: that
      client contributes 0 too.

    Raises:
      TypeError: A leaf is not floating point, or another argument is not what it needs to be.
      ValueError: Leaves, ``weights`` and ``where`` disagree on the number of clients, or there is none; or
        ``max_norm`` is a Python number below 0, or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> updates = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5], [jnp.inf, 0.0]]), "b": jnp.array([4.0, 0.0, 1.0])}
      >>> total, norms = ff.clipped_weighted_sum(updates, jnp.ones(3), 1.0, return_norms=True)
      >>> [round(x, 4) for x in total["w"].tolist()], round(float(total["b"]), 4), norms.tolist()
      ([0.6, 0.5], 0.8, [5.0, 0.5, inf])

    Source:
      McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Notes:
      *Sensitivity*: the kernels take norms in float64 and round the clip factor towards zero, so that a clipped
      client's share, before it is added, exceeds :math:`|w_i| C` by a few float64 ulp at most; adding it rounds.
      *Differentiability*: almost everywhere, in ``updates``, ``weights`` and ``max_norm``; the gradient of an
      absent client, and of one whose norm is not finite, is exactly 0.
      *Sharding*: sharded parameters cost one all-reduce of O(``n_clients``) numbers, and a second call. Sharded clients
      are summed where they are and all-reduced (client order is waived then).
      *Determinism*: the same bits for any number of threads; sharding the parameters moves norms by a few ulp.
    """
    return _bind(CLIPPED_WEIGHTED_SUM, None, updates, weights, max_norm, None, where, return_norms, axis_name)


def noisy_weighted_sum(key: Any, updates: PyTree, weights: Any, stddev: Any, *, where: Any = None) -> PyTree:
    """Sums the clients' updates, each times its weight, and adds Gaussian noise made on the way.

    .. math:: y = \\sum_i w_i x_i + \\sigma z, \\qquad z \\sim \\mathcal{N}(0, I)

    The noise equals ``jax.random.normal(key, shape, float32)``: the same random bits, and values to a few ulp. An
    array, or a tree of one leaf, uses ``key`` itself, leaf i of several ``jax.random.split(key, n_leaves)[i]``: a leaf
    is noised just as an array alone is under that key.

    Args:
      key: A JAX key, typed or raw ``uint32[2]``. A key of another kind than Threefry, or
        ``jax_threefry_partitionable=False``, takes ``jax.random.normal`` itself.
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised.
      stddev: σ, a real scalar, at least 0; 0 adds nothing. A traced one below 0 turns the noise's sign, no more.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.

    Returns:
      A pytree like ``updates`` without the client axis, float32 (float64 for float64 leaves, with the same
      float32 noise); nothing but noise when nobody takes part.

    Raises:
      TypeError: A leaf is not floating point, ``key`` is not a key, or another argument is not what it needs to
        be.
      ValueError: Leaves, ``weights`` and ``where`` disagree on the number of clients, or there is none; ``key`` is
        not one key; or ``stddev`` is a Python number below 0, or NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> key = jax.random.key(0)
      >>> noisy = ff.noisy_weighted_sum(key, jnp.ones((2, 3)), jnp.ones(2), 0.5)
      >>> bool(jnp.allclose(noisy, 2 + 0.5 * jax.random.normal(key, (3,)), rtol=1e-6))
      True

    Source:
      The Gaussian mechanism: Dwork and Roth 2014, https://doi.org/10.1561/0400000042.

    Notes:
      *Privacy*: only for updates of bounded norm, and with a key that is secret and used once; see
      ``clipped_noisy_weighted_sum``.
      *Differentiability*: in ``updates``, ``weights`` and ``stddev``; the noise is a constant.
      *Sharding*: parameters may be sharded in any way, without collectives: every device makes the noise of its
      own coordinates. Sharded clients are summed where they are and all-reduced, with the noise added once. Inside
      your own ``shard_map`` fold the shard's index into the key
      (``jax.random.fold_in(key, jax.lax.axis_index(name))``), or every block gets the same noise.
      *Determinism*: the same bits for any number of threads, chunking and sharding of the parameters.
    """
    return _bind(NOISY_WEIGHTED_SUM, key, updates, weights, None, stddev, where, False, None)


def clipped_noisy_weighted_sum(
    key: Any,
    updates: PyTree,
    weights: Any,
    max_norm: Any,
    stddev: Any,
    *,
    where: Any = None,
    return_norms: bool = False,
    axis_name: Any = None,
) -> Any:
    """Sums the clients' updates, each clipped to ``max_norm``, and adds Gaussian noise made on the way.

    .. math:: y = \\sum_i w_i \\min(1, C / \\|x_i\\|) \\, x_i + \\sigma z, \\qquad z \\sim \\mathcal{N}(0, I)

    The Gaussian mechanism of DP-FedAvg: one client more or less moves the sum by at most :math:`\\max_i |w_i| C`, so
    that σ is the noise multiplier times that. It is ``clipped_weighted_sum`` and ``noisy_weighted_sum`` in one.

    Args:
      key: A JAX key, typed or raw ``uint32[2]``; the noise is that of ``noisy_weighted_sum``.
      updates: Client-stacked pytree of float32, bfloat16, float16 or float64 leaves ``(n_clients, *shape)``.
      weights: ``(n_clients,)`` real numbers, signed, not normalised.
      max_norm: C, a real scalar, at least 0. A traced one below 0, or NaN, makes the result NaN.
      stddev: σ, a real scalar, at least 0: of the sum, not of a mean. A traced one below 0 turns the noise's sign.
      where: ``(n_clients,)`` bool, the clients that take part; the others have no influence, NaN or not.
      return_norms: Whether to return the clients' norms too. They are not private: adapt ``max_norm`` with
        ``adaptive_clip_norm`` and noise on its count.
      axis_name: Inside your own ``shard_map``, the mesh axes (one or a tuple) over which the parameters are
        sharded: the norms are taken over all of them. Fold the shard's index into the key there.

    Returns:
      As ``clipped_weighted_sum``; nothing but noise when nobody takes part.

    Raises:
      TypeError: A leaf is not floating point, ``key`` is not a key, or another argument is not what it needs to
        be.
      ValueError: Leaves, ``weights`` and ``where`` disagree on the number of clients, or there is none; ``key`` is
        not one key; or ``max_norm`` or ``stddev`` is a Python number below 0, or NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> key, updates = jax.random.key(0), jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> noisy = ff.clipped_noisy_weighted_sum(key, updates, jnp.ones(2), 1.0, 0.1)
      >>> bool(jnp.allclose(noisy, jnp.array([0.9, 1.2]) + 0.1 * jax.random.normal(key, (2,)), rtol=1e-5))
      True

    Source:
      McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Notes:
      *Privacy*: floating-point noise is not the real Gaussian that proofs speak of: its lowest bits may tell of what
      it was added to (Mironov 2012, https://doi.org/10.1145/2382196.2382264). The documentation says more.
      *Keys*: use a key, and what ``jax.random.split`` makes of it, once. ``jax.random.key(seed)`` knows 32 bits of its
      seed unless ``jax_enable_x64`` is on, few enough to try them all; a secret key is made of 8 random bytes, by
      ``jax.random.wrap_key_data(np.frombuffer(secrets.token_bytes(8), np.uint32), impl="threefry2x32")``. Under
      ``vmap``, sums that share a key share the noise, and their differences have none: give each a key of its own.
      *Differentiability*: almost everywhere, in ``updates``, ``weights``, ``max_norm`` and ``stddev``.
      *Sharding*: as ``clipped_weighted_sum`` and ``noisy_weighted_sum``: one all-reduce of O(``n_clients``) numbers
      for sharded parameters, the noise added once for sharded clients.
      *Determinism*: the same bits for any number of threads; sharding the parameters moves norms by a few ulp.
    """
    return _bind(CLIPPED_NOISY_WEIGHTED_SUM, key, updates, weights, max_norm, stddev, where, return_norms, axis_name)


def adaptive_clip_norm(
    clip_norm: Any,
    norms: Any,
    *,
    target_quantile: Any = 0.5,
    learning_rate: Any = 0.2,
    key: Any = None,
    count_stddev: Any = 0.0,
    where: Any = None,
) -> Array:
    """Moves a clip norm towards a quantile of the clients' norms, of which it sees only a noisy count.

    .. math:: C' = C \\exp(-\\eta (b - \\gamma)), \\qquad
        b = \\frac{|\\{i : \\|x_i\\| \\le C\\}| + \\sigma_b z}{m}

    Args:
      clip_norm: C, a real scalar, at least 0: the norm that this round's updates were clipped to.
      norms: ``(n_clients,)`` real numbers, the clients' norms before clipping; a norm that is not finite counts as
        clipped.
      target_quantile: γ, a real scalar from 0 to 1: the share of clients that is to stay unclipped.
      learning_rate: η, a real scalar, at least 0.
      key: A JAX key for the noise on the count; ``None``: no noise. A constant is folded into it, so that the noise
        is not that of a sum given the same key.
      count_stddev: σ of that noise, a real scalar, at least 0; it needs a ``key``. Without one, a traced one makes the
        result NaN unless it is 0.
      where: ``(n_clients,)`` bool, the m clients that take part.

    Returns:
      The next round's clip norm, a scalar, float32 (float64 where ``clip_norm`` or ``norms`` is). The noisy share is
      not clamped to [0, 1], so that the noise has no bias. NaN when nobody takes part.

    Raises:
      TypeError: An argument is not what it needs to be.
      ValueError: An argument has the wrong shape, is a Python number out of its range, or there is a
        ``count_stddev`` without a ``key``.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> norms, clip_norm = jnp.linspace(0.5, 1.5, 11), 2.0
      >>> for _ in range(60):
      ...     clip_norm = ff.adaptive_clip_norm(clip_norm, norms)
      >>> bool(abs(clip_norm - 1.0) < 0.1)
      True

    Source:
      Andrew et al. 2021, https://arxiv.org/abs/1905.03871.

    Notes:
      *Differentiability*: in ``clip_norm`` as a factor, and in the other scalars; counts have no derivative.
      *Sharding*: n numbers; XLA's own.
      *Determinism*: the same bits for the same key.
    """
    name = "adaptive_clip_norm"
    values = checks.real_numbers(name, "norms", norms, "real numbers of shape (n_clients,), one per client")
    if values.ndim != 1 or values.shape[0] == 0:
        raise ValueError(f"{name}: norms has shape {values.shape}; it needs (n_clients,), one client at least.")
    dtype = checks.accumulator_of(values, clip_norm)
    values = checks.per_client(name, "norms", values, values.shape[0], dtype)
    if key is None and isinstance(count_stddev, int | float | np.generic) and count_stddev != 0:
        raise ValueError(f"{name}: key is None and count_stddev {count_stddev}; the noise needs a key.")
    return reference.adaptive_clip_norm(
        checks.bounded_scalar(name, "clip_norm", clip_norm, dtype),
        values,
        target_quantile=checks.bounded_scalar(name, "target_quantile", target_quantile, dtype, most=1.0),
        learning_rate=checks.bounded_scalar(name, "learning_rate", learning_rate, dtype),
        key=None if key is None else checks.random_key(name, key),
        count_stddev=checks.bounded_scalar(name, "count_stddev", count_stddev, dtype),
        where=checks.participation(name, where, values.shape[0]),
    )


# --- From arguments to operands ---------------------------------------------------------------------------------


def _bind(
    operation: Operation,
    key: Any,
    updates: PyTree,
    weights: Any,
    max_norm: Any,
    stddev: Any,
    where: Any,
    return_norms: bool,
    axis_name: Any,
) -> Any:
    """Checks the arguments and calls the operation; which of them there are follows from which it is."""
    name = operation.name
    clip, noise = "clipped" in name, "noisy" in name
    leaves, n_clients = checks.client_stacked(name, updates)
    dtype = checks.tree_accumulator(leaves.arrays)
    operands: Operands = {
        "updates": leaves.arrays,
        "weights": checks.per_client(name, "weights", weights, n_clients, dtype),
        "where": checks.participation(name, where, n_clients),
    }
    return_norms = checks.python_bool(name, "return_norms", return_norms)
    axis_name = checks.mesh_axes(name, axis_name)
    if clip:
        operands["max_norm"] = checks.bounded_scalar(name, "max_norm", max_norm, dtype)
        operands["given_norms"] = None
    if noise:
        key = checks.random_key(name, key)
        operands["stddev"] = checks.bounded_scalar(name, "stddev", stddev, dtype)
        operands["blocks"] = None
    made_in_kernel = noise and _is_threefry(key) and internals.threefry_is_partitionable()
    if noise and made_in_kernel:
        keys = jnp.stack(reference.leaf_keys(key, len(leaves.arrays)))
        operands["keys"] = jax.random.key_data(keys)
    elif noise:
        operation = CLIPPED_WEIGHTED_SUM if clip else WEIGHTED_SUM
    if clip and axis_name is not None:
        norms_of = {"updates": leaves.arrays, "where": operands["where"]}
        (norms,) = CLIENT_NORMS.bind(norms_of, (dtype.name,))
        operands["given_norms"] = all_reduce("norm", norms, axis_name)
    dtypes = checks.result_dtypes(name, leaves.arrays, None)
    attributes = {"divide": False} if operation is WEIGHTED_SUM else _attributes(operation)
    results = operation.bind(operands, (*([dtype.name] if clip else []), *dtypes), **attributes)
    total, norms = leaves.unflatten(results[1:] if clip else results), results[0]
    if clip and axis_name is not None:
        norms = operands["given_norms"]  # the same ones, and known to be the same on every device
    if noise and not made_in_kernel:
        total = reference.add_noise(total, key, operands["stddev"])
    return (total, norms) if return_norms else total


def _is_threefry(key: Array) -> bool:
    return key.dtype == jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def _attributes(operation: Operation) -> dict[str, bool]:
    return {"clip": "clipped" in operation.name, "noise": "noisy" in operation.name}


# --- Norms ------------------------------------------------------------------------------------------------------


def norms_workspace(sizes: Any, layout: Any) -> Any:
    """A sum and an exponent, float64, per client and block of coordinates; see ffi/contract/private.h."""
    return 2 * block_sums_workspace(sizes, layout)


def _norms_definition(*, updates: Any, where: Any, out_dtypes: Any) -> list[Array]:
    return [reference.client_norms(updates, where=where).astype(out_dtypes[0])]


def _norm_slopes(call: BoundCall, updates: Any, tangents: Any, norms: Array, where: Array | None) -> Array | None:
    """The norms' tangents: ``⟨xᵢ, ẋᵢ⟩ / ‖xᵢ‖``, and 0 for who is absent, not finite, or nothing."""
    leaves = [leaf for leaf, tangent in enumerate(tangents) if tangent is not None]
    if not leaves:
        return None
    counts = jnp.isfinite(norms) & (norms > 0)
    counts = counts if where is None else counts & where
    operands = {
        "updates": [updates[leaf] for leaf in leaves],
        "others": [tangents[leaf] for leaf in leaves],
        "where": counts,
    }
    (dots,) = call.bind(CLIENT_DOTS, operands, (norms.dtype.name,), shared=False)
    return dots / jnp.where(counts, norms, 1)


def _norms_jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    assert call.results is not None
    (norms,) = call.results
    return [_norm_slopes(call, primals["updates"], tangents["updates"], norms, primals["where"])]


CLIENT_NORMS = Operation(
    "client_norms",
    operands=(
        Operand("updates", ("clients",), per_leaf=True),
        Operand("where", ("clients",), optional=True),
    ),
    results=(Operand("norms", ("clients",)),),
    definition=_norms_definition,
    reduce="norm",
    jvp=_norms_jvp,
    workspace=norms_workspace,
)


# --- Sums -------------------------------------------------------------------------------------------------------


def _operands(clip: bool, noise: bool) -> tuple[Operand, ...]:
    operands = [Operand("updates", ("clients",), per_leaf=True), Operand("weights", ("clients",))]
    if clip:
        operands += [Operand("max_norm"), Operand("given_norms", ("clients",), optional=True)]
    operands.append(Operand("where", ("clients",), optional=True))
    if noise:
        # Of each leaf, Threefry's two words; and where this device's block of it lies, see _blocks.
        operands += [Operand("keys", ("leaves", "words")), Operand("stddev")]
        operands.append(Operand("blocks", ("leaves", "levels", "extents"), optional=True))
    return tuple(operands)


def _results(clip: bool, noise: bool) -> tuple[Operand, ...]:
    norms = (Operand("norms", ("clients",)),) if clip else ()
    return (*norms, Operand("reduced", per_leaf=True))


def _workspace(sizes: Any, layout: Any) -> Any:
    """The norms' workspace, and two float64 for every client's clip factor."""
    factors = 16 * sizes["clients"]
    for i in range(layout.batch_dims):
        factors = factors * sizes[f"batch{i}"]
    return norms_workspace(sizes, layout) + factors


def _definition(
    *,
    updates: Any,
    weights: Any,
    where: Any,
    out_dtypes: Any,
    clip: bool,
    noise: bool,
    max_norm: Any = None,
    given_norms: Any = None,
    keys: Any = None,
    stddev: Any = None,
    blocks: Any = None,
) -> list[Array]:
    norms: list[Array] = []
    if clip:
        totals, of_clients = reference.clipped_weighted_sum(
            updates, weights, max_norm, where=where, return_norms=True, given_norms=given_norms
        )
        norms = [of_clients.astype(out_dtypes[0])]
    else:
        totals = reference.weighted_sum(updates, weights, where=where)
    if noise:
        totals = [
            total + stddev.astype(total.dtype) * _normals(keys[leaf], total.shape, blocks, leaf).astype(total.dtype)
            for leaf, total in enumerate(totals)
        ]
    return [*norms, *totals]


def _normals(key: Array, shape: tuple[int, ...], blocks: Array | None, leaf: int) -> Array:
    if blocks is None:
        return jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, np.float32)
    # What jax.random.normal does with the bits of a counter, for the counters of this block.
    high, low = _counters(math.prod(shape), blocks[leaf])
    bits = internals.threefry_bits(key, high, low)
    fraction = lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), np.float32) - np.float32(1)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
    return (np.float32(np.sqrt(2)) * lax.erf_inv(uniform)).reshape(shape)


def _counters(size: int, levels: Array) -> tuple[Array, Array]:
    """The row-major index in the whole leaf of every coordinate of a block, as two words of 32 bits."""
    rest = jnp.arange(size, dtype=np.uint32)
    positions = []
    for level in reversed(range(levels.shape[0])):
        origin, _, own = levels[level]
        positions.append(origin + rest % own)
        rest = rest // own
    high = low = jnp.zeros(size, np.uint32)
    for level, position in enumerate(reversed(positions)):
        extent = levels[level, 1]
        # high · 2³² + low, times the extent: in halves, since there may be no 64-bit integers.
        small, large = (low & 0xFFFF) * (extent & 0xFFFF), (low >> 16) * (extent >> 16)
        cross, other = (low >> 16) * (extent & 0xFFFF), (low & 0xFFFF) * (extent >> 16)
        middle = (small >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
        high = high * extent + large + (cross >> 16) + (other >> 16) + (middle >> 16)
        low = (small & 0xFFFF) | (middle << 16)
        high, low = high + (low + position < low), low + position
    return high, low


def _blocks(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> Array:
    """Where this device's block lies in each leaf: levels of (origin, extent in the leaf, own extent).

    Neighbouring axes that are whole make one level; leaves with fewer levels begin with trivial ones.
    """
    of_leaves: list[list[tuple[Any, int, int]]] = []
    for leaf, update in enumerate(operands["updates"]):
        levels: list[tuple[Any, int, int]] = []
        may_merge = False
        for axis, own in enumerate(update.shape[call.batch_dims + 1 :]):
            names = mesh_axes.get(f"leaf{leaf}.axis{axis}", ())
            extent, origin = own, jnp.uint32(0)
            for name in names:  # the first one varies slowest
                extent *= lax.axis_size(name)
                origin = origin * np.uint32(lax.axis_size(name)) + lax.axis_index(name).astype(np.uint32)
            origin = origin * np.uint32(own)
            merged = levels[-1][1] * own if levels else 0
            if may_merge and not names and merged < 2**32:
                levels[-1] = (origin, merged, merged)
            else:
                levels.append((origin, extent, own))
            may_merge = not names
        of_leaves.append(levels)
    depth = max(1, *map(len, of_leaves))
    trivial = (jnp.uint32(0), 1, 1)
    words = [
        jnp.stack(
            [jnp.asarray(word, np.uint32) for level in [trivial] * (depth - len(levels)) + levels for word in level]
        )
        for levels in of_leaves
    ]
    return jnp.stack(words).reshape((1,) * call.batch_dims + (len(of_leaves), depth, 3))


def _partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Norms over all devices first; noise once, each device for its own coordinates; then sums over clients."""
    layout, optional = call.layout, set(call.layout.optional)
    clip, noise = layout.attribute("clip"), layout.attribute("noise")
    clients = mesh_axes.get("clients", ())
    parameters = any(names for axis, names in mesh_axes.items() if axis.startswith("leaf"))
    if clip and parameters and "given_norms" not in optional:
        has_where = tuple(name for name in layout.optional if name == "where")
        norms_layout = layout._replace(optional=has_where, out_dtypes=layout.out_dtypes[:1], attributes=())
        norms_of = {"updates": operands["updates"], "where": operands["where"]}
        (norms,) = CLIENT_NORMS.run_partitioned(BoundCall(CLIENT_NORMS, norms_layout, None), norms_of, mesh_axes)
        operands, optional = {**operands, "given_norms": norms}, optional | {"given_norms"}
    if noise and parameters:
        operands = {**operands, "blocks": _blocks(call, operands, mesh_axes)}
        optional |= {"blocks"}
    if noise and clients:
        first = functools.reduce(jnp.logical_and, [lax.axis_index(name) == 0 for name in clients])
        operands = {**operands, "stddev": jnp.where(first, operands["stddev"], 0)}
    results = call.run_local(operands, optional=tuple(sorted(optional)))
    if not clients:
        return results
    return [*results[:1], *lax.psum(results[1:], clients)] if clip else list(lax.psum(results, clients))


def _jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    layout, results = call.layout, call.results
    assert results is not None
    clip, noise = layout.attribute("clip"), layout.attribute("noise")
    weights, where = primals["weights"], primals["where"]
    scale, slope, norm_slope = weights, tangents["weights"], None
    if clip:
        norms = results[0]
        max_norm = call.per_client(primals["max_norm"], norms.ndim)
        if primals["given_norms"] is None:
            norm_slope = _norm_slopes(call, primals["updates"], tangents["updates"], norms, where)
        else:
            norm_slope = tangents["given_norms"]
        finite = jnp.isfinite(norms)
        where = finite if where is None else finite & where
        clipped = where & (norms > max_norm)
        safe_norms = jnp.where(clipped, norms, 1)
        factor = jnp.where(clipped, max_norm / safe_norms, 1)
        scale = weights * factor
        slope = None if slope is None else slope * factor
        for part, of_factor in ((norm_slope, -factor / safe_norms), (tangents["max_norm"], 1 / safe_norms)):
            if part is not None:
                step = weights * jnp.where(clipped, call.per_client(part, norms.ndim) * of_factor, 0)
                slope = step if slope is None else slope + step
    dtypes = layout.out_dtypes[len(results) - layout.num_leaves :]
    terms: list[list[Array]] = [[] for _ in dtypes]
    leaves = [leaf for leaf, tangent in enumerate(tangents["updates"]) if tangent is not None]
    if leaves:
        operands = {"updates": [tangents["updates"][i] for i in leaves], "weights": scale, "where": where}
        summed = call.bind(WEIGHTED_SUM, operands, [dtypes[i] for i in leaves], divide=False)
        for leaf, value in zip(leaves, summed, strict=True):
            terms[leaf].append(value)
    if slope is not None:
        operands = {"updates": primals["updates"], "weights": slope, "where": where}
        for leaf, value in enumerate(call.bind(WEIGHTED_SUM, operands, dtypes, divide=False)):
            terms[leaf].append(value)
    if noise and tangents["stddev"] is not None:
        for leaf, normals in enumerate(_noise_alone(call, primals, dtypes)):
            terms[leaf].append(call.scalar(tangents["stddev"].astype(normals.dtype), normals.ndim) * normals)
    totals = results[len(results) - layout.num_leaves :]
    reduced = [
        jnp.broadcast_to(functools.reduce(jnp.add, parts), total.shape) if parts else None
        for parts, total in zip(terms, totals, strict=True)
    ]
    return [norm_slope, *reduced] if clip else reduced


def _noise_alone(call: BoundCall, primals: Operands, dtypes: Sequence[str]) -> list[Array]:
    """The call's noise at a standard deviation of 1: that of a sum of nothing."""
    assert call.results is not None
    batch = (1,) * call.batch_dims
    # Sharded as the results are, so that every device makes the noise of its own coordinates here too.
    nothing = [jnp.zeros_like(call.over_clients(total)) for total in call.results[-call.layout.num_leaves :]]
    dtype = reference.accumulator_dtype(*dtypes)
    operands = {
        "updates": nothing,
        "weights": jnp.zeros((*batch, 1), dtype),
        "where": None,
        "keys": primals["keys"],
        "stddev": jnp.ones(batch, dtype),
        "blocks": None,
    }
    return call.bind(NOISY_WEIGHTED_SUM, operands, dtypes, clip=False, noise=True)


def _private(name: str) -> Operation:
    return Operation(
        name,
        operands=_operands,
        results=_results,
        definition=_definition,
        whole_axes=("leaves", "words"),
        partitioned=_partitioned,
        jvp=_jvp,
        workspace=_workspace if "clipped" in name else None,
    )


CLIPPED_WEIGHTED_SUM = _private("clipped_weighted_sum")
NOISY_WEIGHTED_SUM = _private("noisy_weighted_sum")
CLIPPED_NOISY_WEIGHTED_SUM = _private("clipped_noisy_weighted_sum")
