"""Loading a module of the package anew, as notebooks do, breaks nothing."""

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import jax, jax.numpy as jnp
from jax import export
import fedfuse_jax as ff

def check():
    params, updates = jnp.zeros(3), jnp.ones((4, 3))
    def step(state, updates):
        return ff.fedadam_weighted_update(params, state, updates, learning_rate=0.1)
    state = ff.init_server_state(params)
    program = export.export(jax.jit(step), disabled_checks=ff.export_checks())(state, updates)
    _, after = export.deserialize(program.serialize()).call(state, updates)
    assert type(after) is ff.ServerState, type(after)
    assert "fedfuse.coordinate_median.v1" in jax.jit(ff.coordinate_median).lower(updates).as_text() or not compiled
    assert jax.jit(ff.coordinate_median)(updates).tolist() == [1, 1, 1]
    assert ff.krum(updates, 1).tolist() == [1, 1, 1]

def ours():
    return [name for name in sys.modules if name.startswith("fedfuse_jax") and not name.endswith(("._cpu", "._cuda"))]

compiled = ff._native.has_kernel("coordinate_median", "cpu")
for module in sys.argv[1:]:
    importlib.import_module(module)
check()
names = ours()
for name in names:
    importlib.reload(sys.modules[name])
    importlib.reload(sys.modules["fedfuse_jax"])
    ff = sys.modules["fedfuse_jax"]
    check()
for name in names:
    del sys.modules[name]
import fedfuse_jax as ff
assert ff._native.has_kernel("coordinate_median", "cpu") == compiled
check()
del sys.modules["fedfuse_jax.server"]
importlib.import_module("fedfuse_jax.server")
importlib.reload(ff)
check()
print("as good as new,", len(names))
"""
ADAPTERS = ["fedfuse_jax.optax", "fedfuse_jax.fedjax", "fedfuse_jax.compat.flower", "fedfuse_jax.compat.byzfl"]


def test_every_module_may_be_loaded_anew():
    done = subprocess.run([sys.executable, "-c", CODE, *ADAPTERS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("as good as new"), done.stdout
