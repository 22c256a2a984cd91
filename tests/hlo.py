"""Reads optimized HLO text: which instructions there are, and what arrays they make."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)[^=]*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]*)\]")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Instruction(NamedTuple):
    computation: str
    name: str
    opcode: str
    sizes: tuple[int, ...]  # numbers of elements of the arrays it makes
    text: str

    @property
    def fused(self) -> bool:
        """Within a fusion nothing is stored but its result, which the fusion itself makes."""
        return self.computation.startswith(("fused_", "wrapped_")) or "fused_computation" in self.computation


def instructions(text: str) -> list[Instruction]:
    found, computation = [], ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, rest = match.groups()
        kind, after = _split_type(rest)
        sizes = tuple(math.prod(map(int, dims.split(","))) if dims else 1 for dims in _ARRAY.findall(kind))
        found.append(Instruction(computation, name, after.split("(")[0].strip(), sizes, line.strip()))
    return found


def _split_type(rest: str) -> tuple[str, str]:
    """`(f32[2], f32[3]) custom-call(...)` into its type and the rest."""
    if not rest.startswith("("):
        kind, _, after = rest.partition(" ")
        return kind, after
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[: position + 1], rest[position + 1 :]
    raise ValueError(rest)


def collectives(text: str) -> Counter[str]:
    """How many of each collective; an asynchronous pair counts once."""
    opcodes = (instruction.opcode.removesuffix("-start") for instruction in instructions(text))
    return Counter(opcode for opcode in opcodes if opcode in COLLECTIVES)


def custom_calls(text: str) -> list[str]:
    """The targets of our own custom calls."""
    targets = _TARGET.findall(text)
    return [target for target in targets if target.startswith("fedfuse.")]


# What makes no array of its own.
VIEWS = ("parameter", "bitcast", "get-tuple-element", "tuple", "custom-call", "while", "conditional", "call")


def large_arrays(text: str, least: int) -> list[str]:
    """The instructions outside our custom calls that make an array of at least `least` elements."""
    return [
        instruction.text
        for instruction in instructions(text)
        if not instruction.fused and instruction.opcode not in VIEWS and max(instruction.sizes, default=0) >= least
    ]
