"""Sums that tell little of any one client: clipped, with Gaussian noise, or both."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference
from fedfuse_jax._core import Operands, Operation, all_reduce
from fedfuse_jax._primitives.linear import WEIGHTED_SUM
from fedfuse_jax._primitives.norms import CLIENT_NORMS
from fedfuse_jax._primitives.private import CLIPPED_NOISY_WEIGHTED_SUM, CLIPPED_WEIGHTED_SUM, NOISY_WEIGHTED_SUM

PyTree = Any


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
    sums, norms = _sums_and_norms(
        operands,
        operation,
        (*([dtype.name] if clip else []), *dtypes),
        tuple(attributes.items()),
        clip and return_norms,
    )
    total = leaves.unflatten(sums)
    if clip and axis_name is not None:
        norms = operands["given_norms"]  # the same ones, and known to be the same on every device
    if noise and not made_in_kernel:
        total = reference.add_noise(total, key, operands["stddev"])
    return (total, norms) if return_norms else total


# Compiled as one, so that `jax_debug_nans` sees norms that are not finite only where norms are asked for.
@functools.partial(jax.jit, static_argnames=("operation", "out_dtypes", "attributes", "return_norms"), inline=True)
def _sums_and_norms(
    operands: Operands,
    operation: Operation,
    out_dtypes: tuple[str, ...],
    attributes: tuple[tuple[str, bool], ...],
    return_norms: bool,
) -> tuple[list[Array], Array | None]:
    """The sums, and the norms that clipping took if they are asked for."""
    results = operation.bind(operands, out_dtypes, **dict(attributes))
    has_norms = operation not in (WEIGHTED_SUM, NOISY_WEIGHTED_SUM)
    return results[1:] if has_norms else results, results[0] if return_norms else None


def _is_threefry(key: Array) -> bool:
    return key.dtype == jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


def _attributes(operation: Operation) -> dict[str, bool]:
    return {"clip": "clipped" in operation.name, "noise": "noisy" in operation.name}
