"""Other federated-learning systems' own aggregation functions, on what they take: ByzFL's on arrays, Flower's on lists.

What their rules mean, ours of `fedfuse_jax.compat` mean too, so that the results can be compared.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.machine import is_importable

# The modules without which one does not run.
SYSTEMS: Mapping[str, tuple[str, ...]] = {"byzfl": ("byzfl", "scipy"), "flower": ("flwr",)}


def installed() -> list[str]:
    """The systems that run here."""
    return [system for system, modules in SYSTEMS.items() if all(map(is_importable, modules))]


@functools.cache
def load_byzfl() -> types.SimpleNamespace:
    """ByzFL's rules alone, by name.

    Importing all of it needs torchvision, seaborn and more. On NumPy arrays its rules need PyTorch only to ask whether
    something is a tensor, so it is left out where it is not installed.
    """
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("byzfl is not installed; run: pip install --no-deps byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    replaced = {"byzfl": package}
    if not is_importable("torch"):
        torch = types.ModuleType("torch")
        torch.Tensor, torch.linalg = type("Tensor", (), {}), types.ModuleType("torch.linalg")
        replaced |= {"torch": torch, "torch.linalg": torch.linalg}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        rules: dict[str, Any] = {}
        for module in ("aggregators", "preaggregators"):
            rules |= vars(importlib.import_module(f"byzfl.aggregators.{module}"))
    finally:
        for name in [name for name in sys.modules if name.startswith("byzfl.")]:
            del sys.modules[name]
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return types.SimpleNamespace(**rules)


def byzfl_rule(name: str, options: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], Any]:
    """One of ByzFL's rules, as a function of the updates; ``options`` are its arguments, given the updates."""

    def aggregate(updates: Any) -> Any:
        return getattr(load_byzfl(), name)(**options(updates))(updates)

    return aggregate


def flower_function(name: str, *options: Callable[[Any], Any], rule: str = "", **keywords: Any) -> Callable[..., Any]:
    """One of Flower's functions, of clients with one example each.

    ``options`` are its arguments after those, given the updates; ``rule``: the function of Flower's that it takes as
    ``aggregation_rule``, and that the ``keywords`` are for.
    """

    def aggregate(updates: Any) -> np.ndarray:
        from flwr.server.strategy import aggregate as functions

        results = [([row], 1) for row in updates]
        others = keywords | ({"aggregation_rule": getattr(functions, rule)} if rule else {})
        return getattr(functions, name)(results, *(option(updates) for option in options), **others)[0]

    return aggregate
