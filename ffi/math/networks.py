"""Generates networks.h: straight-line selection networks for order statistics.

A network is a fixed list of comparators: comparator (i, j), i < j, puts the smaller of the values on wires i and j on
wire i and the larger on wire j. Everything here follows from one definition, the pairwise sorting network (Parberry
1992), by removing what the wanted outputs do not need:

* wires beyond the number of inputs are taken to hold extreme values already in place, so their comparators vanish;
* a comparator with no wanted output vanishes, with one wanted output becomes a lone minimum or maximum;
* where only the *sum* of some outputs is wanted, a comparator between two of them vanishes, since
  min(a, b) + max(a, b) = a + b.

Run at build time: python networks.py --output <build>/generated/networks.h. The tests import this module and check the
networks by the 0-1 principle.
"""

import argparse
import dataclasses
import enum
import functools
import pathlib
from collections.abc import Iterable, Sequence

# Sizes for which networks exist; n values take the smallest network with room for them, filled up with pads. Those
# beyond 128 are for CUDA threads, which have more registers than a CPU.
MEDIAN_SIZES = (*range(2, 33, 2), 36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192)
TRIMMED_MEAN_SIZES = (*range(5, 33), 36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192)
SORT_SIZES = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192)
TRIM_FRACTION = 0.2


class Want(enum.IntEnum):
    """What is wanted of the value on a wire."""

    NOTHING = 0
    SUM = 1  # only as a term of the sum of all such wires
    VALUE = 2


@dataclasses.dataclass(frozen=True)
class Operation:
    """A comparator (low, high) of which the minimum, the maximum or both are computed."""

    low: int
    high: int
    minimum: bool
    maximum: bool


@dataclasses.dataclass(frozen=True)
class Network:
    """Operations on `size` wires; afterwards wire first_rank + j holds output j, j < num_outputs."""

    size: int
    first_rank: int
    num_outputs: int
    operations: tuple[Operation, ...]

    @property
    def cost(self) -> int:
        """Number of minima and maxima."""
        return sum(operation.minimum + operation.maximum for operation in self.operations)


def producers(comparators: Sequence[tuple[int, int]]) -> tuple[list[tuple[int | None, int | None]], dict[int, int]]:
    """For each comparator those whose results it takes, and for each wire its last comparator."""
    last: dict[int, int] = {}
    sources = []
    for index, (low, high) in enumerate(comparators):
        sources.append((last.get(low), last.get(high)))
        last[low] = last[high] = index
    return sources, last


def depth_first(sources: Sequence[tuple[int | None, int | None]], roots: Iterable[int]) -> list[int]:
    """The roots in their order, each preceded by what it needs and is not there yet."""
    order: dict[int, None] = {}

    def visit(index: int) -> None:
        if index in order:
            return
        for source in sources[index]:
            if source is not None:
                visit(source)
        order[index] = None

    for root in roots:
        visit(root)
    return list(order)


def pairwise_sort(wires: list[int]) -> list[tuple[int, int]]:
    """Comparators of the pairwise sorting network on the given wires, a power of two of them.

    The last step is ordered for registers: not round by round over all wires but from the top wire down, where the
    recursion ended.
    """
    if len(wires) < 2:
        return []
    smaller, larger = wires[0::2], wires[1::2]
    pairs = list(zip(smaller, larger, strict=True))
    merge = []
    distance = len(wires) // 4
    while distance >= 1:
        merge += zip(larger, smaller[distance:], strict=False)
        distance //= 2
    sources, last = producers(merge)
    order = depth_first(sources, (last[wire] for wire in reversed(wires) if wire in last))
    return pairs + pairwise_sort(smaller) + pairwise_sort(larger) + [merge[index] for index in order]


@functools.cache
def power_of_two_comparators(power: int) -> tuple[tuple[int, int], ...]:
    """The pairwise sorting network on so many wires."""
    return tuple(pairwise_sort(list(range(power))))


def sorting_comparators(size: int, offset: int) -> list[tuple[int, int]]:
    """A sorting network for any size: `offset` wires below and the rest above hold extreme values in their places."""
    power = 1 << (size - 1).bit_length()
    inside = range(offset, offset + size)
    return [
        (low - offset, high - offset)
        for low, high in power_of_two_comparators(power)
        if low in inside and high in inside
    ]


def prune(comparators: list[tuple[int, int]], wants: list[Want]) -> list[Operation]:
    """Keeps what the wanted outputs need, walking backwards from them."""
    wants = list(wants)
    operations = []
    for low, high in reversed(comparators):
        if wants[low] == wants[high] != Want.VALUE:  # nothing wanted, or a + b
            continue
        operations.append(Operation(low, high, wants[low] != Want.NOTHING, wants[high] != Want.NOTHING))
        wants[low] = wants[high] = Want.VALUE
    return operations[::-1]


def load_late(operations: list[Operation]) -> list[Operation]:
    """Moves the operations on two inputs, the first layer, to where their results are needed."""
    sources, _ = producers([(operation.low, operation.high) for operation in operations])
    indices = range(len(operations))
    later = [index for index in indices if sources[index] != (None, None)]
    return [operations[index] for index in depth_first(sources, [*later, *indices])]


def build(size: int, first_rank: int, wants: list[Want]) -> Network:
    """The cheapest network for the wanted outputs over all placements within the power of two above."""
    power = 1 << (size - 1).bit_length()
    candidates = [prune(sorting_comparators(size, offset), wants) for offset in range(power - size + 1)]
    operations = min(candidates, key=lambda found: sum(o.minimum + o.maximum for o in found))
    num_outputs = sum(want != Want.NOTHING for want in wants)
    return Network(size, first_rank, num_outputs, tuple(load_late(operations)))


def sort_network(size: int) -> Network:
    """All ranks."""
    return build(size, 0, [Want.VALUE] * size)


def median_network(size: int) -> Network:
    """Both middle ranks of an even number of values."""
    wants = [Want.NOTHING] * size
    wants[size // 2 - 1] = wants[size // 2] = Want.VALUE
    return build(size, size // 2 - 1, wants)


def trim_count(size: int) -> int:
    """How many values the default trimmed mean drops at each end."""
    return int(TRIM_FRACTION * size)


def kept_ranks(num_values: int, trim: int, size: int) -> range:
    """Ranks that a trimmed mean keeps once num_values are padded to size."""
    low_pads = (size - num_values) // 2
    return range(low_pads + trim, low_pads + num_values - trim)


def trimmed_mean_network(size: int, smallest: int) -> Network:
    """For the default trimmed mean of smallest ... size values.

    Ranks that all of these counts keep are wanted in the sum only; ranks that some of them keep, as values.
    """
    served = [kept_ranks(n, trim_count(n), size) for n in range(smallest, size + 1)]
    first, last = min(kept[0] for kept in served), max(kept[-1] for kept in served)
    wants = [Want.NOTHING] * size
    for rank in range(first, last + 1):
        wants[rank] = Want.SUM if all(rank in kept for kept in served) else Want.VALUE
    return build(size, first, wants)


def trimmed_mean_networks() -> list[Network]:
    """One network for each bucket of counts."""
    below = (TRIMMED_MEAN_SIZES[0] - 1, *TRIMMED_MEAN_SIZES)
    return [
        trimmed_mean_network(size, smallest=previous + 1)
        for previous, size in zip(below, TRIMMED_MEAN_SIZES, strict=False)
    ]


def emit_network(family: str, network: Network) -> str:
    """One specialisation: a function that loads, compares and keeps, one statement an operation."""
    lines = [
        "template <>",
        f"struct {family}<{network.size}> {{",
        f"  static constexpr int kInputs = {network.size};",
        f"  static constexpr int kFirstRank = {network.first_rank};",
        f"  static constexpr int kOutputs = {network.num_outputs};",
        "  template <typename V, typename Load, typename Keep>",
        "  FEDFUSE_HOST_DEVICE FEDFUSE_INLINE static void run(Load load, Keep keep) {",
    ]
    names: dict[int, str] = {}
    counter = 0

    def name_of(wire: int) -> str:
        if wire not in names:
            names[wire] = f"x{wire}"
            lines.append(f"    const V x{wire} = load({wire});")
        return names[wire]

    for operation in network.operations:
        a, b = name_of(operation.low), name_of(operation.high)
        for wanted, function, wire in (
            (operation.minimum, "minimum", operation.low),
            (operation.maximum, "maximum", operation.high),
        ):
            if wanted:
                lines.append(f"    const V y{counter} = {function}({a}, {b});")
                names[wire] = f"y{counter}"
                counter += 1
    for output in range(network.num_outputs):
        lines.append(f"    keep({output}, {name_of(network.first_rank + output)});")
    return "\n".join([*lines, "  }", "};", ""])


HEADER = """\
// Selection networks. Generated by ffi/math/networks.py, which says how; do not edit.
//
// Family<N>::run<V>(load, keep) calls load(i) for its inputs i < kInputs = N and keep(j, value) for its outputs
// j < kOutputs, where output j is the value of rank kFirstRank + j. V needs minimum(a, b) and maximum(a, b), found by
// overload: a vector of keys on a CPU, one key in a CUDA thread.
//
//   SortNetwork          all ranks
//   MedianNetwork        the two middle ranks
//   TrimmedMeanNetwork   the ranks kept by the default trimmed mean. Those kept for every count in the bucket come in
//                        no particular order: only their sum means anything.
//
// n < N values take N: (N - n) / 2 pads below (the smallest key), the other pads above (the greatest), so that rank r
// of the values is rank r + (N - n) / 2 of the network; ranks kept then are outputs [trim + (N - n) / 2 - kFirstRank,
// n - trim + (N - n) / 2 - kFirstRank).
#ifndef FEDFUSE_GENERATED_NETWORKS_H_
#define FEDFUSE_GENERATED_NETWORKS_H_

#include "math/platform.h"

namespace fedfuse {

template <int... kSizes>
struct NetworkSizes {};

template <int kSize>
struct SortNetwork;
template <int kSize>
struct MedianNetwork;
template <int kSize>
struct TrimmedMeanNetwork;

// The sizes that exist, ascending.
"""


def emit_header() -> str:
    """The whole of networks.h."""
    families = {
        "SortNetwork": [sort_network(size) for size in SORT_SIZES],
        "MedianNetwork": [median_network(size) for size in MEDIAN_SIZES],
        "TrimmedMeanNetwork": trimmed_mean_networks(),
    }
    parts = [HEADER]
    for family, networks in families.items():
        sizes = ", ".join(str(network.size) for network in networks)
        parts.append(f"using {family}Sizes = NetworkSizes<{sizes}>;\n")
    parts.append(
        "\n// TrimmedMeanNetwork serves num_values >= kFewestTrimmed with trim = int(kTrimFraction * num_values).\n"
        f"inline constexpr int kFewestTrimmed = {TRIMMED_MEAN_SIZES[0]};\n"
        f"inline constexpr double kTrimFraction = {TRIM_FRACTION};\n\n"
    )
    for family, networks in families.items():
        parts += [emit_network(family, network) + "\n" for network in networks]
    parts.append("}  // namespace fedfuse\n\n#endif  // FEDFUSE_GENERATED_NETWORKS_H_\n")
    return "".join(parts)


def main() -> None:
    """Writes the header where CMake wants it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(emit_header())


if __name__ == "__main__":
    main()
