"""FedJAX's compression aggregators: what clients would send is quantised, and averaged in float32.

FedJAX's own (`fedjax.aggregators.compression`) call the removed `jax.tree_map`. These have the same signatures, the
same state and the same bit counts, and quantise a leaf exactly as FedJAX's functions do with the same key; which key a
client gets is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
from fedjax.aggregators.compression import CompressionState, arithmetic_encoding_num_bits

from fedfuse_jax import _checks as checks
from fedfuse_jax import reference
from fedfuse_jax.fedjax.mean import mean_aggregator

__all__ = [
    "rotated_uniform_stochastic_quantizer",
    "structured_drive_quantizer",
    "terngrad_quantizer",
    "uniform_stochastic_quantizer",
]

ClientUpdate = tuple[fedjax.ClientId, fedjax.Params, Any]


def uniform_stochastic_quantizer(
    num_levels: int, rng: fedjax.PRNGKey, encode_algorithm: str | None = None
) -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of updates quantised stochastically to levels between each leaf's extremes.

    .. math:: E[Q(x)] = x, \qquad Q(x) \in \{\min x + \tfrac{j}{L - 1} (\max x - \min x) : 0 \le j < L\}

    Args:
        num_levels: L, a Python integer of 2 at least.
        rng: The key of the first round; the state carries the next.
        encode_algorithm: `None` counts log2(L) bits a coordinate; `"arithmetic"` what an arithmetic code takes.

    Returns:
        A `fedjax.aggregators.Aggregator` with FedJAX's `CompressionState(num_bits, rng)`: num_bits grows by what a
        client sends a round, two floats for each leaf included. Clients may come from a generator.

    Raises:
        TypeError: `num_levels` is not a Python integer, or `rng` is not a key.
        ValueError: `num_levels` is less than 2, or `encode_algorithm` is neither of the two. From `apply`: as
            `mean_aggregator`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import uniform_stochastic_quantizer
        >>> aggregator = uniform_stochastic_quantizer(256, jax.random.PRNGKey(0))
        >>> clients = [("a", {"w": jnp.array([0.0, 1.0])}, 1), ("b", {"w": jnp.array([1.0, 3.0])}, 1)]
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(mean["w"], state.num_bits)
        [0.5 2. ] 80.0

    Source:
        Suresh et al. 2017, https://arxiv.org/abs/1611.00429; FedJAX's `uniform_stochastic_quantizer`.

    Notes:
        *Differentiability*: none that is useful. *Determinism*: the same key and order of clients, the same bits.
    """
    name = "uniform_stochastic_quantizer"
    num_levels = checks.python_int(name, "num_levels", num_levels, 2)
    checks.random_key(name, rng)
    if encode_algorithm not in (None, "arithmetic"):
        raise ValueError(f"{name}: encode_algorithm is {encode_algorithm!r}; it needs None or 'arithmetic'.")

    def apply(clients: Iterable[ClientUpdate], state: CompressionState) -> tuple[Any, CompressionState]:
        next_rng, use_rng = jax.random.split(state.rng)
        sizes: list[Any] = []

        def quantized(index: int, params: Any) -> Any:
            levels = _quantized_uniformly(params, num_levels, jax.random.fold_in(use_rng, index))
            if encode_algorithm == "arithmetic":
                sizes.append(sum(arithmetic_encoding_num_bits(leaf) for leaf in jax.tree.leaves(levels)))
            return levels

        mean = _mean_of(quantized, clients)
        num_bits = sum(sizes) / len(sizes) if sizes else _num_bits(mean, math.log2(num_levels))
        return mean, CompressionState(state.num_bits + num_bits, next_rng)

    return fedjax.aggregators.Aggregator(lambda: CompressionState(0.0, rng), apply)


def rotated_uniform_stochastic_quantizer(num_levels: int, rng: fedjax.PRNGKey) -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of updates that are rotated before they are quantised stochastically.

    .. math:: y = R^{-1} \Big( \sum_i w_i Q(R x_i) \Big/ \sum_i w_i \Big)

    All clients share a round's rotation (random signs, then Walsh-Hadamard), so the server rotates back once.

    Args:
        num_levels: The number of levels, a Python integer of 2 at least.
        rng: The key of the first round; the state carries the next.

    Returns:
        A `fedjax.aggregators.Aggregator` with FedJAX's `CompressionState(num_bits, rng)`, whose num_bits grows as
        FedJAX's does: log2(num_levels) bits for each parameter and two floats for each leaf.

    Raises:
        TypeError: `num_levels` is not a Python integer, or `rng` is not a key.
        ValueError: `num_levels` is less than 2. From `apply`: as `mean_aggregator`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import rotated_uniform_stochastic_quantizer
        >>> aggregator = rotated_uniform_stochastic_quantizer(65536, jax.random.PRNGKey(0))
        >>> clients = [("a", jnp.array([0.0, 1.0]), 1), ("b", jnp.array([1.0, 3.0]), 1)]
        >>> mean, state = aggregator.apply(clients, aggregator.init())
        >>> print(jnp.round(mean, 3), state.num_bits)
        [0.5 2. ] 96.0

    Source:
        Suresh et al. 2017, https://arxiv.org/abs/1611.00429; FedJAX's `rotated_uniform_stochastic_quantizer`.

    Notes:
        *Differentiability*: none that is useful. *Determinism*: the same key and order of clients, the same bits.
    """
    name = "rotated_uniform_stochastic_quantizer"
    num_levels = checks.python_int(name, "num_levels", num_levels, 2)
    checks.random_key(name, rng)

    def apply(clients: Iterable[ClientUpdate], state: CompressionState) -> tuple[Any, CompressionState]:
        next_rng, rotation_rng = jax.random.split(state.rng)
        next_rng, use_rng = jax.random.split(next_rng)
        shapes: list[Any] = []

        def quantized(index: int, params: Any) -> Any:
            if not shapes:
                shapes.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params))
            return _quantized_uniformly(_rotated(params, rotation_rng), num_levels, jax.random.fold_in(use_rng, index))

        mean = _mean_of(quantized, clients, lambda rotated: _rotated_back(rotated, rotation_rng, shapes[0]))
        num_bits = _num_bits(mean, math.log2(num_levels))
        return mean, CompressionState(state.num_bits + num_bits, next_rng)

    return fedjax.aggregators.Aggregator(lambda: CompressionState(0.0, rng), apply)


def structured_drive_quantizer(rng: fedjax.PRNGKey) -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of updates sent by DRIVE: a rotation, one sign a coordinate, one scale a leaf.

    .. math:: Q(x) = R^{-1} \frac{\|R x\|_2^2}{\|R x\|_1} \operatorname{sign}(R x)

    Every client has a rotation of its own, which makes the errors of different clients average out. A leaf of zeros
    stays one, where FedJAX's gives NaN.

    Args:
        rng: The key of the first round; the state carries the next.

    Returns:
        A `fedjax.aggregators.Aggregator` with FedJAX's `CompressionState(num_bits, rng)`, whose num_bits grows as
        FedJAX's does: one bit for each parameter and two floats for each leaf.

    Raises:
        TypeError: `rng` is not a key.
        ValueError: From `apply`: as `mean_aggregator`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import structured_drive_quantizer
        >>> aggregator = structured_drive_quantizer(jax.random.PRNGKey(0))
        >>> mean, state = aggregator.apply([("a", jnp.array([4.0, 0.0, 0.0, 0.0]), 1)], aggregator.init())
        >>> print(jnp.round(mean, 3), state.num_bits)
        [4. 0. 0. 0.] 68.0

    Source:
        Vargaftik et al. 2021, https://arxiv.org/abs/2105.08339; FedJAX's `structured_drive_quantizer`.

    Notes:
        *Differentiability*: none that is useful. *Determinism*: the same key and order of clients, the same bits.
    """
    checks.random_key("structured_drive_quantizer", rng)

    def apply(clients: Iterable[ClientUpdate], state: CompressionState) -> tuple[Any, CompressionState]:
        next_rng, rotation_rng = jax.random.split(state.rng)
        mean = _mean_of(lambda index, params: _driven(params, jax.random.fold_in(rotation_rng, index)), clients)
        return mean, CompressionState(state.num_bits + _num_bits(mean, 1), next_rng)

    return fedjax.aggregators.Aggregator(lambda: CompressionState(0.0, rng), apply)


def terngrad_quantizer(rng: fedjax.PRNGKey) -> fedjax.aggregators.Aggregator:
    r"""Builds the weighted mean of updates sent by TernGrad: every coordinate is 0 or ± the leaf's greatest.

    .. math:: Q(x) = s \operatorname{sign}(x) \, b, \qquad P(b = 1) = |x| / s, \quad s = \max |x|

    after values beyond 2.5 standard deviations have been clipped there.

    Args:
        rng: The key of the first round; the state carries the next.

    Returns:
        A `fedjax.aggregators.Aggregator` with FedJAX's `CompressionState(num_bits, rng)`, whose num_bits grows as
        FedJAX's does: log2(3) bits for each parameter and two floats for each leaf.

    Raises:
        TypeError: `rng` is not a key.
        ValueError: From `apply`: as `mean_aggregator`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import terngrad_quantizer
        >>> aggregator = terngrad_quantizer(jax.random.PRNGKey(0))
        >>> mean, state = aggregator.apply([("a", jnp.array([2.0, -2.0, 0.0]), 1)], aggregator.init())
        >>> print(mean, round(state.num_bits, 2))
        [ 2. -2.  0.] 68.75

    Source:
        Wen et al. 2017, https://arxiv.org/abs/1705.07878; FedJAX's `terngrad_quantizer`.

    Notes:
        *Differentiability*: none that is useful. *Determinism*: the same key and order of clients, the same bits.
    """
    checks.random_key("terngrad_quantizer", rng)

    def apply(clients: Iterable[ClientUpdate], state: CompressionState) -> tuple[Any, CompressionState]:
        next_rng, use_rng = jax.random.split(state.rng)
        mean = _mean_of(lambda index, params: _terngraded(params, jax.random.fold_in(use_rng, index)), clients)
        return mean, CompressionState(state.num_bits + _num_bits(mean, math.log2(3)), next_rng)

    return fedjax.aggregators.Aggregator(lambda: CompressionState(0.0, rng), apply)


def _mean_of(
    compress: Callable[[int, Any], Any],
    clients: Iterable[ClientUpdate],
    restore: Callable[[Any], Any] = lambda mean: mean,
) -> Any:
    """The streaming mean of what `compress` makes of each client, restored, in the dtypes of the first client."""
    dtypes: list[Any] = []

    def compressed() -> Iterator[Any]:
        for index, client in enumerate(clients):
            try:
                client_id, params, weight = client
            except (TypeError, ValueError):
                yield client  # for the mean to say what is wrong with it
                continue
            params = jax.tree.map(jnp.asarray, params)
            if not dtypes:
                dtypes.append(jax.tree.map(lambda leaf: leaf.dtype, params))
            yield client_id, compress(index, params), weight

    mean, _ = mean_aggregator().apply(compressed(), ())
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), restore(mean), dtypes[0])


def _num_bits(tree: Any, bits_per_parameter: float) -> float:
    """FedJAX's count: the parameters, and two float32 for each leaf."""
    leaves = jax.tree.leaves(tree)
    return bits_per_parameter * sum(leaf.size for leaf in leaves) + 32 * 2 * len(leaves)


def _leaf_by_leaf(function: Callable[..., Any], params: Any, rng: Any, *others: Any) -> Any:
    """Maps over the leaves, each with its own of a split key, as FedJAX does (of a single leaf as well)."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(rng, len(leaves))
    rest = [jax.tree.leaves(other) for other in others]
    mapped = [function(*each) if each[0].size else each[0] for each in zip(leaves, keys, *rest, strict=True)]
    return jax.tree.unflatten(structure, mapped)


@jax.jit
def _rotated(params: Any, rng: Any) -> Any:
    return _leaf_by_leaf(reference.hadamard_rotation, params, rng)


def _rotated_back(rotated: Any, rng: Any, shapes: Any) -> Any:
    return _leaf_by_leaf(reference.inverse_hadamard_rotation, rotated, rng, shapes)


@partial(jax.jit, static_argnums=1)
def _quantized_uniformly(params: Any, num_levels: int, rng: Any) -> Any:
    """As `fedjax.aggregators.uniform_stochastic_quantize`, in float32."""

    def quantize(leaf: Any, key: Any) -> Any:
        leaf = leaf.astype(reference.accumulator_dtype(leaf.dtype))
        least, greatest = jnp.min(leaf), jnp.max(leaf)
        steps = jnp.clip(jnp.nan_to_num((leaf - least) / (greatest - least)), 0, 1) * (num_levels - 1)
        below = jnp.floor(steps)
        level = jnp.where(jax.random.uniform(key, leaf.shape) > steps - below, below, jnp.ceil(steps))
        return least + level / (num_levels - 1) * (greatest - least)

    return _leaf_by_leaf(quantize, params, rng)


@jax.jit
def _driven(params: Any, rng: Any) -> Any:
    """As `fedjax.aggregators.compression.drive_pytree` between rotations."""

    def drive(leaf: Any, key: Any) -> Any:
        rotated = reference.hadamard_rotation(leaf, key)
        total = jnp.sum(jnp.abs(rotated))
        scale = jnp.where(total == 0, 0, jnp.sum(rotated**2) / jnp.where(total == 0, 1, total))
        return reference.inverse_hadamard_rotation(scale * jnp.sign(rotated), key, leaf)

    return _leaf_by_leaf(drive, params, rng)


@jax.jit
def _terngraded(params: Any, rng: Any) -> Any:
    """As `fedjax.aggregators.compression.terngrad_quantize`, in float32."""

    def quantize(leaf: Any, key: Any) -> Any:
        leaf = leaf.astype(reference.accumulator_dtype(leaf.dtype))
        bound = 2.5 * jnp.std(leaf)
        magnitude = jnp.minimum(jnp.abs(leaf), bound)
        greatest = jnp.max(magnitude)
        share = jnp.clip(jnp.nan_to_num(magnitude / greatest), 0, 1)
        return jnp.where(jax.random.uniform(key, leaf.shape) > share, 0, greatest) * jnp.sign(leaf)

    return _leaf_by_leaf(quantize, params, rng)
