"""What FedJAX hands to an aggregator."""

from collections.abc import Iterable, Iterator
from typing import Any

import fedjax
import jax
import numpy as np

ClientUpdate = tuple[fedjax.ClientId, fedjax.Params, Any]


def no_state() -> tuple[()]:
    return ()


def participants(operation: str, clients: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
    """Yields the clients' triples; says clearly what is wrong when there are none."""
    nobody = True
    for client in clients:
        try:
            client_id, params, weight = client
        except (TypeError, ValueError):
            raise ValueError(
                f"{operation}: clients_params_and_weights holds a {type(client).__name__}; it "
                "needs triples (client_id, params, weight)"
            ) from None
        nobody = False
        yield client_id, params, weight
    if nobody:
        raise ValueError(
            f"{operation}: clients_params_and_weights is empty; it needs at least one (client_id, "
            "params, weight): without a client there is no tree whose average could be NaN"
        )


def scalar_weight(operation: str, client_id: Any, weight: Any) -> Any:
    """Gives a weight that never makes the jitted step compile for a new Python type."""
    if np.shape(weight) != ():
        raise ValueError(f"{operation}: weight of client {client_id!r} has shape {np.shape(weight)}; it needs a scalar")
    if isinstance(weight, jax.Array):  # may still be in flight on a device, or traced: no waiting
        return weight
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise TypeError(
            f"{operation}: weight of client {client_id!r} is a {type(weight).__name__}; it needs a real number"
        ) from None
