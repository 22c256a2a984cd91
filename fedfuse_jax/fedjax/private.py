"""The mean that tells little of any one client: clipped, with Gaussian noise."""

from __future__ import annotations

import math
from typing import Any

import fedjax
import jax
import jax.numpy as jnp

from fedfuse_jax import _checks as checks
from fedfuse_jax import clipped_noisy_weighted_sum
from fedfuse_jax.fedjax._stacking import bound, stateful_stacking_aggregator


def clipped_noisy_mean_aggregator(
    max_norm: float, noise_multiplier: float, rng: fedjax.PRNGKey, *, expected_clients: float | None = None
) -> fedjax.aggregators.Aggregator:
    r"""Builds the mean of DP-FedAvg: every update is clipped, and Gaussian noise is added to their sum.

    .. math:: y = \frac{1}{m} \Bigl( \sum_i \min\Bigl(1, \frac{C}{\|x_i\|}\Bigr) x_i + z C g \Bigr),
        \qquad g \sim \mathcal{N}(0, I)

    The norm is that of the whole tree. Every client counts once, and the weights are ignored: a client with a larger
    weight would need more noise for all. A client with a NaN or an infinity contributes exactly 0, and still counts.

    Args:
        max_norm: C, a Python number.
        noise_multiplier: z, the noise's standard deviation in the sum over C: what an accountant of privacy asks for.
            0: clipping alone.
        rng: The key of the first round; the state carries the next. Make it of 8 random bytes,
            `jax.random.wrap_key_data(np.frombuffer(secrets.token_bytes(8), np.uint32), impl="threefry2x32")`, and keep
            it: whoever knows it, or tries the 2³² that `jax.random.key(seed)` makes, can take the noise away.
        expected_clients: m, a Python number above 0: how many clients take part in a round on average. `None`: as
            many as came; see the notes.

    Returns:
        A `fedjax.aggregators.Aggregator` whose state holds the key; `apply(clients_params_and_weights, state)` takes
        an iterable of `(client_id, params, weight)`, each `params` a pytree of floating leaves, and returns `(mean,
        state)` with the dtypes of the clients' leaves. All updates are held and stacked once; clipping, sum and noise
        are one call.

    Raises:
        ValueError: `max_norm` or `noise_multiplier` is negative or their product not finite, `expected_clients` is not
            above 0 and finite, or `rng` is not a single key. From `apply`: there is no client at all, or the clients'
            trees or shapes differ.
        TypeError: `max_norm`, `noise_multiplier` or `expected_clients` is not a Python number, or `rng` is no JAX
            key. From `apply`: a leaf is not floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedfuse_jax.fedjax import clipped_noisy_mean_aggregator
        >>> aggregator = clipped_noisy_mean_aggregator(1.0, 0.01, jax.random.PRNGKey(0))
        >>> updates = ([3.0, 4.0], [0.2, 0.4], [jnp.nan, 1.0], [1e30, 0.0])
        >>> clients = [("id", {"w": jnp.array(update)}, 1) for update in updates]
        >>> state, means = aggregator.init(), []
        >>> for _ in range(2):
        ...     mean, state = aggregator.apply(clients, state)
        ...     means.append(mean["w"])
        >>> [bool(jnp.allclose(mean, jnp.array([0.45, 0.3]), atol=0.02)) for mean in means]
        [True, True]
        >>> bool(jnp.any(means[0] == means[1]))
        False

    Source:
        McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Notes:
        *Privacy*: the sum's sensitivity is C, so the mean's is C / m. With `expected_clients` it is so for neighbours
        that differ in a client who comes or stays away. Without, the divisor tells how many came: that number has to
        be public, and neighbours differ in a client who sends an update or zeros. Diagnostics, such as the norms that
        `federated_averaging` gives, are not private.
        *Differentiability* and *sharding*: those of `fedfuse_jax.clipped_noisy_weighted_sum`.
        *Determinism*: the same bits for the same key and the same clients in the same order. A new number of clients
        compiles anew.
    """
    name = "clipped_noisy_mean_aggregator"
    max_norm = checks.python_number(name, "max_norm", max_norm, 0.0)
    noise_multiplier = checks.python_number(name, "noise_multiplier", noise_multiplier, 0.0)
    if not math.isfinite(max_norm * noise_multiplier):
        raise ValueError(
            f"{name}: max_norm is {max_norm} and noise_multiplier {noise_multiplier}; their product, the standard "
            "deviation of the noise, needs to be finite."
        )
    if expected_clients is not None:
        expected_clients = checks.python_number(name, "expected_clients", expected_clients, 0.0)
        if not 0 < expected_clients < math.inf:
            raise ValueError(f"{name}: expected_clients is {expected_clients}; it needs to be above 0 and finite.")
    checks.random_key(name, rng)
    rule = bound(
        _clipped_noisy_mean,
        max_norm=max_norm,
        noise_multiplier=noise_multiplier,
        expected_clients=expected_clients,
    )
    return stateful_stacking_aggregator(name, rule, (), lambda: rng)


def _clipped_noisy_mean(
    updates: Any, where: Any, rng: Any, *, max_norm: float, noise_multiplier: float, expected_clients: float | None
) -> tuple[Any, Any]:
    now, later = jax.random.split(rng)
    num_clients = jax.tree.leaves(updates)[0].shape[0]
    # Weights that divide make the sum the mean; the noise is that of the sum, divided likewise.
    weight = 1 / (num_clients if expected_clients is None else expected_clients)
    stddev = noise_multiplier * max_norm * weight
    mean = clipped_noisy_weighted_sum(now, updates, jnp.full(num_clients, weight), max_norm, stddev, where=where)
    return mean, later
