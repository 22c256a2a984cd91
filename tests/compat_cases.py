"""The random cases on which `fedfuse_jax.compat` is compared with the packages whose conventions it follows.

A case is a matrix of clients: plain, far from the origin, with outliers, with ties, with duplicates, with clients that
are NaN or infinite. Those packages get it in float64, ours in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Clients and parameters; n up to 64, d up to 1e4. Every shape is compiled once and drawn many times.
SHAPES = ((1, 3), (2, 9), (3, 1), (4, 17), (7, 100), (11, 10_000), (20, 333), (64, 1000))
KINDS = ("plain", "offset", "outliers", "ties", "duplicates", "nan", "some nan", "inf")
GAP = 1e-5  # relative: scores nearer than that may be told apart either way
FAR = 1e6


class Cases(NamedTuple):
    """Matrices of one shape, ``(cases, n, d)`` float32, what each is, and which clients of it are not finite."""

    matrices: np.ndarray
    kinds: list[str]
    bad: np.ndarray


def draw(n: int, d: int, f: int, seed: int, rounds: int = 3) -> Cases:
    """``rounds`` cases of every kind; at most f clients are not finite or outliers."""
    generator = np.random.default_rng([seed, n, d, f])
    matrices, kinds, masks = [], [], []
    for kind in KINDS * rounds:
        x = generator.normal(size=(n, d))
        bad = np.zeros(n, bool)
        chosen = generator.choice(n, f, replace=False)
        if kind == "offset":
            x += 100 * generator.normal(size=d)
        elif kind == "outliers":
            x[chosen] *= 10 ** generator.uniform(-2, 2, (f, 1))
        elif kind == "ties":
            x = generator.integers(-2, 3, (n, d)).astype(float)
        elif kind == "duplicates":
            x = x[generator.integers(0, max(1, n // 2), n)]
        elif kind in ("nan", "inf"):
            x[chosen] = np.nan if kind == "nan" else generator.choice([-np.inf, np.inf], (f, 1))
            bad[chosen] = True
        elif kind == "some nan":
            x[chosen, generator.integers(0, d, f)] = np.nan
            bad[chosen] = True
        matrices.append(x.astype(np.float32))
        kinds.append(kind)
        masks.append(bad)
    return Cases(np.stack(matrices), kinds, np.stack(masks))


def far_instead(x: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """The same clients, but those that are not finite are finite, and far from everyone and from each other."""
    x = x.copy()
    x[bad] = FAR * (2.0 + np.arange(bad.sum()))[:, None]
    return x


def nan_is_greatest(x: np.ndarray) -> np.ndarray:
    """The same clients, with a large number for every NaN."""
    return np.where(np.isnan(x), FAR, x)


def squared_distances(x: np.ndarray) -> np.ndarray:
    """By differences, in float64."""
    return np.stack([((x - row) ** 2).sum(axis=1) for row in x.astype(np.float64)])


def krum_scores(distances: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Sums over the nearest others; the diagonal is not among them."""
    others = np.array([np.sort(np.delete(row, index)) for index, row in enumerate(distances)])
    return others[:, :num_neighbors].sum(axis=1)


def lowest(scores: np.ndarray, count: int) -> tuple[set[int], bool]:
    """Who has the lowest scores, and whether that can be said: the gap to the next is large enough."""
    order = np.argsort(scores, kind="stable")
    return set(order[:count].tolist()), is_clear(scores[order], count)


def is_clear(ascending: np.ndarray, count: int) -> bool:
    """Whether the first ``count`` are set apart from the rest by more than rounding moves them."""
    if count == len(ascending):
        return True
    last, following = ascending[count - 1], ascending[count]
    return bool(following - last > GAP * max(abs(following), abs(last)))


def clear_coordinates(x: np.ndarray, count: int) -> np.ndarray:
    """In which coordinates the ``count`` values nearest the median can be told from the rest."""
    away = np.sort(np.abs(x - np.median(x, axis=0)), axis=0)
    if count == len(x):
        return np.ones(x.shape[1], bool)
    scale = np.maximum(np.abs(np.where(np.abs(x) < FAR, x, 0)).max(axis=0), 1e-30)
    return away[count] - away[count - 1] > GAP * scale


def assert_near(got: np.ndarray, expected: np.ndarray, x: np.ndarray, message: str = "") -> None:
    """To float32's precision, at the scale of the honest clients' values."""
    finite = np.abs(x[np.isfinite(x) & (np.abs(x) < FAR)])
    scale = finite.max(initial=1e-30)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=message)
