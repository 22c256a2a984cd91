"""What `--private` compares: how strong the noise is, and what an accountant says of it."""

import importlib

# Every client's update is shortened to this norm; after a few rounds, most are shorter by themselves.
MAX_NORM = 0.2
NOISE_MULTIPLIERS = (0.0, 4.0, 8.0, 16.0)
DELTA = 1e-4

# A mean over n clients has 1 / n of the noise: privacy takes a crowd.
DEFAULT_CLIENTS = 200


def scenario_name(noise_multiplier: float) -> str:
    """What a run is called."""
    return f"z = {noise_multiplier:g}" if noise_multiplier else "no noise"


def epsilons(noise_multiplier: float, rounds: int) -> list[float]:
    """The privacy spent after each round: every client takes part in all of them, and their number is public.

    So no client is hidden by sampling, and neighbouring federations differ in whether one client sends an update or
    zeros. Without noise there is no privacy.
    """
    if noise_multiplier == 0:
        return [float("inf")] * rounds
    dp_accounting = importlib.import_module("dp_accounting")
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    spent = []
    for _ in range(rounds):
        accountant.compose(dp_accounting.GaussianDpEvent(noise_multiplier))
        spent.append(float(accountant.get_epsilon(DELTA)))
    return spent
