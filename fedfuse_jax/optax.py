"""The server optimizers as optax transformations, and the aggregation rules as optax aggregators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedfuse_jax import reference
from fedfuse_jax.server import ServerState, init_server_state

PyTree = Any

__all__ = ["aggregator", "fedadagrad", "fedadam", "fedavgm", "fedyogi"]


def fedavgm(learning_rate: Any, momentum: Any = 0.9) -> optax.GradientTransformationExtraArgs:
    """Makes FedAvgM an optax transformation.

    .. math:: m \\leftarrow \\beta m - g, \\qquad u = \\eta m

    Args:
      learning_rate: η, a real scalar, or a schedule: a function of the number of steps taken.
      momentum: β, a real scalar.

    Returns:
      A transformation of gradients g, optax's sign: the negated mean of updates that are client − server. Its
      state is a ``ServerState``. If anything new would not be finite, nothing moves.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax.optax as ffx
      >>> server = ffx.fedavgm(learning_rate=1.0, momentum=0.5)
      >>> state = server.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     moves, state = server.update(jnp.array([-1.0, 2.0]), state)
      >>> moves.tolist()
      [1.5, -3.0]

    Source:
      Hsu et al. 2019, https://arxiv.org/abs/1909.06335.

    Notes:
      *Determinism*: XLA's own.
    """
    return _transformation("avgm", learning_rate, momentum, 0.0, 0.0)


def fedadagrad(learning_rate: Any, b1: Any = 0.0, tau: Any = 1e-3) -> optax.GradientTransformationExtraArgs:
    """Makes FedAdagrad an optax transformation.

    .. math:: m \\leftarrow \\beta_1 m + (1 - \\beta_1) g, \\qquad v \\leftarrow v + g^2, \\qquad
        u = -\\eta \\frac{m}{\\sqrt v + \\tau}

    Args:
      learning_rate: η, a real scalar, or a schedule: a function of the number of steps taken.
      b1: β₁, a real scalar; 0, as usual, keeps no momentum.
      tau: τ, a real scalar.

    Returns:
      A transformation of gradients g, optax's sign: the negated mean of updates that are client − server. Its
      state is a ``ServerState``, with v from τ². If anything new would not be finite, nothing moves.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax.optax as ffx
      >>> server = ffx.fedadagrad(learning_rate=0.5, tau=0.0)
      >>> moves, state = server.update(jnp.array([-3.0, 4.0]), server.init(jnp.zeros(2)))
      >>> moves.tolist(), state.second_moment.tolist()
      ([0.5, -0.5], [9.0, 16.0])

    Source:
      Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not ``optax.adagrad``.

    Notes:
      *Determinism*: XLA's own.
    """
    return _transformation("adagrad", learning_rate, b1, 0.0, tau)


def fedadam(
    learning_rate: Any, b1: Any = 0.9, b2: Any = 0.99, tau: Any = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Makes FedAdam an optax transformation.

    .. math:: m \\leftarrow \\beta_1 m - (1 - \\beta_1) g, \\qquad v \\leftarrow \\beta_2 v + (1 - \\beta_2) g^2,
        \\qquad u = \\eta \\frac{m}{\\sqrt v + \\tau}

    Args:
      learning_rate: η, a real scalar, or a schedule: a function of the number of steps taken.
      b1: β₁, a real scalar.
      b2: β₂, a real scalar.
      tau: τ, a real scalar.

    Returns:
      A transformation of gradients g, optax's sign: the negated mean of updates that are client − server. Its
      state is a ``ServerState``, with v from τ². If anything new would not be finite, nothing moves.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax.optax as ffx
      >>> server = ffx.fedadam(learning_rate=0.1)
      >>> moves, state = server.update(jnp.array([-0.5, 0.1]), server.init(jnp.zeros(2)))
      >>> [round(x, 4) for x in moves.tolist()], int(state.step)
      ([0.098, -0.0905], 1)

    Source:
      Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not ``optax.adam``, which corrects a bias.

    Notes:
      *Determinism*: XLA's own.
    """
    return _transformation("adam", learning_rate, b1, b2, tau)


def fedyogi(
    learning_rate: Any, b1: Any = 0.9, b2: Any = 0.99, tau: Any = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Makes FedYogi an optax transformation.

    .. math:: m \\leftarrow \\beta_1 m - (1 - \\beta_1) g, \\qquad
        v \\leftarrow v - (1 - \\beta_2) g^2 \\operatorname{sign}(v - g^2), \\qquad
        u = \\eta \\frac{m}{\\sqrt v + \\tau}

    Args:
      learning_rate: η, a real scalar, or a schedule: a function of the number of steps taken.
      b1: β₁, a real scalar.
      b2: β₂, a real scalar.
      tau: τ, a real scalar.

    Returns:
      A transformation of gradients g, optax's sign: the negated mean of updates that are client − server. Its
      state is a ``ServerState``, with v from τ². If anything new would not be finite, nothing moves.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax.optax as ffx
      >>> server = ffx.fedyogi(learning_rate=1.0, b1=0.0, b2=0.75, tau=0.0)
      >>> moves, state = server.update(jnp.array([-1.0, 2.0]), server.init(jnp.zeros(2)))
      >>> moves.tolist(), state.second_moment.tolist()
      ([2.0, -2.0], [0.25, 1.0])

    Source:
      Reddi et al. 2021, https://arxiv.org/abs/2003.00295; not ``optax.yogi``, which corrects a bias.

    Notes:
      *Determinism*: XLA's own.
    """
    return _transformation("yogi", learning_rate, b1, b2, tau)


def aggregator(rule: Callable[..., PyTree], **options: Any) -> Any:
    """Makes an aggregation rule an optax aggregator.

    .. math:: u = R(g_1, \\dots, g_n)

    Args:
      rule: Any function of client-stacked updates that returns one tree, such as ``fedfuse_jax.trimmed_mean``.
      options: Passed on to it. What changes from round to round (``weights``, ``where``) may instead be passed to
        the aggregator's ``update``, by name; ``process`` hands it to its other parts as well, and of optax's own
        those that take no such arguments need ``optax.with_extra_args_support``.

    Returns:
      An ``Aggregator`` for ``optax.experimental.aggregating.process``: its ``update`` takes updates with a leading
      client axis and gives aggregated ones.

    Raises:
      ImportError: The installed optax has no ``optax.experimental.aggregating``.

    Example:
      >>> import jax.numpy as jnp
      >>> import fedfuse_jax as ff
      >>> import fedfuse_jax.optax as ffx
      >>> mean = ffx.aggregator(ff.weighted_mean)
      >>> updates, state = mean.update(jnp.array([[1.0], [4.0]]), mean.init(jnp.zeros(1)), weights=jnp.array([2, 1]))
      >>> updates.tolist()
      [2.0]

    Source:
      https://optax.readthedocs.io: the aggregators of ``optax.experimental``.

    Notes:
      *Determinism*: the rule's.
    """
    try:
        from optax.experimental import aggregating
    except ImportError as error:
        raise ImportError(
            f"fedfuse_jax.optax.aggregator: optax {optax.__version__} has no optax.experimental.aggregating; it needs "
            "optax 0.2.6 or newer."
        ) from error

    def update(updates: PyTree, state: Any, params: PyTree = None, **of_this_round: Any) -> tuple[PyTree, Any]:
        del params
        return rule(updates, **(options | of_this_round)), state

    return aggregating.Aggregator(optax.init_empty_state, update)


def _transformation(rule: str, learning_rate: Any, b1: Any, b2: Any, tau: Any) -> optax.GradientTransformationExtraArgs:
    def update(
        gradients: PyTree, state: ServerState, params: PyTree = None, **of_others: Any
    ) -> tuple[PyTree, ServerState]:
        del params, of_others
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def step_leaf(gradient: Any, first: Any, second: Any) -> tuple[Any, ...]:
            scalars = [jnp.asarray(scalar, first.dtype) for scalar in (rate, b1, b2, tau)]
            delta = -gradient.astype(first.dtype)
            move, *moments = reference.server_step(rule, jnp.zeros_like(first), first, second, delta, *scalars)
            return move.astype(gradient.dtype), *moments

        leaves, structure = jax.tree.flatten(gradients)
        moments = [jax.tree.leaves(tree) for tree in (state.first_moment, state.second_moment)]
        stepped = [step_leaf(*each) for each in zip(leaves, *moments, strict=True)]
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(stepped)]
        good = functools.reduce(jnp.logical_and, finite, jnp.array(True))
        still = [(jnp.zeros_like(leaf), *old) for leaf, *old in zip(leaves, *moments, strict=True)]
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), stepped, still)
        trees = [jax.tree.unflatten(structure, [parts[i] for parts in kept]) for i in range(3)]
        return trees[0], ServerState(state.step + good.astype(np.int32), *trees[1:])

    def init(params: PyTree) -> ServerState:
        if not jax.tree.leaves(params):  # optax.masked and optax.partition may leave none
            return ServerState(jnp.zeros((), np.int32), params, params)
        return init_server_state(params, tau=tau)

    return optax.GradientTransformationExtraArgs(init, update)
