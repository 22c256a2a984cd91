"""How fast our own operations stream against the number of clients: the roofline, measured.

A kernel is written for ranges of client counts, and where one ends and the next begins there may be a step. So the
counts lie close together, and on both sides of the powers of two; the bytes stay about the same.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.bounds import memory_probes
from benchmarks.operations import ROWS, TINY, Row
from benchmarks.stopwatch import Contender, Timing, first_call, interleave

# Rows of the table, and their dtypes.
LINES = (
    ("weighted_sum", "float32"),
    ("weighted_sum", "bfloat16"),
    ("coordinate_median", "float32"),
    ("trimmed_mean", "float32"),
    ("trimmed_mean", "bfloat16"),
    ("squared_norms", "float32"),
    ("clipped_weighted_sum", "float32"),
    ("finite_clients", "float32"),
)
# The same with rows a power of two apart, where addresses of one column fall on the same sets of a cache.
ALIGNED_LINES = ("weighted_sum", "coordinate_median")

CLIENTS = (
    *(2, 3, 4, 6, 8, 10, 12, 16, 17, 20, 24, 32, 33, 48, 64, 65, 80, 96, 100, 112, 128, 129),
    *(160, 161, 192, 193, 256, 384, 512, 768, 1000, 1024),
)
QUICK_CLIENTS = (4, 32, 129, 1000)

BUFFER_BYTES = {"cpu": 64 * 10**6, "gpu": 10**9}  # more than a last-level cache holds
LARGEST_POWER = 2**20


def num_parameters(clients: int, dtype: str, num_bytes: int) -> int:
    """So many that the updates have about so many bytes, in whole cache lines."""
    return max(num_bytes // (clients * jnp.dtype(dtype).itemsize) // 64 * 64, 64)


def aligned_parameters(clients: int, num_bytes: int) -> int | None:
    """The power of two from there on, as float32; ``None``: the largest one is too small."""
    power = 1 << (num_parameters(clients, "float32", num_bytes) - 1).bit_length()
    power = min(power, LARGEST_POWER)
    return power if 4 * power * clients >= 3 * num_bytes // 4 else None


@functools.cache
def _values(num_bytes: int) -> Array:
    """What all updates are cut from: twice the bytes as float32, so that a next power of two, or 16 bits, fit."""
    return jax.jit(lambda key: jax.random.normal(key, (num_bytes // 2,)))(jax.random.key(0))


@functools.cache
def _row(name: str) -> tuple[Row, bool]:
    """A row of the table, and whether it takes weights too."""
    row = next(row for row in ROWS if row.name == name)
    return row, len(jax.eval_shape(partial(row.arguments, TINY), jax.random.key(0))) == 2


def measure_clients(
    clients: int, *, platform: str = "cpu", repetitions: int = 11, num_bytes: int | None = None
) -> list[dict[str, Any]]:
    """One point of every line, beside a probe of the memory."""
    num_bytes = num_bytes or BUFFER_BYTES[platform]
    weights = jnp.linspace(0.5, 2, clients)

    @functools.cache
    def updates(parameters: int, dtype: str) -> Array:
        def cut(values: Array) -> Array:
            return values[: clients * parameters].reshape(clients, parameters).astype(dtype)

        return jax.block_until_ready(jax.jit(cut)(_values(num_bytes)))

    wanted = [(name, dtype, num_parameters(clients, dtype, num_bytes), False) for name, dtype in LINES]
    if power := aligned_parameters(clients, num_bytes):
        wanted += [(name, "float32", power, True) for name in ALIGNED_LINES]
    everybody, points = [], []
    for name, dtype, parameters, aligned in wanted:
        row, takes_weights = _row(name)
        arguments = (updates(parameters, dtype), weights) if takes_weights else (updates(parameters, dtype),)
        label = f"{name} {dtype} {parameters}"
        everybody.append(Contender(label, partial(jax.jit(row.call), *arguments), jax.block_until_ready))
        results = jax.tree.leaves(jax.eval_shape(row.call, *arguments))
        num_moved = sum(array.size * array.dtype.itemsize for array in (*arguments, *results))
        point = {"row": name, "dtype": dtype, "aligned": aligned, "clients": clients, "parameters": parameters}
        points.append(point | {"bytes": num_moved})
    buffer = updates(num_parameters(clients, "float32", num_bytes), "float32")
    probing = memory_probes(buffer, False, platform)
    timings = {contender.name: Timing(first_call(contender)[1]) for contender in (*probing, *everybody)}
    interleave([*probing, *everybody], timings, repetitions, platform)

    roof = max(probe.amount / timings[probe.name].seconds for probe in probing)
    for contender, point in zip(everybody, points, strict=True):
        timing = timings[contender.name]
        rate = point["bytes"] / timing.seconds
        point |= {"seconds": timing.seconds, "samples": timing.samples, "bytes_per_second": rate}
        point |= {"roof_bytes_per_second": roof, "fraction_of_roof": rate / roof}
    return points
