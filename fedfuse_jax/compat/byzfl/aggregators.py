"""Rules that make one vector of many."""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax import (
    centered_clipping,
    coordinate_median,
    finite_clients,
    mean_around_median,
    pairwise_squared_distances,
    reference,
    trimmed_mean,
    weighted_mean,
)
from fedfuse_jax.centers import iterate as _iterate
from fedfuse_jax.centers import weiszfeld_pulls as _weiszfeld_pulls
from fedfuse_jax.compat._selection import lowest, mean_of_lowest, neighbor_scores
from fedfuse_jax.compat.byzfl._rule import (
    Rule,
    as_floating,
    check_float,
    check_majority,
    check_not_traced,
    check_whole_number,
)

MOST_SUBSETS = 2**20


@dataclass(unsafe_hash=True)
class Average(Rule):
    r"""The mean.

    .. math:: y = \frac{1}{n} \sum_i x_i

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.Average()(jnp.array([[1.0, 2.0], [3.0, 6.0]])).tolist()
        [2.0, 4.0]

    Notes:
        *As in ByzFL*: NaN and infinities reach the result.
    """

    def _apply(self, vectors: Array) -> Array:
        return weighted_mean(vectors)


@dataclass(unsafe_hash=True)
class Median(Rule):
    r"""The coordinate-wise median.

    .. math:: y_j = \operatorname{median}_i x_{ij}

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.Median()(jnp.array([[1.0, 2.0], [3.0, 6.0], [2.0, jnp.nan]])).tolist()
        [2.0, 6.0]

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *As in ByzFL*: for an even number of clients, the mean of the two middle values.
        *Unlike ByzFL*: there, one client's NaN makes the coordinate NaN.
    """

    def _apply(self, vectors: Array) -> Array:
        return coordinate_median(vectors)


@dataclass(unsafe_hash=True)
class TrMean(Rule):
    r"""The coordinate-wise mean without the f smallest and the f greatest values.

    .. math:: y_j = \frac{1}{n - 2f} \sum_{r=f+1}^{n-f} x_{(r)j}

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, 2f ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.TrMean(1)(jnp.array([[1.0, 2.0], [3.0, 6.0], [2.0, jnp.nan]])).tolist()
        [2.0, 6.0]

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Notes:
        *As in ByzFL*: NaN sorts last, so that f clients may send it.
    """

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def _apply(self, vectors: Array) -> Array:
        check_majority(self, self.f, len(vectors))
        return trimmed_mean(vectors, self.f)


@dataclass(unsafe_hash=True)
class GeometricMedian(Rule):
    r"""The geometric median, by the smoothed Weiszfeld algorithm from 0.

    .. math:: z \leftarrow \sum_i b_i x_i \Big/ \sum_i b_i, \quad b_i = 1 / \max(\nu, \|x_i - z\|)

    Args:
        nu: Distances below it count as it; a float.
        T: The number of iterations.

    Raises:
        TypeError: `nu` is not a float.
        ValueError: `T` is not a non-negative integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.GeometricMedian()(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])).round(4).tolist()
        [3.787899971008301, 4.787899971008301, 5.787899971008301]

    Source:
        Pillutla et al. 2022, https://arxiv.org/abs/1912.13445.

    Notes:
        *As in ByzFL*: a client with infinities has no influence; three iterations from 0 may still be far from the
        median. `fedfuse_jax.geometric_median` begins at the coordinate-wise median and makes eight.
        *Unlike ByzFL*: a client with NaN has none either; there, the result is NaN.
    """

    nu: float = 0.1
    T: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.nu, float):
            raise TypeError(f"GeometricMedian: nu must be a float, got {self.nu!r}")
        check_whole_number(self, "T")

    def _apply(self, vectors: Array) -> Array:
        finite = finite_clients(vectors)
        dtype = reference.accumulator_dtype(vectors.dtype)
        start = jnp.zeros(vectors.shape[1:], dtype)
        numbers = {"present": finite, "weights": None, "floor": jnp.asarray(self.nu, dtype)}
        (result,) = _iterate([vectors], [start], finite, numbers, _weiszfeld_pulls, self.T, (dtype.name,), None)
        return result


@dataclass(unsafe_hash=True)
class Krum(Rule):
    r"""Krum: the vector that is nearest its n - f - 1 nearest others.

    .. math:: y = x_k, \quad k = \operatorname{argmin}_i \sum_{j \in N_i} \|x_i - x_j\|^2

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, 2f ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.Krum(1)(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])).tolist()
        [1.0, 2.0, 3.0]

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.

    Notes:
        *As in ByzFL*: n - f - 1 neighbours. The paper and `fedfuse_jax.krum` have n - f - 2.
        *Unlike ByzFL*: there, a client with NaN wins.
    """

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def __call__(self, vectors: Any) -> Any:
        """The selected vector; integers of NumPy stay what they are, as in ByzFL."""
        is_of_host = isinstance(vectors, np.ndarray | list | tuple) and len(vectors) > 0
        if is_of_host and all(isinstance(vector, np.ndarray) for vector in vectors):
            rows = np.asarray(vectors)
            if np.issubdtype(rows.dtype, np.integer):
                return rows[np.argmax(self.selected(vectors))].copy()
        return super().__call__(vectors)

    def selected(self, vectors: Any) -> Any:
        """Whose vectors are selected, `(n,)` bool, of the vectors' library.

        Where the result is NaN, since more clients are bad than the rule can bear, bad ones are among them.
        """
        return self._on_rows(vectors, partial(_compiled_selection, self))

    def _apply(self, vectors: Array) -> Array:
        return mean_of_lowest(vectors, self._scores(vectors), self._count(len(vectors)))

    def _count(self, n: int) -> int:
        return 1

    def _scores(self, vectors: Array) -> Array:
        n = len(vectors)
        check_majority(self, self.f, n)
        return neighbor_scores(vectors, self.f, n - self.f - 1)


@dataclass(unsafe_hash=True)
class MultiKrum(Krum):
    r"""Multi-Krum: the mean of the n - f vectors that are nearest their n - f - 1 nearest others.

    .. math:: y = \frac{1}{n - f} \sum_{i \in S} x_i

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, 2f ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.MultiKrum(1)(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])).tolist()
        [2.5, 3.5, 4.5]

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757.

    Notes:
        *As in ByzFL*: n - f - 1 neighbours, n - f are averaged. `fedfuse_jax.multi_krum` has n - f - 2 neighbours.
        *Unlike ByzFL*: there, who of several with the same score is taken is arbitrary; here, the lower index.
    """

    __call__ = Rule.__call__

    def _count(self, n: int) -> int:
        return n - self.f


@partial(jax.jit, static_argnums=0)
def _compiled_selection(rule: Krum, vectors: Array) -> Array:
    return lowest(rule._scores(vectors), rule._count(len(vectors)))


@dataclass
class CenteredClipping(Rule):
    r"""Centered clipping: the last result, moved by the mean of the clipped differences to it.

    .. math:: v \leftarrow v + \frac{1}{n} \sum_i \min\Bigl(1, \frac{\tau}{\|x_i - v\|}\Bigr) (x_i - v)

    Args:
        m: The first centre; `None`: zeros. The last result is `self.m` from then on.
        L: The number of steps in a call.
        tau: The radius; a float.

    Raises:
        ValueError: `L` is not a non-negative integer, or `tau` not a non-negative float.
        TypeError: When called under `jit` or `vmap`, where the result could not be remembered.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> clip = byzfl.CenteredClipping(tau=1.0)
        >>> vectors = jnp.array([[0.5], [1.5], [2.5], [-1e9]])
        >>> clip(vectors).tolist(), clip(vectors).tolist()
        ([0.375], [0.65625])

    Source:
        Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333.

    Notes:
        *As in ByzFL*: the object remembers its result. `fedfuse_jax.centered_clipping` takes the centre as an argument.
        *Unlike ByzFL*: `m` may be an array (there, any is refused by mistake), and a client with NaN or infinities has
        no influence (there, the result and all later ones are NaN).
    """

    m: Any = None
    L: int = 1
    tau: float = 100.0

    def __post_init__(self) -> None:
        check_whole_number(self, "L")
        check_float(self, "tau")

    def _call(self, vectors: Array) -> Array:
        check_not_traced(self, vectors, "the result could not be remembered", "fedfuse_jax.centered_clipping")
        center = jnp.zeros_like(vectors[0]) if self.m is None else jnp.asarray(as_floating(self.m), vectors.dtype)
        self.m = _clip_around(vectors, center, self.tau, self.L) if self.L else center
        return self.m


@partial(jax.jit, static_argnums=3)
def _clip_around(vectors: Array, center: Array, radius: float, num_iterations: int) -> Array:
    return centered_clipping(vectors, center, radius, num_iterations=num_iterations)


@dataclass(unsafe_hash=True)
class MDA(Rule):
    r"""Minimum diameter averaging: the mean of the n - f vectors with the least largest distance.

    .. math:: y = \frac{1}{n - f} \sum_{i \in S} x_i, \quad S = \operatorname{argmin}_{|S| = n - f} \max_{i, j \in S} \|x_i - x_j\|

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, 2f ≥ n, or there are more than 2^20 ways to
            leave out f of n: all of them are tried.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.MDA(1)(jnp.array([[1.0, 2.0], [5.0, 6.0], [3.0, jnp.nan]])).tolist()
        [3.0, 4.0]

    Source:
        El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927.

    Notes:
        *As in ByzFL*: of several subsets with one diameter, the first in the order of `itertools.combinations`.
    """  # noqa: E501 - a formula is one line

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def _apply(self, vectors: Array) -> Array:
        diameter, left_out = self._best_subset(vectors)
        kept = jnp.ones(len(vectors), bool).at[left_out].set(False)
        weights = jnp.where(jnp.isfinite(diameter), jnp.ones(len(vectors)), jnp.nan)
        return weighted_mean(vectors, weights, where=kept)

    def _best_subset(self, vectors: Array) -> tuple[Array, Array]:
        """The least squared diameter, and the f clients left out for it."""
        n, f = len(vectors), self.f
        check_majority(self, f, n)
        num_subsets = math.comb(n, f)
        if num_subsets > MOST_SUBSETS:
            raise ValueError(f"MDA: f={f} of n={n} leaves {num_subsets} subsets; it needs at most {MOST_SUBSETS}")
        distances = pairwise_squared_distances(vectors)
        # The subsets in the order of combinations are their complements in the reverse one.
        subsets = np.array(list(itertools.combinations(range(n), f)), np.int32).reshape(num_subsets, f)[::-1]

        def squared_diameter(left_out: Array) -> Array:
            kept = jnp.ones(n, bool).at[left_out].set(False)
            return jnp.max(distances, where=kept[:, None] & kept[None], initial=0)

        diameters = lax.map(squared_diameter, jnp.asarray(subsets), batch_size=256)
        best = jnp.argmin(diameters)
        return diameters[best], jnp.asarray(subsets)[best]


@dataclass(unsafe_hash=True)
class MoNNA(Rule):
    r"""Mean of the n - f vectors nearest one of them, which is trusted.

    .. math:: y = \frac{1}{n - f} \sum_{i \in N} x_i

    Args:
        f: How many clients may be bad.
        idx: Who is trusted.

    Raises:
        ValueError: `f` or `idx` is not a non-negative integer; or, when called, 2f ≥ n or `idx` ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.MoNNA(1, idx=0)(jnp.array([[1.0, 2.0], [5.0, 6.0], [3.0, jnp.nan]])).tolist()
        [3.0, 4.0]

    Source:
        Farhadkhani et al. 2023, https://arxiv.org/abs/2302.04787.

    Notes:
        *Unlike ByzFL*: there, who of several at one distance is taken is arbitrary; here, the lower index.
    """

    f: int = 0
    idx: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")
        check_whole_number(self, "idx")

    def _apply(self, vectors: Array) -> Array:
        n = len(vectors)
        check_majority(self, self.f, n)
        if self.idx >= n:
            raise ValueError(f"MoNNA: idx must be smaller than n, but got idx={self.idx} and n={n}")
        return mean_of_lowest(vectors, pairwise_squared_distances(vectors)[self.idx], n - self.f)


@dataclass(unsafe_hash=True)
class Meamed(Rule):
    r"""The coordinate-wise mean of the n - f values nearest the median.

    .. math:: y_j = \frac{1}{n - f} \sum_{i \in N_j} x_{ij}

    Args:
        f: How many clients may be bad.

    Raises:
        ValueError: `f` is not a non-negative integer; or, when called, 2f ≥ n.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import byzfl
        >>> byzfl.Meamed(1)(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])).tolist()
        [2.5, 3.5, 4.5]

    Source:
        Xie et al. 2018, https://arxiv.org/abs/1802.10116.

    Notes:
        *Unlike ByzFL*: there, one client's NaN makes the coordinate NaN, and who of several equally near the median is
        taken is arbitrary; here, the smaller value.
    """

    f: int = 0

    def __post_init__(self) -> None:
        check_whole_number(self, "f")

    def _apply(self, vectors: Array) -> Array:
        check_majority(self, self.f, len(vectors))
        return mean_around_median(vectors, self.f)
