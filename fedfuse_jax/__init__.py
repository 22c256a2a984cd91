"""The server side of federated learning, compiled: XLA FFI kernels for CUDA and CPU, exposed as JAX primitives.

>>> import jax, jax.numpy as jnp
>>> import fedfuse_jax as ff
>>> updates = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0], [1e9, jnp.nan]]), "b": jnp.array([0.0, 1.0, -1e9])}
>>> robust = jax.jit(ff.coordinate_median)(updates)
>>> robust["w"].tolist(), robust["b"].tolist()
([3.0, 4.0], 0.0)
"""

from fedfuse_jax import _native, _primitive, reference
from fedfuse_jax._versions import show_versions
from fedfuse_jax.compressed import (
    hadamard_rotation,
    inverse_hadamard_rotation,
    quantize,
    quantized_weighted_sum,
    topk_sparse_weighted_sum,
    topk_sparsify,
)
from fedfuse_jax.reduce import (
    accumulate_weighted,
    export_checks,
    finite_clients,
    squared_norms,
    stack_clients,
    weighted_mean,
    weighted_sum,
)
from fedfuse_jax.robust import coordinate_median, trimmed_mean

__version__ = "0.1.0"

__all__ = [
    "accumulate_weighted",
    "coordinate_median",
    "export_checks",
    "finite_clients",
    "hadamard_rotation",
    "inverse_hadamard_rotation",
    "quantize",
    "quantized_weighted_sum",
    "reference",
    "show_versions",
    "squared_norms",
    "stack_clients",
    "topk_sparse_weighted_sum",
    "topk_sparsify",
    "trimmed_mean",
    "weighted_mean",
    "weighted_sum",
]

_native.check_disabled_names(_primitive.OPERATIONS)
