"""The server side of federated learning, compiled: XLA FFI kernels for CUDA and CPU, exposed as JAX primitives.

>>> import jax, jax.numpy as jnp
>>> import fedfuse_jax as ff
>>> updates = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0], [1e9, jnp.nan]]), "b": jnp.array([0.0, 1.0, -1e9])}
>>> robust = jax.jit(ff.coordinate_median)(updates)
>>> robust["w"].tolist(), robust["b"].tolist()
([3.0, 4.0], 0.0)
"""

__version__ = "0.1.0"  # before the imports, since the compiled modules must be of it

from fedfuse_jax import _core, _native, _versions, reference
from fedfuse_jax._export import export_checks
from fedfuse_jax._versions import show_versions
from fedfuse_jax.centers import centered_clipping, geometric_median
from fedfuse_jax.distances import pairwise_squared_distances
from fedfuse_jax.linear import weighted_mean, weighted_sum
from fedfuse_jax.mixing import bucketing, nearest_neighbor_mixing
from fedfuse_jax.norms import finite_clients, squared_norms
from fedfuse_jax.order_statistics import coordinate_median, mean_around_median, trimmed_mean
from fedfuse_jax.private import adaptive_clip_norm, clipped_noisy_weighted_sum, clipped_weighted_sum, noisy_weighted_sum
from fedfuse_jax.quantized import quantize, quantized_weighted_sum
from fedfuse_jax.rotation import hadamard_rotation, inverse_hadamard_rotation
from fedfuse_jax.selection import bulyan, krum, krum_scores, multi_krum
from fedfuse_jax.server import (
    ServerState,
    fedadagrad_weighted_update,
    fedadam_weighted_update,
    fedavgm_weighted_update,
    fedyogi_weighted_update,
    init_server_state,
)
from fedfuse_jax.sparse import topk_sparse_weighted_sum, topk_sparsify
from fedfuse_jax.streaming import accumulate_weighted, stack_clients

__all__ = [
    "ServerState",
    "accumulate_weighted",
    "adaptive_clip_norm",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "clipped_noisy_weighted_sum",
    "clipped_weighted_sum",
    "coordinate_median",
    "export_checks",
    "fedadagrad_weighted_update",
    "fedadam_weighted_update",
    "fedavgm_weighted_update",
    "fedyogi_weighted_update",
    "finite_clients",
    "geometric_median",
    "hadamard_rotation",
    "init_server_state",
    "inverse_hadamard_rotation",
    "krum",
    "krum_scores",
    "mean_around_median",
    "multi_krum",
    "nearest_neighbor_mixing",
    "noisy_weighted_sum",
    "pairwise_squared_distances",
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

_native.check_disabled_names(_core.OPERATIONS)
_versions.warn_of_newer_jax()
