"""The forms the operations are measured against that do not fit on one line of ``operations``.

*Natural* is what a reader of the ``jax.numpy`` documentation writes first; *best* is the fastest form known that
needs no compiled kernel. The others are the strongest one we found in NumPy and in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Beyond this many clients a network takes XLA minutes to compile, and bisection is the faster program anyway.
LARGEST_NETWORK = 128


# --- Order statistics in jax.numpy ----------------------------------------------------------------------------


def batcher_network(size: int) -> Iterator[tuple[int, int]]:
    """The comparators of Batcher's merge exchange, for any size (Knuth, volume 3, algorithm 5.2.2 M)."""
    merged = 1
    while merged < size:
        distance = merged
        while distance >= 1:
            for start in range(distance % merged, size - distance, 2 * distance):
                for low in range(start, min(start + distance, size - distance)):
                    if low // (2 * merged) == (low + distance) // (2 * merged):
                        yield low, low + distance
            distance //= 2
        merged *= 2


def sorted_rows(updates: Array) -> list[Array]:
    """Sorts along the client axis by an unrolled network; XLA drops the comparators of rows nobody uses."""
    rows = [row.astype(jnp.float32) for row in updates]
    for low, high in batcher_network(len(rows)):
        # One comparison and two selections: XLA's CPU code for jnp.minimum and jnp.maximum, which must hand on
        # NaNs, takes twice as long.
        swap = rows[high] < rows[low]
        rows[low], rows[high] = jnp.where(swap, rows[high], rows[low]), jnp.where(swap, rows[low], rows[high])
    return rows


def _ordered_key(bits: Array) -> Array:
    """Floats' bits to integers of the same order, and back."""
    return bits ^ lax.shift_right_logical(lax.shift_right_arithmetic(bits, 31), 1)


def values_at_ranks(updates: Array, ranks: tuple[int, ...]) -> Array:
    """The values at ``ranks`` of each coordinate, by bisection: 32 passes that count the smaller values."""
    wanted = jnp.array(ranks)[:, None]

    def count_below(bound: Array) -> Array:
        def add_client(client: int, count: Array) -> Array:
            key = _ordered_key(lax.bitcast_convert_type(updates[client].astype(jnp.float32), jnp.int32))
            return count + (key < bound)

        return lax.fori_loop(0, updates.shape[0], add_client, jnp.zeros(bound.shape, jnp.int32))

    def add_bit(index: int, found: Array) -> Array:
        candidate = found | (jnp.int32(1) << (30 - index))
        return jnp.where(count_below(candidate) <= wanted, candidate, found)

    zero = jnp.zeros((len(ranks), updates.shape[1]), jnp.int32)
    signs = jnp.where(count_below(zero) <= wanted, zero, jnp.iinfo(jnp.int32).min)
    return lax.bitcast_convert_type(_ordered_key(lax.fori_loop(0, 31, add_bit, signs)), jnp.float32)


def order_values(updates: Array, ranks: tuple[int, ...]) -> Sequence[Array]:
    """The values at ``ranks`` of each coordinate, by a network, or by bisection where a network is too large."""
    if len(updates) > LARGEST_NETWORK:
        return list(values_at_ranks(updates, ranks))
    rows = sorted_rows(updates)
    return [rows[rank] for rank in ranks]


def best_median(updates: Array) -> Array:
    """The mean of the two middle values."""
    low, high = order_values(updates, ((len(updates) - 1) // 2, len(updates) // 2))
    return (low + high) / 2


def best_spread(updates: Array, cotangent: Array, trim: int) -> tuple[Array]:
    """The derivative of both order statistics: shares of the cotangent to who lies between the values kept.

    Several times faster than differentiating through a network or a sort; right where no two clients tie.
    """
    n_clients = len(updates)
    low, high = order_values(updates, (trim, n_clients - trim - 1))
    return (jnp.where((updates >= low) & (updates <= high), cotangent / (n_clients - 2 * trim), 0),)


def best_trimmed_mean(updates: Array, trim: int) -> Array:
    """The trimmed mean by a network, or by bisection for both ends and one sum of what lies between."""
    n_clients = len(updates)
    num_kept = n_clients - 2 * trim
    if n_clients <= LARGEST_NETWORK:
        return sum(sorted_rows(updates)[trim : n_clients - trim], start=jnp.float32(0)) / num_kept
    low, high = order_values(updates, (trim, n_clients - trim - 1))

    def add_client(client: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, num_low, num_high = state
        value = updates[client].astype(jnp.float32)
        between = jnp.where((value > low) & (value < high), value, 0)
        return total + between, num_low + (value <= low), num_high + (value >= high)

    start = (jnp.zeros_like(low), jnp.zeros_like(low), jnp.zeros_like(low))
    total, num_low, num_high = lax.fori_loop(0, n_clients, add_client, start)
    kept = total + low * (num_low - trim) + high * (num_high - trim)
    return jnp.where(low < high, kept / num_kept, low)


def natural_mean_around_median(updates: Array, num_byzantine: int) -> Array:
    """The values nearest the median, by sorting the distances from it."""
    distances = jnp.abs(updates - jnp.median(updates, axis=0))
    nearest = jnp.argsort(distances, axis=0)[: len(updates) - num_byzantine]
    return jnp.mean(jnp.take_along_axis(updates, nearest, axis=0), axis=0)


def best_mean_around_median(updates: Array, num_byzantine: int) -> Array:
    """A window that slides over the values in order, and its mean; in order by one sort of the values alone."""
    n_clients = len(updates)
    values = jnp.sort(updates.astype(jnp.float32), axis=0)
    num_kept = n_clients - num_byzantine
    twice_median = values[(n_clients - 1) // 2] + values[n_clients // 2]
    first = jnp.sum(values[:num_byzantine] + values[num_kept:] < twice_median, axis=0)
    ranks = jnp.arange(n_clients)[:, None]
    return jnp.sum(jnp.where((ranks >= first) & (ranks < first + num_kept), values, 0), axis=0) / num_kept


# --- Distances in jax.numpy ---------------------------------------------------------------------------------------


def natural_distances(updates: Array) -> Array:
    """Row by row, by differences: all pairs at once would not fit into memory."""
    return lax.map(lambda row: jnp.sum(jnp.square(updates - row), axis=1), updates)


def best_distances(updates: Array) -> Array:
    """By products: one matrix multiplication, which loses digits where clients are close together."""
    products = jnp.matmul(updates, updates.T, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
    squares = jnp.diagonal(products)
    return jnp.maximum(squares[:, None] + squares[None] - 2 * products, 0)


def multi_krum_by(distances: Callable[[Array], Array], num_byzantine: Callable[[Array], int]) -> Callable[..., Array]:
    """Multi-Krum on distances found in this way."""

    def of_updates(updates: Array) -> Array:
        n_clients, f = len(updates), num_byzantine(updates)
        scores = jnp.sum(jnp.sort(distances(updates), axis=1)[:, 1 : n_clients - f - 1], axis=1)
        selected = jnp.argsort(scores)[: n_clients - f]
        return jnp.zeros(n_clients).at[selected].set(1 / (n_clients - f)) @ updates

    return of_updates


def natural_geometric_median(updates: Array) -> Array:
    """Eight smoothed Weiszfeld iterations from the median."""
    center = jnp.median(updates, axis=0)
    for _ in range(8):
        weights = 1 / jnp.maximum(jnp.linalg.norm(updates - center, axis=1), 1e-6)
        center = (weights / jnp.sum(weights)) @ updates
    return center


def backward(forward: Callable[..., Any], num_operands: int = 1) -> Callable[..., Any]:
    """The derivative of ``forward`` in its first operands, as a function of the operands and the cotangent."""

    def pull_back(*operands_and_cotangent: Any) -> Any:
        *operands, cotangent = operands_and_cotangent
        return jax.vjp(lambda *moving: forward(*moving, *operands[num_operands:]), *operands[:num_operands])[1](
            cotangent
        )

    return pull_back


def natural_clipped_sum(updates: Array, weights: Array, max_norm: float) -> Array:
    """What one writes first: scale every client, then add."""
    wide_updates = updates.astype(jnp.float32)
    norms = jnp.linalg.norm(wide_updates, axis=1)
    clipped = wide_updates * jnp.minimum(1, max_norm / norms)[:, None]
    return jnp.sum(weights[:, None] * clipped, axis=0)


def best_clipped_sum(updates: Array, weights: Array, max_norm: float) -> Array:
    """Norms and sum as contractions, the factor on the weights."""
    squares = jnp.einsum("nd,nd->n", updates, updates, preferred_element_type=jnp.float32)
    return (weights * jnp.minimum(1, max_norm / jnp.sqrt(squares))) @ updates.astype(jnp.float32)


def adam_step(params: Array, first: Array, second: Array, delta: Array) -> tuple[Array, ...]:
    """One step of FedAdam as published."""
    first = 0.9 * first + (1 - 0.9) * delta
    second = 0.99 * second + (1 - 0.99) * delta * delta
    return params + 0.1 * first / (jnp.sqrt(second) + 1e-3), first, second


# --- Compressed updates in jax.numpy ----------------------------------------------------------------------------


def natural_sparse_sum(values: Any, indices: Any, weights: Any, room: Any) -> Any:
    """One scatter-add of all clients' entries."""
    return jnp.zeros(len(room)).at[indices].add(weights[:, None] * values.astype(jnp.float32))


def best_sparse_sum(values: Array, indices: Array, weights: Array, room: Array) -> Array:
    """A scan over the clients, each a scatter-add that is promised sorted, distinct indices."""

    def add_client(total: Array, client: tuple[Array, Array, Array]) -> tuple[Array, None]:
        own, at, weight = client
        terms = weight * own.astype(jnp.float32)
        return total.at[at].add(terms, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"), None

    return lax.scan(add_client, jnp.zeros(len(room)), (values, indices, weights))[0]


def natural_quantized_sum(codes: Any, scales: Any, zero_points: Any, weights: Any) -> Any:
    """Dequantise, weigh, sum."""
    updates = scales[:, None] * (codes.astype(jnp.float32) - zero_points[:, None])
    return jnp.sum(weights[:, None] * updates, axis=0)


def best_quantized_sum(codes: Any, scales: Any, zero_points: Any, weights: Any) -> Any:
    """A matrix product of the codes as floats, and one number for all the zero points."""
    slopes = weights * scales
    return slopes @ codes.astype(jnp.float32) - slopes @ zero_points


def unpacked(function: Callable[..., Any], stack: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of 4-bit codes, two a byte."""

    def of_halves(codes: Any, *rest: Any) -> Any:
        halves = stack([codes & 15, codes >> 4], axis=-1)
        return function(halves.reshape(len(codes), -1), *rest)

    return of_halves


def natural_topk(update: Array, k: int) -> tuple[Array, Array, Array]:
    """``lax.top_k`` of the magnitudes."""
    chosen = jnp.sort(lax.top_k(jnp.abs(update), k)[1])
    wide_update = update.astype(jnp.float32)
    return wide_update[chosen], chosen, wide_update.at[chosen].set(0)


def _butterflies(vector: Array) -> Array:
    """The textbook's Walsh-Hadamard transform: log d passes of sums and differences."""
    half = 1
    while half < len(vector):
        pairs = vector.reshape(-1, 2, half)
        vector = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return vector / len(vector) ** 0.5


def natural_rotation(update: Array, key: Array) -> Array:
    """Signs, then butterflies."""
    size = 1 << (len(update) - 1).bit_length()
    padded = jnp.pad(update.astype(jnp.float32), (0, size - len(update)))
    return _butterflies(padded * jax.random.rademacher(key, (size,), jnp.float32))


def natural_inverse_rotation(rotated: Array, key: Array) -> Array:
    """Butterflies, then signs."""
    return _butterflies(rotated.astype(jnp.float32)) * jax.random.rademacher(key, rotated.shape, jnp.float32)


# --- NumPy ----------------------------------------------------------------------------------------------------


def wide(updates: np.ndarray) -> np.ndarray:
    """float32, which is what NumPy adds and compares at speed; free where it already is."""
    return updates.astype(np.float32, copy=False)


def numpy_median(updates: np.ndarray) -> np.ndarray:
    """Sorting all of it beats ``np.median``, which partitions column by column, by a factor of three to five."""
    by_rank = np.sort(wide(updates), axis=0)
    return (by_rank[(len(updates) - 1) // 2] + by_rank[len(updates) // 2]) / 2


def numpy_trimmed_mean(updates: np.ndarray, trim: int) -> np.ndarray:
    """A sort along the client axis and the mean of the rows left."""
    return np.sort(wide(updates), axis=0)[trim : len(updates) - trim].mean(axis=0)


def numpy_spread(updates: np.ndarray, cotangent: np.ndarray, trim: int) -> tuple[np.ndarray]:
    """The derivative of both order statistics: every kept client's share of the cotangent."""
    kept = np.argsort(updates, axis=0)[trim : len(updates) - trim]
    spread = np.zeros_like(updates)
    np.put_along_axis(spread, kept, (cotangent / len(kept))[None], axis=0)
    return (spread,)


def numpy_mean_around_median(updates: np.ndarray, num_byzantine: int) -> np.ndarray:
    """A sort, and a window slid over it."""
    values, n_clients = np.sort(wide(updates), axis=0), len(updates)
    num_kept = n_clients - num_byzantine
    twice_median = values[(n_clients - 1) // 2] + values[n_clients // 2]
    first = (values[:num_byzantine] + values[num_kept:] < twice_median).sum(axis=0)
    ranks = np.arange(n_clients)[:, None]
    return np.where((ranks >= first) & (ranks < first + num_kept), values, 0).sum(axis=0) / num_kept


def numpy_distances(updates: np.ndarray) -> np.ndarray:
    """By products."""
    products = wide(updates) @ wide(updates).T
    squares = np.diagonal(products)
    return np.maximum(squares[:, None] + squares[None] - 2 * products, 0)


def numpy_clipped_sum(updates: np.ndarray, weights: np.ndarray, max_norm: float) -> np.ndarray:
    """Two contractions."""
    updates = wide(updates)
    norms = np.sqrt(np.einsum("nd,nd->n", updates, updates))
    return (weights * np.minimum(np.float32(1), np.float32(max_norm) / norms)) @ updates


def numpy_adam(params: np.ndarray, first: np.ndarray, second: np.ndarray, updates: np.ndarray) -> Any:
    """FedAdam over its own state."""
    delta = wide(updates).mean(axis=0)
    first *= 0.9
    first += (1 - 0.9) * delta
    second *= 0.99
    second += (1 - 0.99) * delta * delta
    params += 0.1 * first / (np.sqrt(second) + 1e-3)
    return params, first, second


def numpy_sparse_sum(values: np.ndarray, indices: np.ndarray, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Client after client: ``np.add.at`` on all at once, which knows nothing of distinct indices, is slower."""
    total = np.zeros(len(room), np.float32)
    for own, at, weight in zip(wide(values), indices, weights, strict=True):
        total[at] += weight * own
    return total


def numpy_quantized_sum(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, weights: np.ndarray) -> Any:
    """A matrix product of the codes as floats."""
    slopes = weights * scales
    return slopes @ codes.astype(np.float32) - slopes @ zero_points


# --- PyTorch (tensors in, tensors out; imported by nobody but its user) -------------------------------------------


def torch_median(updates: Any) -> Any:
    """``torch.median`` where it is the median; for an even count it is the lower middle, so a sort is needed."""
    n_clients = len(updates)
    if n_clients % 2:
        return updates.median(dim=0).values.float()
    by_rank = updates.sort(dim=0).values
    return (by_rank[n_clients // 2 - 1].float() + by_rank[n_clients // 2].float()) / 2


def torch_trimmed_mean(updates: Any, trim: int) -> Any:
    """A sort along the client axis and the mean of the rows left."""
    return updates.sort(dim=0).values[trim : len(updates) - trim].float().mean(dim=0)


def torch_mean_around_median(updates: Any, num_byzantine: int) -> Any:
    """As `byzfl` has it: the values nearest the median, by the smallest distances from it."""
    distances = (updates - torch_median(updates)).abs()
    nearest = distances.topk(len(updates) - num_byzantine, dim=0, largest=False, sorted=False).indices
    return updates.gather(0, nearest).float().mean(dim=0)


def torch_distances(updates: Any) -> Any:
    """``torch.cdist`` without its products, which lose digits."""
    import torch

    return torch.cdist(updates.float(), updates.float(), compute_mode="donot_use_mm_for_euclid_dist").square()


def torch_backward(forward: Callable[..., Any], num_operands: int = 1) -> Callable[..., Any]:
    """What ``loss.backward()`` costs in PyTorch: forward with its tape, then backward."""

    def pull_back(*operands_and_cotangent: Any) -> Any:
        import torch

        *operands, cotangent = operands_and_cotangent
        moving = [operand.detach().requires_grad_() for operand in operands[:num_operands]]
        return torch.autograd.grad(forward(*moving, *operands[num_operands:]), moving, cotangent)

    return pull_back


def torch_stack(clients: Any) -> Any:
    """``torch.stack``."""
    import torch

    return torch.stack(clients)


def torch_clipped_sum(updates: Any, weights: Any, max_norm: float) -> Any:
    """Norms, then one product with the weights."""
    updates = updates.float()
    return (weights * (max_norm / updates.norm(dim=1)).clamp(max=1)) @ updates


def torch_adam(params: Any, first: Any, second: Any, updates: Any) -> Any:
    """FedAdam over its own state, as ``torch.optim`` writes such steps."""
    delta = updates.float().mean(dim=0)
    first.mul_(0.9).add_(delta, alpha=1 - 0.9)
    second.mul_(0.99).addcmul_(delta, delta, value=1 - 0.99)
    params.addcdiv_(first, second.sqrt().add_(1e-3), value=0.1)
    return params, first, second


def torch_sparse_sum(values: Any, indices: Any, weights: Any, room: Any) -> Any:
    """``index_add_`` of all clients' entries."""
    terms = (weights[:, None] * values.float()).reshape(-1)
    return weights.new_zeros(len(room)).index_add_(0, indices.reshape(-1), terms)


def torch_quantized_sum(codes: Any, scales: Any, zero_points: Any, weights: Any) -> Any:
    """A matrix product of the codes as floats."""
    slopes = weights * scales
    return slopes @ codes.float() - slopes @ zero_points


def torch_packed_sum(codes: Any, *rest: Any) -> Any:
    """The same of 4-bit codes, two a byte."""
    import torch

    halves = torch.stack([codes & 15, codes >> 4], dim=-1)
    return torch_quantized_sum(halves.reshape(len(codes), -1), *rest)
