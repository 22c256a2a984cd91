"""Exports every case of the battery with the installed release, for tests/test_released_programs.py.

    python tests/released/make.py tests/released/0.1.0.zip

Run it with a release and the oldest JAX that it supports, when that release is made; the archive is never made anew.
"""

import io
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax import export

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from operations import CASES, Problem, to_jax

import fedfuse_jax as ff


def batched(case):
    """Mapped over its last argument alone, so that the others are shared."""
    axes = [None] * (len(case.names) - 1) + [0]
    return jax.vmap(case.call, in_axes=axes)


def programs():
    """(name, function, arguments) of each program."""
    for case in CASES:
        values = case.sample(Problem())
        yield str(case), case.call, values
        if case.names[-1] != "key":
            twice = jax.tree.map(lambda x: np.stack([x, x]), values[-1])
            yield f"{case}-batched", batched(case), (*values[:-1], twice)


def main(path: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, function, values in programs():
            arguments = to_jax(values)
            program = export.export(jax.jit(function), disabled_checks=ff.export_checks())(*arguments)
            results = jax.jit(function)(*arguments)
            leaves = {f"argument{i:02}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(arguments))}
            leaves |= {f"result{i:02}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(results))}
            buffer = io.BytesIO()
            np.savez(buffer, program=np.frombuffer(program.serialize(), np.uint8), **leaves)
            archive.writestr(f"{name}.npz", buffer.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
