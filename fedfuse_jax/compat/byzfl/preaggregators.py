"""Rules that make other vectors of many, before another rule."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import nearest_neighbor_mixing, squared_norms, weighted_mean, weighted_sum
from fedfuse_jax.compat.byzfl._rule import Rule, check_float, check_not_traced, check_whole_number


@dataclass(unsafe_hash=True)
class NNM(Rule):
    r"""Nearest-neighbour mixing: every vector becomes the mean of the n - f nearest it, itself included.

    .. math:: y_i = \frac{1}{n - f} \sum_{j \in N_i} x_j

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, f ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.NNM(1)(jnp.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])).tolist()
        [[2.0, 3.0], [2.0, 3.0], [6.0, 6.5]]

    Source:
        Allouah et al. 2023, https://arxiv.org/abs/2302.01772.

    Notes:
        *Unlike ByzFL*: the row of a client with NaN or infinities comes out as zeros; there, as the mean of arbitrary
        clients. Who of several at one distance is mixed in is arbitrary there; here, the lower index.
    """

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def _apply(self, vectors: Array) -> Array:
        n = len(vectors)
        if self.f >= n:
            raise ValueError(f"NNM: f must be smaller than len(vectors), but got f={self.f} and len(vectors)={n}")
        return nearest_neighbor_mixing(vectors, self.f)


@dataclass(unsafe_hash=True)
class Bucketing(Rule):
    r"""Bucketing: the means of groups of s vectors, in random order; the last group may be smaller.

    .. math:: y_b = \frac{1}{s} \sum_{i=bs}^{bs+s-1} x_{\pi(i)}

    Args:
        s: The size of a group.

    Raises:
        ValueError: `s` is not a positive integer.
        TypeError: When called under `jit` or `vmap`, where NumPy's generator would be asked once and for all.

    Example:
        >>> import numpy as np
        >>> from fedfuse_jax.compat import byzfl
        >>> np.random.seed(0)
        >>> byzfl.Bucketing(2)(np.array([[1.0], [2.0], [4.0], [8.0], [16.0]], np.float32)).tolist()
        [[2.5], [5.0], [16.0]]

    Source:
        Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365.

    Notes:
        *As in ByzFL*: on NumPy arrays, the order is `np.random`'s, so that the same `np.random.seed` gives the same
        groups. For a JAX key, take `fedfuse_jax.bucketing`. A client's NaN stays in its group.
    """

    s: int = 1

    def __post_init__(self) -> None:
        check_whole_number(self, "s", 1)

    def _call(self, vectors: Array) -> Array:
        check_not_traced(self, vectors, "NumPy's generator would be asked once and for all", "fedfuse_jax.bucketing")
        n = len(vectors)
        buckets = np.zeros((-(-n // self.s), n), bool)
        buckets[np.arange(n) // self.s, np.random.permutation(n)] = True
        return _means(vectors, buckets)


@jax.jit
def _means(vectors: Array, groups: Array) -> Array:
    return jax.vmap(lambda group: weighted_mean(vectors, where=group))(groups)


@dataclass(unsafe_hash=True)
class Clipping(Rule):
    r"""Clips every vector to a norm.

    .. math:: y_i = \min\Bigl(1, \frac{c}{\|x_i\|}\Bigr) x_i

    Args:
        c: The norm; a float.

    Raises:
        ValueError: `c` is not a non-negative float.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.Clipping(2.5)(jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [[1.5, 2.0], [0.0, 1.0]]

    Notes:
        *As in ByzFL*: a client with NaN or infinities is NaN afterwards, in some coordinates or all.
        *Unlike ByzFL*: the vectors handed in are left as they are.
    """

    c: float = 2.0

    def __post_init__(self) -> None:
        check_float(self, "c")

    def _apply(self, vectors: Array) -> Array:
        return _clip(vectors, jnp.sqrt(squared_norms(vectors)), self.c)


@dataclass(unsafe_hash=True)
class ARC(Rule):
    r"""Adaptive robust clipping: the k vectors of greatest norm are clipped to the next norm.

    .. math:: y_i = \min\Bigl(1, \frac{\|x\|_{(n-k)}}{\|x_i\|}\Bigr) x_i, \quad k = \lfloor 2 f (n - f) / n \rfloor

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, f > n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.ARC(1)(jnp.array([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])).tolist()
        [[1.2000000476837158, 1.600000023841858], [0.0, 1.0], [2.0, 0.0]]

    Source:
        Allouah et al. 2025, https://arxiv.org/abs/2405.14432.

    Notes:
        *As in ByzFL*: k is the whole part of `2 * f / n * (n - f)`, computed in this order.
        *Unlike ByzFL*: the vectors handed in are left as they are; a norm of NaN is the greatest (there, Python sorts
        with it, and whatever comes of that).
    """

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def _apply(self, vectors: Array) -> Array:
        n = len(vectors)
        if self.f > n:
            raise ValueError(f"ARC: f must be smaller than len(vectors)+1, but got f={self.f} and len(vectors)={n}")
        norms = jnp.sqrt(squared_norms(vectors))
        return _clip(vectors, norms, jnp.sort(norms)[n - int(2 * self.f / n * (n - self.f)) - 1])


def _clip(vectors: Array, norms: Array, largest: Any) -> Array:
    factors = jnp.where(norms > largest, largest / norms, 1)
    # A sum over one client is that client, times its weight; under vmap it is one call for all of them.
    return jax.vmap(lambda vector, factor: weighted_sum(vector[None], factor[None]))(vectors, factors)
