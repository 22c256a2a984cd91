"""What all rules have in common: vectors of any library in, the same library's out, and ByzFL's checks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import stack_clients
from fedfuse_jax.compat._host import as_floats, precision_of


@dataclass(unsafe_hash=True)
class Rule:
    """Takes vectors of any kind and gives back the same kind."""

    def __call__(self, vectors: Any) -> Any:
        return self._on_rows(vectors, self._call)

    def _on_rows(self, vectors: Any, compute: Callable[[Array], Array]) -> Any:
        given = [as_floating(vector) for vector in (vectors if isinstance(vectors, list | tuple) else [vectors])]
        with precision_of(array for array in given if not isinstance(array, jax.Array)):
            rows, as_given = stacked(self, vectors, given)
            return as_given(compute(rows))

    def _call(self, vectors: Array) -> Array:
        return _compiled(self, vectors)

    def _apply(self, vectors: Array) -> Array:
        raise NotImplementedError


@partial(jax.jit, static_argnums=0)
def _compiled(rule: Rule, vectors: Array) -> Array:
    """Equal rules are equal, so that each compiles once for vectors of one shape."""
    return rule._apply(vectors)


def stacked(rule: Rule, vectors: Any, given: list[Any]) -> tuple[Array, Callable[[Array], Any]]:
    """The vectors, which `as_floating` gave, as one JAX array, and what makes a result an array of their library."""
    name = type(rule).__name__
    as_list = isinstance(vectors, list | tuple)
    if as_list and not vectors:
        raise ValueError(f"{name}: vectors is empty; it needs an array (n, d), or a list of vectors")
    first = vectors[0] if as_list else vectors
    array = stack_clients(given) if as_list else jnp.asarray(given[0])
    if array.ndim < 2 or len(array) == 0:
        raise ValueError(
            f"{name}: vectors has shape {array.shape}; it needs (n, d), n at least 1, or a list of vectors"
        )
    if isinstance(first, jax.Array):
        return array, lambda result: result
    if _is_tensor(first):
        return array, partial(_to_tensor, first)
    return array, np.asarray


def as_floating(vector: Any) -> Any:
    """Floats of JAX or of NumPy; those of a PyTorch tensor are float32, as ByzFL has them."""
    return as_floats(vector.detach().cpu().float().numpy() if _is_tensor(vector) else vector)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _to_tensor(like: Any, result: Array) -> Any:
    return sys.modules["torch"].from_numpy(np.array(result)).to(like.device)


def check_whole_number(rule: Rule, argument: str, least: int = 0) -> None:
    value = getattr(rule, argument)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        kind = "positive" if least else "non-negative"
        raise ValueError(f"{type(rule).__name__}: {argument} must be a {kind} integer, got {value!r}")


def check_float(rule: Rule, argument: str) -> None:
    value = getattr(rule, argument)
    if not isinstance(value, float) or not value >= 0:
        raise ValueError(f"{type(rule).__name__}: {argument} must be a non-negative float, got {value!r}")


def check_majority(rule: Rule, f: int, n: int) -> None:
    if 2 * f >= n:
        raise ValueError(f"{type(rule).__name__}: Cannot tolerate 2f ≥ n. Got f={f}, n={n}")


def check_not_traced(rule: Rule, vectors: Array, why: str, instead: str) -> None:
    if isinstance(vectors, jax.core.Tracer):
        raise TypeError(
            f"{type(rule).__name__}: vectors is traced, and {why}; it needs arrays. Under jit or vmap, use {instead}"
        )
