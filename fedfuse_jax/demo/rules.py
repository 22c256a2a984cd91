"""How the server aggregates: one row of `RULES` per rule, no more than that to add one."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BUCKET_SIZE = 2
CLIPPING_RADIUS = 1.0


@dataclass(frozen=True)
class Rule:
    """One way of aggregating.

    Attributes:
        description: What the server makes of the updates.
        build: From the number of bad clients that it is to bear to a FedJAX aggregator.
        least_clients: From the number of bad clients to how many there must be in all.
    """

    description: str
    build: Callable[[int], Any]
    least_clients: Callable[[int], int]


def _make(name: str, *arguments: Any, **options: Any) -> Any:
    """Imports the adapter as late as here: the names of this table, which `--help` shows, need no FedJAX."""
    return getattr(importlib.import_module("fedfuse_jax.fedjax"), name)(*arguments, **options)


def _mixed(name: str, num_bad: int, *arguments: Any, **options: Any) -> Any:
    mixing = _make("nearest_neighbor_mixing_pre_aggregator", num_bad)
    return _make(name, *arguments, **options, pre_aggregators=[mixing])


def _bucketed(name: str) -> Any:
    jax = importlib.import_module("jax")
    buckets = _make("bucketing_pre_aggregator", BUCKET_SIZE, jax.random.PRNGKey(0))
    return _make(name, pre_aggregators=[buckets])


RULES = {
    "mean": Rule("the weighted mean", lambda f: _make("mean_aggregator"), lambda f: f + 1),
    "median": Rule("the coordinate-wise median", lambda f: _make("median_aggregator"), lambda f: 2 * f + 1),
    "trimmed mean": Rule(
        "the mean without the f least and the f greatest values of each coordinate",
        lambda f: _make("trimmed_mean_aggregator", trim_count=f),
        lambda f: 2 * f + 1,
    ),
    "mean around median": Rule(
        "the mean of the n - f values nearest the median of each coordinate",
        lambda f: _make("mean_around_median_aggregator", f),
        lambda f: 2 * f + 1,
    ),
    "geometric median": Rule(
        "the point with the least sum of distances",
        lambda f: _make("geometric_median_aggregator"),
        lambda f: 2 * f + 1,
    ),
    "centered clipping": Rule(
        f"the last round's result, moved by differences clipped to {CLIPPING_RADIUS:g}",
        lambda f: _make("centered_clipping_aggregator", CLIPPING_RADIUS),
        lambda f: 2 * f + 1,
    ),
    "krum": Rule(
        "the one update nearest its neighbours",
        lambda f: _make("krum_aggregator", f),
        lambda f: 2 * f + 3,
    ),
    "multi-krum": Rule(
        "the mean of the n - f updates nearest their neighbours",
        lambda f: _make("multi_krum_aggregator", f),
        lambda f: 2 * f + 3,
    ),
    "bulyan": Rule(
        "of n - 2f that Krum picks, the mean of the values nearest the median",
        lambda f: _make("bulyan_aggregator", f),
        lambda f: 4 * f + 3,
    ),
    "mixed trimmed mean": Rule(
        "nearest-neighbour mixing, then the trimmed mean",
        lambda f: _mixed("trimmed_mean_aggregator", f, trim_count=f),
        lambda f: 2 * f + 1,
    ),
    "mixed krum": Rule(
        "nearest-neighbour mixing, then Krum",
        lambda f: _mixed("krum_aggregator", f, f),
        lambda f: 2 * f + 3,
    ),
    "bucketed geometric median": Rule(
        f"the geometric median of means of {BUCKET_SIZE}",
        lambda f: _bucketed("geometric_median_aggregator"),
        lambda f: BUCKET_SIZE * (2 * f + 1),
    ),
}
DEFAULT_RULES = ("mean", "median", "trimmed mean")
