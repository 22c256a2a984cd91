"""The strategies that only aggregate: `rule(updates, num_examples)`."""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _checks as checks
from fedfuse_jax import bulyan, coordinate_median, mean_around_median, stack_clients, trimmed_mean, weighted_mean
from fedfuse_jax.compat._host import as_floats, as_numbers, precision_of
from fedfuse_jax.compat._selection import lowest, mean_of_lowest, neighbor_scores, num_clients
from fedfuse_jax.compat.flower._forms import are_lists_of_arrays, as_list_of_arrays, floats_of_clients

PyTree = Any


@dataclass(frozen=True)
class _Strategy:
    """What all have in common: the two forms of updates, and arrays that keep their dtypes."""

    def __call__(self, updates: PyTree, num_examples: Any = None) -> PyTree:
        num_examples = as_numbers(num_examples)
        if are_lists_of_arrays(updates):
            clients = floats_of_clients(updates)
            if not any(clients):
                return self._of_no_arrays()
            with precision_of(itertools.chain(*clients)):
                return as_list_of_arrays(_compiled(self, stack_clients(clients), num_examples), clients[0])
        updates = jax.tree.map(as_floats, updates)
        aggregated = _compiled(self, updates, num_examples)
        return jax.tree.map(lambda leaf, like: leaf.astype(jnp.result_type(like)), aggregated, updates)

    def _of_no_arrays(self) -> list[np.ndarray]:
        """What becomes of models without any array, which Flower knows too."""
        return []

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        raise NotImplementedError


@dataclass(frozen=True)
class _SelectingStrategy(_Strategy):
    """What those have in common that select clients by their distances."""

    def selected(self, updates: PyTree) -> Any:
        """Who is selected, `(n_clients,)` bool: Flower averages the clients' metrics over them alone.

        NumPy's for lists of arrays. Where the aggregate is NaN, since more clients are bad than the rule can bear, bad
        ones are among them.
        """
        if are_lists_of_arrays(updates):
            clients = floats_of_clients(updates)
            if not any(clients):
                self._of_no_arrays()
            with precision_of(itertools.chain(*clients)):
                return np.asarray(_compiled_selection(self, stack_clients(clients)))
        return _compiled_selection(self, jax.tree.map(as_floats, updates))

    def _of_no_arrays(self) -> list[np.ndarray]:
        raise ValueError(f"{type(self).__name__}: updates has no arrays; it needs one at least, to compare clients by.")

    def _scores_and_count(self, updates: PyTree) -> tuple[Array, int]:
        raise NotImplementedError


@partial(jax.jit, static_argnums=0)
def _compiled(strategy: _Strategy, updates: PyTree, num_examples: Any) -> PyTree:
    """Equal strategies are equal, so that each compiles once for updates of one shape."""
    return strategy._aggregate(updates, num_examples)


@partial(jax.jit, static_argnums=0)
def _compiled_selection(strategy: _SelectingStrategy, updates: PyTree) -> Array:
    return lowest(*strategy._scores_and_count(updates))


@dataclass(frozen=True)
class FedAvg(_Strategy):
    r"""The weighted mean.

    .. math:: y = \sum_i w_i x_i \Big/ \sum_i w_i

    Here w are the numbers of examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.FedAvg()({"w": jnp.array([1.0, 2.0, 6.0])}, [20, 20, 10])["w"])
        2.4

    Source:
        McMahan et al. 2017, https://arxiv.org/abs/1602.05629; `flwr.serverapp.strategy.FedAvg`.

    Notes:
        *As in Flower*: it bears no bad client; one NaN is in the mean.
        *Unlike Flower*: low precision is summed in float32; numbers of examples that sum to 0 give NaN, not a
        `ZeroDivisionError`.
    """

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        return weighted_mean(updates, num_examples)


@dataclass(frozen=True)
class MultiKrum(_SelectingStrategy):
    r"""Multi-Krum: the weighted mean of those that are nearest their neighbours.

    .. math:: y = \sum_{i \in S} w_i x_i \Big/ \sum_{i \in S} w_i

    Here S are the clients with the least sums of squared distances to their max(1, n - f - 2) nearest others, and w
    their numbers of examples.

    Args:
        num_malicious_nodes: f.
        num_nodes_to_select: How many are averaged.

    Raises:
        ValueError: `num_malicious_nodes` is negative, or `num_nodes_to_select` less than 1.
        TypeError: One of them is not a Python integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> updates = {"w": jnp.array([1.0, 2.0, 3.0, jnp.nan])}
        >>> print(flower.MultiKrum(1, 2)(updates, [10, 30, 10, 1000])["w"])
        1.75

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; `flwr.serverapp.strategy.MultiKrum`.

    Notes:
        *As in Flower*: at least one neighbour, weighted by examples, which a bad client may lie about.
        *As in Flower*, too: metrics are averaged over whom `selected(updates)` gives.
        *Unlike Flower*: distances are computed from differences, not from a Gram matrix whose small differences of
        large numbers may be negative; numbers of examples that sum to 0 give NaN, not a `ZeroDivisionError`.
    """

    num_malicious_nodes: int = 0
    num_nodes_to_select: int = 1

    def __post_init__(self) -> None:
        _check_integer(self, "num_malicious_nodes", 0)
        _check_integer(self, "num_nodes_to_select", 1)

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        return mean_of_lowest(updates, *self._scores_and_count(updates), num_examples)

    def _scores_and_count(self, updates: PyTree) -> tuple[Array, int]:
        return _scores(self, updates), self.num_nodes_to_select


@dataclass(frozen=True)
class Krum(_SelectingStrategy):
    r"""Krum: the one update that is nearest its neighbours.

    .. math:: y = x_k, \quad k = \operatorname{argmin}_i \sum_{j \in N_i} \|x_i - x_j\|^2

    Here N_i are the max(1, n - f - 2) others nearest client i.

    Args:
        num_malicious_nodes: f.

    Raises:
        ValueError: `num_malicious_nodes` is negative.
        TypeError: It is not a Python integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.Krum(1)({"w": jnp.array([1.0, 1.5, 2.5, 2.0, jnp.nan])})["w"])
        1.5

    Source:
        Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; `flwr.serverapp.strategy.Krum`.

    Notes:
        *As in Flower*: at least one neighbour, where `fedfuse_jax.krum` refuses to have none. The update comes back to
        the bit; `selected(updates)` says whose it is.
        *Unlike Flower*: as `MultiKrum`; and in Flower's legacy `aggregate_krum` a client with NaN wins.
    """

    num_malicious_nodes: int = 0

    def __post_init__(self) -> None:
        _check_integer(self, "num_malicious_nodes", 0)

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        # 1, so that the update comes back to the bit; NaN for 0 examples, by which Flower cannot divide.
        weights = None if num_examples is None else num_examples / num_examples
        return mean_of_lowest(updates, *self._scores_and_count(updates), weights)

    def _scores_and_count(self, updates: PyTree) -> tuple[Array, int]:
        return _scores(self, updates), 1


@dataclass(frozen=True)
class Bulyan(_SelectingStrategy):
    r"""Bulyan as Flower has it now: one Multi-Krum selects all at once.

    .. math:: y_j = \frac{1}{n - 4f} \sum_{i \in N_j} x_{ij}

    Of the n - 2f clients with the least Krum scores, N_j are the n - 4f whose j-th coordinate is nearest their median.
    The numbers of examples are not used.

    Args:
        num_malicious_nodes: f.

    Raises:
        ValueError: `num_malicious_nodes` is negative; or, when called, n < 4f + 3.
        TypeError: It is not a Python integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.Bulyan(1)({"w": jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, jnp.nan])})["w"])
        3.0

    Source:
        El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927, who pick one after the other: that is `LegacyBulyan`
        and `fedfuse_jax.bulyan`, and most often gives another result; `flwr.serverapp.strategy.Bulyan`.

    Notes:
        *As in Flower*: one selection; metrics are averaged over whom `selected(updates)` gives.
        *Unlike Flower*: too few clients are an error; there, the round is skipped with a warning.
    """

    num_malicious_nodes: int = 0

    def __post_init__(self) -> None:
        _check_integer(self, "num_malicious_nodes", 0)

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        where = lowest(*self._scores_and_count(updates))
        return mean_around_median(updates, 2 * self.num_malicious_nodes, where=where)

    def _scores_and_count(self, updates: PyTree) -> tuple[Array, int]:
        f, n = self.num_malicious_nodes, num_clients("Bulyan", updates)
        if n < 4 * f + 3:
            raise ValueError(
                f"Bulyan: num_malicious_nodes is {f}, and there are {n} clients; it needs 4 * num_malicious_nodes + 3 "
                f"at least, {4 * f + 3}"
            )
        return _scores(self, updates), n - 2 * f


@dataclass(frozen=True)
class LegacyBulyan(_Strategy):
    r"""Bulyan as Flower's `flwr.server.strategy` has it: Krum picks one client after the other.

    .. math:: y_j = \frac{1}{n - 4f} \sum_{i \in N_j} x_{ij}

    Krum picks n - 2f clients, each out of those that remain; N_j are those n - 4f of them whose j-th coordinate is
    nearest their median. The numbers of examples are not used.

    Args:
        num_malicious_clients: f.

    Raises:
        ValueError: `num_malicious_clients` is negative; or, when called, n < 4f + 3.
        TypeError: It is not a Python integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.LegacyBulyan(1)({"w": jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, jnp.nan])})["w"])
        3.0

    Source:
        El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927; `flwr.server.strategy.aggregate.aggregate_bulyan`.

    Notes:
        *As in Flower*: this is `fedfuse_jax.bulyan`.
        *Unlike Flower*: there, a client with NaN is picked first.
    """

    num_malicious_clients: int = 0

    _of_no_arrays = _SelectingStrategy._of_no_arrays

    def __post_init__(self) -> None:
        _check_integer(self, "num_malicious_clients", 0)

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        return bulyan(updates, self.num_malicious_clients)


@dataclass(frozen=True)
class FedMedian(_Strategy):
    r"""The coordinate-wise median.

    .. math:: y_j = \operatorname{median}_i x_{ij}

    The numbers of examples are not used.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.FedMedian()({"w": jnp.array([1.0, 2.0, 3.0, jnp.nan])})["w"])
        2.5

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498; `flwr.serverapp.strategy.FedMedian`.

    Notes:
        *As in Flower*: for an even number of clients, the mean of the two middle values.
        *Unlike Flower*: there, one client's NaN makes the coordinate NaN.
    """

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        return coordinate_median(updates)


@dataclass(frozen=True)
class FedTrimmedAvg(_Strategy):
    r"""The coordinate-wise mean without a share of the smallest and as many of the greatest values.

    .. math:: y_j = \frac{1}{n - 2k} \sum_{r=k+1}^{n-k} x_{(r)j}, \quad k = \lfloor \beta n \rfloor

    The numbers of examples are not used.

    Args:
        beta: The share dropped at each end, in [0, 0.5).

    Raises:
        ValueError: `beta` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedfuse_jax.compat import flower
        >>> print(flower.FedTrimmedAvg(0.25)({"w": jnp.array([1.0, 2.0, 3.0, jnp.nan])})["w"])
        2.5

    Source:
        Yin et al. 2018, https://arxiv.org/abs/1803.01498; `flwr.serverapp.strategy.FedTrimmedAvg`.

    Notes:
        *As in Flower*: k is the whole part of the floating-point product; NaN sorts last, so k clients may send it.
    """

    beta: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 0.5:
            raise ValueError(f"FedTrimmedAvg: `beta` must be in the range [0, 0.5), got {self.beta!r}")

    def _aggregate(self, updates: PyTree, num_examples: Any) -> PyTree:
        return trimmed_mean(updates, trim_fraction=self.beta)


def _scores(strategy: MultiKrum | Krum | Bulyan, updates: PyTree) -> Array:
    f = strategy.num_malicious_nodes
    n = num_clients(type(strategy).__name__, updates)
    return neighbor_scores(updates, f, max(1, n - f - 2))


def _check_integer(strategy: _Strategy, argument: str, least: int) -> None:
    checks.python_int(type(strategy).__name__, argument, getattr(strategy, argument), least)
