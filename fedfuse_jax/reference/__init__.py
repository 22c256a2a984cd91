"""What each operation means, in ``jax.numpy``.

These functions are the specification of the compiled kernels, the code that runs where no kernel exists, and
the first thing to read about an operation. They take the same arguments as the public operations, trust them
to be valid, and favour the obvious over the fast.

Conventions, in every function: the leading axis of a leaf is the client axis; low-precision leaves are
widened before anything is added; an absent client (``where`` is ``False``) is selected away, never multiplied
by zero, so its NaNs go nowhere.
"""

from fedfuse_jax.reference.centers import step_toward_clients
from fedfuse_jax.reference.common import accumulator_dtype, or_nan
from fedfuse_jax.reference.distances import difference_dots, pairwise_squared_distances
from fedfuse_jax.reference.linear import client_dots, weighted_mean, weighted_spread, weighted_sum
from fedfuse_jax.reference.mixing import mix_clients
from fedfuse_jax.reference.norms import client_norms, finite_clients, power_of_two_near, squared_norms
from fedfuse_jax.reference.order_statistics import (
    coordinate_median,
    mean_around_median,
    median_trim_count,
    selected_mean,
    spread_to_selected,
    trim_counts,
    trimmed_mean,
)
from fedfuse_jax.reference.private import (
    adaptive_clip_norm,
    add_noise,
    clipped_noisy_weighted_sum,
    clipped_weighted_sum,
    leaf_keys,
    noisy_weighted_sum,
)
from fedfuse_jax.reference.quantized import pack_codes, quantize, quantized_dots, quantized_weighted_sum, unpack_codes
from fedfuse_jax.reference.rotation import (
    hadamard_rotation,
    inverse_hadamard_rotation,
    padded_size,
    walsh_hadamard_transform,
)
from fedfuse_jax.reference.server import (
    SERVER_RULES,
    fedadagrad_weighted_update,
    fedadam_weighted_update,
    fedavgm_weighted_update,
    fedyogi_weighted_update,
    next_step,
    server_step,
    server_update,
)
from fedfuse_jax.reference.sparse import sparse_dots, sparse_spread, topk_sparse_weighted_sum, topk_sparsify
from fedfuse_jax.reference.streaming import accumulate_weighted, stack_clients

__all__ = [
    "SERVER_RULES",
    "accumulate_weighted",
    "accumulator_dtype",
    "adaptive_clip_norm",
    "add_noise",
    "client_dots",
    "client_norms",
    "clipped_noisy_weighted_sum",
    "clipped_weighted_sum",
    "coordinate_median",
    "difference_dots",
    "fedadagrad_weighted_update",
    "fedadam_weighted_update",
    "fedavgm_weighted_update",
    "fedyogi_weighted_update",
    "finite_clients",
    "hadamard_rotation",
    "inverse_hadamard_rotation",
    "leaf_keys",
    "mean_around_median",
    "median_trim_count",
    "mix_clients",
    "next_step",
    "noisy_weighted_sum",
    "or_nan",
    "pack_codes",
    "padded_size",
    "pairwise_squared_distances",
    "power_of_two_near",
    "quantize",
    "quantized_dots",
    "quantized_weighted_sum",
    "selected_mean",
    "server_step",
    "server_update",
    "sparse_dots",
    "sparse_spread",
    "spread_to_selected",
    "squared_norms",
    "stack_clients",
    "step_toward_clients",
    "topk_sparse_weighted_sum",
    "topk_sparsify",
    "trim_counts",
    "trimmed_mean",
    "unpack_codes",
    "walsh_hadamard_transform",
    "weighted_mean",
    "weighted_spread",
    "weighted_sum",
]
