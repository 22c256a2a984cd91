#!/usr/bin/env python3
"""What tools/gpu_session.sh runs on a card besides the suite and the benchmarks.

    python tools/gpu_checks.py kernels                 # every kernel, small: what compute-sanitizer watches
    python tools/gpu_checks.py kernels --log build.log # and which of the kernels in a build's log a profiler saw run
    python tools/gpu_checks.py loop RESULT.npy         # a jitted loop of operations of all families, run over and over
    python tools/gpu_checks.py streams                 # the same operations on two streams, and from several threads

The calls come from the table of operations that drives the tests; tests/test_gpu_session.py checks, without a card,
that no operation is missing.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import inspect
import itertools
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import check_cuda_build  # noqa: E402
import operations  # noqa: E402

import fedfuse_jax as ff  # noqa: E402

# A leaf that is longer than the widest tile, so that loads meet both a whole tile and the end of one; and short ones.
SHAPES = (("kernel", (2501,)), ("bias", (3,)), ("empty", (0,)))
# More leaves than go into the small tables of some kernels (kFewLeaves in ffi/cuda/launch.h).
MANY_SHAPES = tuple((f"leaf {i}", (1 + i % 3,)) for i in range(40))
# The numbers of clients for which selection networks are compiled, for one type or another, and more than fit those.
NETWORK_SIZES = (4, 8, 10, 12, 16, 20, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192)
MANY_CLIENTS = (193, 300, 700, 1500)


class Call(NamedTuple):
    """A function of arrays, and the arrays."""

    function: Callable[..., Any]
    values: tuple[Any, ...]


def kernel_calls(dtype: str) -> Iterator[Call]:
    """Calls that between them run every kernel there is for updates of this dtype."""
    for shapes in (SHAPES, MANY_SHAPES):
        for case in operations.CASES:
            yield Call(case.call, case.sample(operations.Problem(dtype=dtype, shapes=shapes)))
    for clients in NETWORK_SIZES + MANY_CLIENTS:
        updates = np.random.default_rng(clients).standard_normal((clients, 301)).astype(jnp.dtype(dtype))
        where = np.arange(clients) % 5 != 1
        for function in (ff.coordinate_median, ff.trimmed_mean):
            yield Call(function, (updates,))
        yield Call(lambda updates, where: ff.trimmed_mean(updates, where=where), (updates, where))
        if clients in (*NETWORK_SIZES[:2], *NETWORK_SIZES[-2:], *MANY_CLIENTS):
            yield Call(lambda updates: jax.grad(lambda u: ff.trimmed_mean(u).sum())(updates), (updates,))
            yield Call(lambda updates: jax.jvp(ff.coordinate_median, (updates,), (updates,)), (updates,))
            yield Call(lambda updates: ff.mean_around_median(updates, num_byzantine=1), (updates,))
    if dtype in ("float32", "float64"):
        yield from quantized_calls(dtype)


def quantized_calls(dtype: str) -> Iterator[Call]:
    """Every kind of code, and the derivative in the zero points, by small blocks and by a large one."""
    size = 2500

    def total(num_bits: int, block_size: int, codes: Any, *factors: Any) -> Any:
        return (ff.quantized_weighted_sum(codes, *factors, num_bits=num_bits, block_size=block_size) ** 2).sum()

    for code, num_bits, block_size in itertools.product(("uint8", "int8"), (8, 4), (100, size)):
        codes = np.arange(3 * (size * num_bits // 8)).reshape(3, -1).astype(code)
        factors = np.ones((3, size // block_size), dtype)
        gradient = jax.grad(functools.partial(total, num_bits, block_size), (1, 2, 3))
        yield Call(gradient, (codes, factors, factors, np.ones(3, dtype)))


def together(calls: list[Call]) -> tuple[Callable[..., Any], Any]:
    """One program of them all: XLA compiles one large one sooner than many small ones."""
    values = [operations.to_jax(call.values) for call in calls]
    return lambda values: [call.function(*given) for call, given in zip(calls, values, strict=True)], values


def run_every_kernel() -> None:
    """Each dtype's calls as one program."""
    for dtype in operations.DTYPES:
        with jax.enable_x64(dtype == "float64"):
            program, values = together(list(kernel_calls(dtype)))
            jax.block_until_ready(jax.jit(program)(values))
        print(f"{dtype}: {len(values)} calls")


def kernels_in_trace(folder: Path) -> set[str]:
    """The labels of our kernels in the trace that JAX's profiler left there."""
    names = set()
    for path in folder.rglob("*trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names |= {event["name"] for event in events if "run_tasks" in event.get("name", "")}
    mangled = sorted(name for name in names if name.startswith("_Z"))
    readable = check_cuda_build.demangle(mangled) if mangled else {}
    return {check_cuda_build.label_of(readable.get(name, name)) for name in names}


def report_reached(log: Path) -> None:
    """Runs every kernel under JAX's profiler, and prints the kernels of the build that it did not see."""
    compiled = {kernel.label for kernel in check_cuda_build.parse(log.read_text())}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run_every_kernel()
        seen = kernels_in_trace(Path(folder))
    print(f"{len(compiled & seen)} of {len(compiled)} kernels of {log} seen to run")
    for label in sorted(compiled - seen):
        print(f"not seen: {label}")


# --- The same bits, however they are run ------------------------------------------------------------------------


def inputs() -> dict[str, Any]:
    """What the step below works on."""
    updates = jax.random.normal(jax.random.key(0), (20, 10007))
    return {
        "updates": {"kernel": updates, "bias": updates[:, :3].astype("bfloat16")},
        "weights": jnp.arange(1.0, 21.0),
        "values": updates[:, :100],
        "indices": jnp.sort(jax.random.randint(jax.random.key(1), (20, 100), 0, 10007)),
        "codes": jax.random.bits(jax.random.key(2), (20, 10007), "uint8"),
    }


def step(state: ff.ServerState, params: Any, given: dict[str, Any], i: Any) -> tuple[ff.ServerState, Any]:
    """A round with an operation of every family in it."""
    updates = jax.tree.map(lambda leaf, param: leaf + param.astype(leaf.dtype), given["updates"], params)
    weights = given["weights"]
    where = ff.finite_clients(updates)
    median = ff.coordinate_median(updates, where=where)
    mean = ff.trimmed_mean(updates, trim_count=i % 3)
    clipped = ff.clipped_noisy_weighted_sum(jax.random.fold_in(jax.random.key(3), i), updates, weights, 9.0, 0.01)
    krum = ff.multi_krum(updates, num_byzantine=3)
    center = ff.geometric_median(updates, num_iterations=3)
    sparse = ff.topk_sparse_weighted_sum(given["values"], given["indices"], weights, 10007)
    codes = ff.quantized_weighted_sum(given["codes"], weights, weights, weights)
    update = jax.tree.map(lambda *leaves: sum(leaf.astype("float32") for leaf in leaves), median, mean, krum, center)
    update["kernel"] = update["kernel"] + 1e-3 * (sparse + codes)
    update = ff.accumulate_weighted(update, clipped, 0.5)
    stacked = ff.stack_clients([update, params])
    params, state = ff.fedadam_weighted_update(params, state, stacked, weights[:2], learning_rate=0.01)
    return state, params


def loop(given: dict[str, Any]) -> jax.Array:
    """Some rounds in one program; all parameters in the end."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), given["updates"])
    start = (ff.init_server_state(params), params)
    _, params = jax.lax.fori_loop(0, 20, lambda i, carry: step(*carry, given, i), start)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def run_loop(result: Path) -> None:
    """Over and over, as command buffers are replayed: the same bits each time, and left in a file."""
    run, given = jax.jit(loop), inputs()
    first = np.asarray(run(given))
    for _ in range(5):
        np.testing.assert_array_equal(run(given), first)
    assert np.isfinite(first).all()
    assert first.any()
    np.save(result, first)
    print(f"loop: the same bits {5 + 1} times")


def on_stream(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on a stream of its own, as this JAX has it asked for."""
    kind = f"gpu_stream:{number}"
    if "out_memory_spaces" in inspect.signature(compute_on).parameters:
        return compute_on(jax.jit(function), compute_type=kind, out_memory_spaces=jax.memory.Space.Device)
    return compute_on(kind)(jax.jit(function))


def check_streams() -> None:
    """Two streams of one program, and one program run by several threads, give what one of each gives."""
    given = inputs()

    def some(updates: Any, weights: Any) -> Any:
        return ff.trimmed_mean(updates), ff.squared_norms(updates), ff.weighted_mean(updates, weights)

    doubled = jax.tree.map(lambda leaf: 2 * leaf, given["updates"])
    separate = jax.jit(some)(given["updates"], given["weights"]), jax.jit(some)(doubled, given["weights"])
    both = jax.jit(lambda a, b, weights: (on_stream(1, some)(a, weights), on_stream(2, some)(b, weights)))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, both(given["updates"], doubled, given["weights"]), separate)
    print("two streams: the same bits")

    run = jax.jit(loop)
    wanted = np.asarray(run(given))
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(np.asarray(run(given)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    for result in results:
        np.testing.assert_array_equal(result, wanted)
    print(f"{len(threads)} threads: the same bits")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels").add_argument("--log", type=Path, help="the output of a build with -Xptxas -v")
    commands.add_parser("loop").add_argument("result", type=Path)
    commands.add_parser("streams")
    options = parser.parse_args()
    if options.command == "kernels":
        report_reached(options.log) if options.log else run_every_kernel()
    elif options.command == "loop":
        run_loop(options.result)
    else:
        check_streams()


if __name__ == "__main__":
    main()
