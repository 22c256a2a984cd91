"""Run as a script: prints a digest of every case's result, so that processes can be compared, bit by bit."""

import collections
import glob
import hashlib
import json
import sys

import jax
import numpy as np
from operations import CASES, DTYPES, Problem, to_jax

# Large enough to be cut into many tasks; sizes that nothing divides.
SHAPES = (("long", (200_003,)), ("short", (77,)), ("matrix", (333, 101)))


def digest(tree):
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        bits.update(np.asarray(leaf).tobytes())
    return bits.hexdigest()[:16]


def pool_size():
    """How many threads XLA computes with, as Linux names them."""
    names = collections.Counter()
    for path in glob.glob("/proc/self/task/*/comm"):
        with open(path) as file:
            names[file.read().strip()] += 1
    return names["tf_XLAEigen"]


def main():
    """Prints JSON: the pool's size, and digests by case and dtype."""
    if len(sys.argv) > 1 and sys.argv[1] == "check":
        check()
        return
    digests = {}
    for dtype in ("float32", "bfloat16"):
        for case in CASES:
            values = to_jax(case.sample(Problem(n_clients=11, shapes=SHAPES, dtype=dtype)))
            digests[f"{case} {dtype}"] = digest(jax.jit(case.call)(*values))
    print(json.dumps({"threads": pool_size(), "digests": digests}))


def check():
    """Compares every case with the oracle under whatever the environment chose; prints digests of selections."""
    digests = {}
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            for n_clients in (7, 40, 150, 300):
                for values_kind in ("normal", "wild"):
                    for case in CASES:
                        if case.row.operation == "stack_clients" and n_clients > 7:
                            continue
                        problem = Problem(n_clients, (("x", (261,)), ("b", ())), dtype, values_kind, seed=n_clients)
                        values = case.sample(problem)
                        got = jax.jit(case.call)(*to_jax(values))
                        case.check(got, values)
                        if case.row.operation == "coordinate_median":
                            digests[f"{case} {dtype} {n_clients} {values_kind}"] = digest(got)
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
