"""What clients send: one row of `COMPRESSIONS` per way of making it smaller, no more than that to add one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fedfuse_jax import quantize, quantized_weighted_sum, topk_sparse_weighted_sum, topk_sparsify, weighted_sum

SENT_SHARE = 0.01
BLOCK_SIZE = 256

Message = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Compression:
    """One way of sending an update.

    Attributes:
        description: What is sent.
        start: From a key and the number of parameters to what a client remembers before the first round.
        send: The client's half, from its update, float32 (parameters,), and what it remembers to the arrays that it
            sends and what it remembers next.
        merge: The server's half, from the messages of all clients, stacked, their weights and the number of
            parameters to the weighted sum.
    """

    description: str
    start: Callable[[Any, int], Any]
    send: Callable[[Any, Any], tuple[Message, Any]]
    merge: Callable[[Message, Any, int], Any]

    def num_bytes(self, num_params: int) -> int:
        """What one client sends in one round."""

        def first_message(update: Any) -> Message:
            return self.send(update, self.start(jax.random.PRNGKey(0), num_params))[0]

        message = jax.eval_shape(first_message, jax.ShapeDtypeStruct((num_params,), jnp.float32))
        return sum(array.size * array.dtype.itemsize for array in message)


def _send_topk(update: Any, residual: Any) -> tuple[Message, Any]:
    values, indices, residual = topk_sparsify(update, max(1, math.floor(SENT_SHARE * update.size)), residual)
    return (values, indices), residual


def _merge_topk(message: Message, weights: Any, num_params: int) -> Any:
    values, indices = message
    return topk_sparse_weighted_sum(values, indices, weights, num_params)


def _quantized(num_bits: int) -> Compression:
    """With keys, codes are rounded up or down at random, and the errors of many clients cancel."""

    def send(update: Any, key: Any) -> tuple[Message, Any]:
        now, later = jax.random.split(key)
        return quantize(update, num_bits=num_bits, block_size=BLOCK_SIZE, key=now), later

    def merge(message: Message, weights: Any, num_params: int) -> Any:
        options = {"num_bits": num_bits, "num_params": num_params, "block_size": BLOCK_SIZE}
        codes, scales, zero_points = message
        return quantized_weighted_sum(codes, scales, zero_points, weights, **options)

    blocks = f"a scale and a zero point for {BLOCK_SIZE}"
    return Compression(f"{num_bits} bits a number, {blocks}", lambda key, num_params: key, send, merge)


UNCOMPRESSED = Compression(
    "every number, in 32 bits",
    lambda key, num_params: (),
    lambda update, nothing: ((update,), nothing),
    lambda message, weights, num_params: weighted_sum(message[0], weights),
)
COMPRESSIONS = {
    "topk": Compression(
        f"the {SENT_SHARE:.0%} greatest numbers and where they are; what is left, later",
        lambda key, num_params: jnp.zeros(num_params),
        _send_topk,
        _merge_topk,
    ),
    "int8": _quantized(8),
    "int4": _quantized(4),
}
