"""JAX's persistent compilation cache, in processes of their own, as the installation page says."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import fedfuse_jax as ff

folder, kind = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
mesh = jax.make_mesh((4,), ("a",), (AxisType[kind],))

def norms_of(updates):
    return ff.squared_norms(updates)

with jax.set_mesh(mesh):
    updates = jax.device_put(jnp.arange(24.0).reshape(3, 8), NamedSharding(mesh, PartitionSpec(None, "a")))
    print(jax.jit(norms_of)(updates))
"""


@pytest.mark.parametrize(
    ("kind", "without_address", "entries"), [("Explicit", "false", 1), ("Auto", "true", 1), ("Auto", "false", 2)]
)
def test_a_second_process_finds_the_program(tmp_path, kind, without_address, entries):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": without_address,
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), kind]
    first, second = (
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)
    )
    assert first == second
    assert len(list(tmp_path.glob("jit_norms_of-*-cache"))) == entries
