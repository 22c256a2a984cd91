"""Programs that a release exported still run, and to the same values: what a custom call looks like is frozen."""

import io
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from operations import all_kernels_built

RELEASES = sorted(Path(__file__).parent.glob("released/*.zip"))


def programs(release):
    with zipfile.ZipFile(release) as archive:
        return archive.namelist()


@pytest.mark.skipif(not all_kernels_built(), reason="an exported program needs the kernels")
@pytest.mark.parametrize(("release", "name"), [(path, name) for path in RELEASES for name in programs(path)],
                         ids=lambda value: getattr(value, "stem", value))  # fmt: skip
def test_program_of_a_release(release, name):
    with zipfile.ZipFile(release) as archive:
        stored = np.load(io.BytesIO(archive.read(name)))
    program = export.deserialize(bytearray(stored["program"].tobytes()))
    arguments = [jnp.asarray(stored[key]) for key in stored.files if key.startswith("argument")]
    expected = [stored[key] for key in stored.files if key.startswith("result")]
    positional, named = jax.tree.unflatten(program.in_tree, arguments)
    results = jax.tree.leaves(program.call(*positional, **named))
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        # Across instruction sets, sums agree to rounding.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_there_are_programs():
    assert sum(len(programs(path)) for path in RELEASES) > 100
