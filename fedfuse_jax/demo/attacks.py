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
    """

    description: str
    corrupt_update: Callable[[Any], Any] = _unchanged
    corrupt_labels: Callable[[Any], Any] = _unchanged


NO_ATTACK = Attack("behave")

ATTACKS = {
    "scaled": Attack("send 100 times their update", corrupt_update=lambda leaf: 100 * leaf),
    "nan": Attack("send NaN", corrupt_update=lambda leaf: jnp.full_like(leaf, jnp.nan)),
    "sign-flip": Attack("send their update with its sign flipped", corrupt_update=jnp.negative),
    "label-flip": Attack("learn digit 9 - y for digit y", corrupt_labels=lambda y: 9 - y),
}
