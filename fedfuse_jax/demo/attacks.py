"""What the bad clients do: one row of `ATTACKS` per attack, no more than that to add one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


def _unchanged(array: Any) -> Any:
    return array


@dataclass(frozen=True)
class Attack:
    """One way of being a bad client.

    Attributes:
        description: What the bad clients do, as the end of a sentence that begins with them.
        corrupt_update: From a leaf of the honest update to the leaf that is sent.
        corrupt_labels: From the client's true labels, int (examples,), to those it trains on.
        collude: From a leaf of all honest updates, (honest clients, ...), to the leaf that every bad
            client sends; `None`: each goes by its own update alone.
    """

    description: str
    corrupt_update: Callable[[Any], Any] = _unchanged
    corrupt_labels: Callable[[Any], Any] = _unchanged
    collude: Callable[[Any], Any] | None = None


NO_ATTACK = Attack("behave")

ATTACKS = {
    "scaled": Attack("send 100 times their update", corrupt_update=lambda leaf: 100 * leaf),
    "nan": Attack("send NaN", corrupt_update=lambda leaf: jnp.full_like(leaf, jnp.nan)),
    "inf": Attack("send infinity", corrupt_update=lambda leaf: jnp.full_like(leaf, jnp.inf)),
    "sign-flip": Attack("send their update with its sign flipped", corrupt_update=jnp.negative),
    "label-flip": Attack("learn digit 9 - y for digit y", corrupt_labels=lambda y: 9 - y),
    # A little is enough: Baruch et al. 2019, https://arxiv.org/abs/1902.06156.
    "alie": Attack(
        "send the good ones' mean less 1.5 standard deviations",
        collude=lambda good: good.mean(axis=0) - 1.5 * good.std(axis=0, ddof=1),
    ),
    # Inner product manipulation: Xie et al. 2020, https://arxiv.org/abs/1903.03936.
    "ipm": Attack("send the good ones' mean times -0.5", collude=lambda good: -0.5 * good.mean(axis=0)),
    # Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365.
    "mimic": Attack("all send what the first good one sends", collude=lambda good: good[0]),
}


def default_num_bad(num_clients: int) -> int:
    """How many clients are bad if nobody says: a quarter."""
    return num_clients // 4
