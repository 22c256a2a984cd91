"""What no code could beat, here and now: probes that do only what nobody is spared, and the least time made of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stopwatch import Contender, Timing, probes_agree

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

READ_PROBE, COPY_PROBE = "read", "copy"

# What a least time is made of.
MEMORY, NEW_PAGES, ARITHMETIC, ONE_ARRAY, LEAVES = "memory", "new pages", "arithmetic", "one array", "leaves"
_LEAVES_OF_ONE = "leaves of one array"

# Who is faster than a probe by more than this has shown that the probe is slow, and nothing else.
FAULT = 1.1
# glibc keeps what it has been given back of arrays up to this size; a larger one is new, and cleared, every time.
KEPT_BYTES = 32 * 2**20
# XLA's product is a probe where its matrices are so much of the bytes that are read, and so many.
PRODUCT_SHARE, PRODUCT_BYTES = 0.9, 2**20
# A product of two matrices of this many rows and columns runs at the rate of the processor's arithmetic.
SQUARE = 1024


@dataclass(frozen=True)
class Probe(Contender):
    """One who does an ``amount`` (bytes, multiply-adds, calls) of a part of the work and nothing else."""

    part: str = MEMORY
    amount: int = 1


# --- Memory ---------------------------------------------------------------------------------------------------


def memory_probes(arguments: Any, copy: bool, platform: str) -> list[Probe]:
    """Streams every input byte once: reads, or for rows that write as they read, copies.

    A CPU is probed by one thread and by all: for small buffers waking a thread costs more than it brings. The
    maximum of 64-bit integers is the cheapest arithmetic NumPy has for a byte, and its copy goes past the caches.
    XLA's product of a vector and a float32 matrix reads faster still where there are such matrices.
    """
    leaves = jax.tree.leaves(arguments)
    if platform == "gpu":
        # There is no reading as fast as a copy is easily had: XLA's own elementwise kernel, in and out.
        numbers = [leaf for leaf in leaves if leaf.dtype != bool]  # what cannot be negated has few bytes
        start = partial(jax.jit(partial(jax.tree.map, jnp.negative)), numbers)
        moved = 2 * sum(leaf.nbytes for leaf in numbers)
        return [Probe(f"{COPY_PROBE}, jnp.negative", start, jax.block_until_ready, amount=moved)]
    num_bytes = sum(leaf.nbytes for leaf in leaves)
    arrays = [np.asarray(leaf) for leaf in leaves]
    targets = [np.zeros_like(array) for array in arrays] if copy else []
    result = []
    for threads in sorted({1, THREADS}):
        sources = _pieces(arrays, threads)
        run: Callable[..., Any] = map if threads == 1 else _pool().map
        if copy:
            start = partial(_drain, run, np.copyto, _pieces(targets, threads), sources)
        else:
            start = partial(_drain, run, np.maximum.reduce, sources)
        name = f"{COPY_PROBE if copy else READ_PROBE}, {threads} threads"
        result.append(Probe(name, start, amount=num_bytes * (1 + copy)))
    matrices = [leaf for leaf in leaves if leaf.ndim == 2 and leaf.dtype == np.float32]
    in_matrices = sum(matrix.nbytes for matrix in matrices)
    if not copy and in_matrices >= max(PRODUCT_SHARE * num_bytes, PRODUCT_BYTES):
        start = partial(jax.jit(partial(jax.tree.map, lambda matrix: jnp.ones(len(matrix)) @ matrix)), matrices)
        result.append(Probe(f"{READ_PROBE}, XLA's product", start, jax.block_until_ready, amount=in_matrices))
    return result


def new_page_probe(sizes: Sequence[int]) -> Probe:
    """Writes arrays of so many bytes for the first time, in pages as large as NumPy can have them.

    They are given back where a contender's results are: when the stopwatch lets go of them.
    """

    def start() -> list[np.ndarray]:
        arrays = [np.empty(size // 8, np.int64) for size in sizes]
        _drain(_pool().map, lambda piece: piece.fill(0), _pieces(arrays, THREADS))
        return arrays

    return Probe(f"{NEW_PAGES}, {THREADS} threads", start, part=NEW_PAGES)


def new_bytes(result: Any) -> list[int]:
    """The sizes of those arrays of a result that the C library has to ask the system for."""
    return [leaf.nbytes for leaf in jax.tree.leaves(result) if leaf.nbytes > KEPT_BYTES]


def _pieces(arrays: Iterable[np.ndarray], threads: int) -> list[np.ndarray]:
    """The buffers as 64-bit words (a last odd one left out), cut for so many threads."""
    words = [array.reshape(-1).view(np.uint8) for array in arrays]
    words = [array[: array.size // 8 * 8].view(np.int64) for array in words if array.nbytes >= 8]
    return [piece for array in words for piece in np.array_split(array, threads) if piece.size]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


def _drain(run: Callable[..., Iterator[Any]], *arguments: Any) -> None:
    for _ in run(*arguments):
        pass


# --- Everything else ------------------------------------------------------------------------------------------


def arithmetic_probes() -> list[Probe]:
    """NumPy's and XLA's product of two different matrices (of one with itself NumPy computes a half), by all threads.

    NumPy's threads wait for each other awake, and take several times as long as XLA's where a core is shared.
    """
    first, second = np.ones((SQUARE, SQUARE), np.float32), np.ones((SQUARE, SQUARE), np.float32)
    product = partial(jax.jit(jnp.matmul), jnp.asarray(first), jnp.asarray(second))
    amount = SQUARE**3
    return [
        Probe("arithmetic, NumPy's product", lambda: first @ second, part=ARITHMETIC, amount=amount),
        Probe("arithmetic, XLA's product", product, jax.block_until_ready, part=ARITHMETIC, amount=amount),
    ]


def leaf_probes(tree: Any, arguments: Any, num_results: int, num_of_one: int) -> list[Probe]:
    """JAX's own time to take as many arrays and return as many as a call with the tree, and as one without.

    The arrays have a number each: how many bytes are behind a leaf makes no difference to JAX.
    """

    def probe(part: str, taken: Any, returned: int) -> Probe:
        def call(leaves: list[Any]) -> list[Any]:
            return [-leaves[number % len(leaves)] for number in range(returned)]

        leaves = [jnp.ones(1) for _ in jax.tree.leaves(taken)]
        return Probe(part, partial(jax.jit(call, keep_unused=True), leaves), jax.block_until_ready, part=part)

    return [probe(LEAVES, tree, num_results), probe(_LEAVES_OF_ONE, arguments, num_of_one)]


# --- The least time -------------------------------------------------------------------------------------------


def fastest(part: str, probing: Iterable[Probe], timings: Mapping[str, Timing]) -> Probe | None:
    """Of the probes of one part the one that got the most done a second."""
    of_part = [probe for probe in probing if probe.part == part]
    return max(of_part, key=lambda probe: probe.amount / timings[probe.name].seconds, default=None)


@dataclass(frozen=True)
class Bound:
    """The least time of a row: ``parts`` in seconds, and the probes that say so."""

    parts: Mapping[str, float]
    probes: Sequence[str]

    @property
    def seconds(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def holds(self, ours: float, timings: Mapping[str, Timing]) -> bool:
        """Whether it can be believed: the probes agree with themselves, and we are not faster than it."""
        steady = all(probes_agree(timings[name].samples) for name in self.probes)
        return steady and ours * FAULT >= self.seconds


def floor(moved: int, multiply_adds: int, probing: Sequence[Probe], timings: Mapping[str, Timing]) -> Bound:
    """The least time in which so many bytes move, or so many multiply-adds are made, whichever takes longer."""
    wanted = {MEMORY: moved} | ({ARITHMETIC: multiply_adds} if multiply_adds else {})
    parts = {part: _least(part, probing, timings, amount) for part, amount in wanted.items()}
    longest = max(parts, key=lambda part: parts[part].seconds)
    return parts[longest]


def bound(
    moved: int, new: int, multiply_adds: int, probing: Sequence[Probe], timings: Mapping[str, Timing]
) -> Bound | None:
    """The floor, and what nobody is spared beyond it: the ``new`` ones of the bytes written into new pages.

    A tree is only asked for what its leaves cost beside one array.
    """
    parts_there = {probe.part for probe in probing}
    if LEAVES in parts_there:
        if ONE_ARRAY not in timings:
            return None
        tree, one = (_least(part, probing, timings) for part in (LEAVES, _LEAVES_OF_ONE))
        more = max(tree.seconds - one.seconds, 0.0)
        return Bound({ONE_ARRAY: timings[ONE_ARRAY].seconds, LEAVES: more}, (*tree.probes, *one.probes))
    if NEW_PAGES in parts_there:
        rest, pages = _least(MEMORY, probing, timings, moved - new), _least(NEW_PAGES, probing, timings)
        return Bound({**rest.parts, **pages.parts}, (*rest.probes, *pages.probes))
    return floor(moved, multiply_adds, probing, timings)


def _least(part: str, probing: Sequence[Probe], timings: Mapping[str, Timing], amount: int = 1) -> Bound:
    probe = fastest(part, probing, timings)
    assert probe is not None, part
    return Bound({part: amount / probe.amount * timings[probe.name].seconds}, (probe.name,))
