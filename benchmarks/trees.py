"""What a model's parameters look like: many leaves of the shapes of real networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

Shapes = tuple[tuple[int, ...], ...]

RESNET = "the 62 leaves of ResNet-18"
GPT_BLOCK = "the 12 leaves of a GPT-2 block"


def _resnet_18() -> Iterator[tuple[int, ...]]:
    """He et al. 2016, for ImageNet: convolutions, each with the scale and the shift after it, and one matrix."""

    def convolution(size: int, channels: int, filters: int) -> Iterator[tuple[int, ...]]:
        yield filters, channels, size, size
        yield from ((filters,), (filters,))

    yield from convolution(7, 3, 64)
    channels = 64
    for filters in (64, 128, 256, 512):
        yield from convolution(3, channels, filters)
        yield from convolution(3, filters, filters)
        if channels != filters:
            yield from convolution(1, channels, filters)
        yield from convolution(3, filters, filters)
        yield from convolution(3, filters, filters)
        channels = filters
    yield from ((1000, 512), (1000,))


def _gpt_2_block(width: int = 768) -> Iterator[tuple[int, ...]]:
    """Radford et al. 2019, the small model: attention and a two-layer network, each after a normalization."""
    for inner, outer in ((3 * width, width), (4 * width, 4 * width)):
        yield from ((width,), (width,), (width, inner), (inner,), (outer, width), (width,))


NETWORKS: Mapping[str, Shapes] = {RESNET: tuple(_resnet_18()), GPT_BLOCK: tuple(_gpt_2_block())}


def shapes(tree: str, parameters: int) -> Shapes:
    """The leaves of a network that is named here, or of a tree like ``"100 leaves"`` with so many parameters."""
    if tree in NETWORKS:
        return NETWORKS[tree]
    return tuple((size,) for size in leaf_sizes(parameters, int(tree.split()[0])))


def num_parameters(tree: str) -> int:
    """How many a network has."""
    return sum(map(math.prod, NETWORKS[tree]))


def leaf_sizes(parameters: int, leaves: int) -> list[int]:
    """Sizes as in a network: every second leaf a large matrix, with a small vector after it; none empty."""
    shares = np.where(np.arange(leaves) % 2, 1, 16 + np.arange(leaves))
    ends = np.round(np.cumsum(shares) / shares.sum() * (parameters - leaves)).astype(int) + np.arange(1, leaves + 1)
    return [int(size) for size in np.diff(ends, prepend=0)]
