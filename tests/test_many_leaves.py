"""Trees of thousands of leaves: nothing is done for every leaf as often as there are leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import has_kernel

from fedfuse_jax import _core


class Counted(dict):
    """Sizes by axis that count how many of them were looked at one after the other."""

    seen = 0

    def items(self):
        for item in super().items():
            self.seen += 1
            yield item


@pytest.mark.parametrize(
    "name",
    ["squared_norms", "client_dots", "clipped_weighted_sum", "pairwise_squared_distances", "fedadam_weighted_update"],
)
def test_workspaces_take_one_pass_over_the_axes(name):
    num_leaves = 100
    sizes = Counted(clients=3, **{f"leaf{i}.axis{axis}": 1 + axis for i in range(num_leaves) for axis in range(2)})
    layout = _core.Layout(num_leaves, 0, (), ("float32",) * (1 + 3 * num_leaves), ())
    assert _core.OPERATIONS[name].workspace(sizes, layout) > 0
    assert sizes.seen == len(sizes)


def test_coordinates_of_leaves():
    sizes = {"clients": 5, "leaf0.axis0": 2, "leaf11.axis0": 3, "leaf11.axis1": 4, "leaves": 7}
    assert _core.coordinates_of_leaves(sizes, 12) == [2, *[1] * 10, 12]


@pytest.mark.skipif(not has_kernel("stack_clients"), reason="no compiled kernel to refuse anything")
def test_a_stack_of_more_clients_than_operands_is_refused_at_once():
    """Before anything is kept for every client and every leaf."""
    result = jax.ShapeDtypeStruct((20,), jnp.float32)
    call = jax.ffi.ffi_call("fedfuse.stack_clients.v1", [result] * 20)
    attributes = {name: np.int32(20) for name in ("num_leaves", "num_clients")}
    with pytest.raises(jax.errors.JaxRuntimeError, match="num_clients is 20; it needs to be from 1 to 1"):
        jax.block_until_ready(call(*[jnp.ones(())] * 20, batch_dims=np.int32(0), **attributes))
