"""How the rules that select clients do it here: by scores, of which the lowest win."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedfuse_jax import krum_scores, pairwise_squared_distances, weighted_mean

PyTree = Any


def num_clients(name: str, updates: PyTree) -> int:
    """The number of clients of a client-stacked tree; the operations check the rest."""
    leaves = jax.tree.leaves(updates)
    if not leaves or not leaves[0].ndim:
        raise ValueError(f"{name}: updates has no client axis; it needs arrays of shape (n_clients, ...).")
    return leaves[0].shape[0]


def neighbor_scores(updates: PyTree, num_byzantine: int, num_neighbors: int) -> Array:
    """Krum's scores; of a client alone, who has no neighbour, 0."""
    distances = pairwise_squared_distances(updates)
    if distances.shape[0] == 1:
        return jnp.zeros_like(distances[0])
    return krum_scores(distances, num_byzantine, num_neighbors=num_neighbors)


def lowest(scores: Array, count: int) -> Array:
    """Who has the `count` lowest scores, the lower index first at a tie."""
    return jnp.zeros(scores.shape, bool).at[jnp.argsort(scores)[:count]].set(True)


def mean_of_lowest(updates: PyTree, scores: Array, count: int, weights: Any = None) -> PyTree:
    """The mean over the `count` lowest scores; NaN where an infinite one is among them: too many were bad."""
    weights = jnp.ones_like(scores) if weights is None else jnp.asarray(weights)
    weights = jnp.where(jnp.isfinite(scores), weights, jnp.nan)
    return weighted_mean(updates, weights, where=lowest(scores, count))
