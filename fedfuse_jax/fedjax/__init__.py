"""FedJAX: our rules as FedJAX aggregators, and federated averaging that takes one.

Works with the `fedjax` on PyPI (0.0.17) under current JAX without patching either. FedJAX's own
`mean_aggregator` and `federated_averaging` call the removed `jax.tree_map`; the ones here have the
same signatures and do not. No arithmetic on updates happens in this package: it turns FedJAX's
words into ours and calls the core.

    import fedjax
    from fedfuse_jax.fedjax import federated_averaging, trimmed_mean_aggregator

    algorithm = federated_averaging(
        grad_fn, client_optimizer, server_optimizer, client_batch_hparams,
        aggregator=trimmed_mean_aggregator(0.25),
    )

`mean` takes one client at a time, and `compression` quantises each on its way to it;
`order_statistics`, `robust` and `private` stack all updates and reduce them, the first two after
`pre_aggregators`; `averaging` is the algorithm around an aggregator, and `server_optimizers` are
those that need none.
"""

from fedfuse_jax.fedjax._stacking import PreAggregator
from fedfuse_jax.fedjax.averaging import StatefulServerState, federated_averaging
from fedfuse_jax.fedjax.compression import (
    rotated_uniform_stochastic_quantizer,
    structured_drive_quantizer,
    terngrad_quantizer,
    uniform_stochastic_quantizer,
)
from fedfuse_jax.fedjax.mean import mean_aggregator
from fedfuse_jax.fedjax.order_statistics import (
    mean_around_median_aggregator,
    median_aggregator,
    trimmed_mean_aggregator,
)
from fedfuse_jax.fedjax.pre_aggregators import bucketing_pre_aggregator, nearest_neighbor_mixing_pre_aggregator
from fedfuse_jax.fedjax.private import clipped_noisy_mean_aggregator
from fedfuse_jax.fedjax.robust import (
    bulyan_aggregator,
    centered_clipping_aggregator,
    geometric_median_aggregator,
    krum_aggregator,
    multi_krum_aggregator,
)
from fedfuse_jax.fedjax.server_optimizers import FusedOptimizer, fedadagrad, fedadam, fedavgm, fedyogi

__all__ = [
    "FusedOptimizer",
    "PreAggregator",
    "StatefulServerState",
    "bucketing_pre_aggregator",
    "bulyan_aggregator",
    "centered_clipping_aggregator",
    "clipped_noisy_mean_aggregator",
    "fedadagrad",
    "fedadam",
    "fedavgm",
    "federated_averaging",
    "fedyogi",
    "geometric_median_aggregator",
    "krum_aggregator",
    "mean_aggregator",
    "mean_around_median_aggregator",
    "median_aggregator",
    "multi_krum_aggregator",
    "nearest_neighbor_mixing_pre_aggregator",
    "rotated_uniform_stochastic_quantizer",
    "structured_drive_quantizer",
    "terngrad_quantizer",
    "trimmed_mean_aggregator",
    "uniform_stochastic_quantizer",
]
