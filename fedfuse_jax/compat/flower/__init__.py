"""Flower's strategies (1.41): their names, arguments and conventions, computed by ours.

    >>> import numpy as np
    >>> from fedfuse_jax.compat import flower
    >>> clients = [[np.full(2, value, np.float32)] for value in (1.0, 2.0, 3.0, np.nan)]
    >>> flower.FedMedian()(clients)
    [array([2.5, 2.5], dtype=float32)]

What the clients send is client-stacked: a pytree whose every leaf has the shape `(n_clients, ...)`; or, as Flower has
it, a list of one list of arrays per client (its `NDArrays`), and then a list of NumPy arrays comes back. A list of
lists is always read the second way. `num_examples` are the clients' numbers of examples; `None`: they count alike.
On pytrees of JAX arrays the strategies work under `jit` and `vmap`, and a strategy may be a static argument: equal ones
are equal.

Every floating array keeps its dtype, rounded once. In lists of arrays float64 is float64 whether or not JAX has
`jax_enable_x64`, and integers, such as batch counters, become float64, as they do in Flower. In pytrees both are what
JAX makes of them: float32, unless `jax_enable_x64` is on.

**Aggregation.** `FedAvg`, `FedMedian`, `FedTrimmedAvg`, `Krum`, `MultiKrum`, `Bulyan` and `LegacyBulyan` have no state,
and are called as `rule(updates, num_examples)`; whether the updates are models or differences is all the same to them.
In all but `FedAvg` a client with NaN or infinities is one bad client: it is infinitely far from the others, NaN is the
greatest of values, and the result is NaN only where more clients are bad than the rule can bear.

**Server optimizers.** `FedAvgM`, `FedAdagrad`, `FedAdam` and `FedYogi` step the server's parameters along Δ, the
clients' mean less the parameters. Flower's clients send whole models, so whole models are what they take: for
differences, client − server, there are `fedfuse_jax.fedadam_weighted_update` and its like.

    >>> strategy = flower.FedAvgM(server_momentum=0.5)
    >>> params = [np.zeros(2, np.float32)]
    >>> state = strategy.init(params)
    >>> for _ in range(2):
    ...     models = [[params[0] + 1], [params[0] + 3]]
    ...     params, state = strategy(params, state, models, [30, 10])
    >>> params
    [array([3.75, 3.75], dtype=float32)]

Flower's objects keep parameters, moments and the number of the round in themselves. Here they come in and go out, so
that the call may be jitted, its buffers donated, and the state saved. A round that is empty (`models` is an empty list,
or the numbers of examples sum to 0), or whose Δ has a NaN or an infinity anywhere, changes nothing, state and round
included; there, no reply changes nothing either, but one client's NaN stays in the model and the moments for good.
Inside your own `shard_map`, which may hide it from some devices, use the operations named above and their `axis_name`.

Left out are the arguments that say whom to sample and where in a message to look.
"""

from fedfuse_jax.compat.flower.aggregators import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    LegacyBulyan,
    MultiKrum,
)
from fedfuse_jax.compat.flower.optimizers import FedAdagrad, FedAdam, FedAvgM, FedYogi

__all__ = [
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "LegacyBulyan",
    "MultiKrum",
]
