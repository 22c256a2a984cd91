"""What FedJAX hands to an aggregator."""

from collections.abc import Iterable, Iterator
from typing import Any

import fedjax

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
