// Many rows added to accumulators, several rows at a sweep over the columns.
// For files compiled once per instruction set; see simd.h.
#ifndef FEDFUSE_CPU_KERNELS_SWEEPS_H_
#define FEDFUSE_CPU_KERNELS_SWEEPS_H_

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels/simd.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

// The most rows that are added to an accumulator while it is in a register. A row is a stream from memory: with fewer,
// memory waits for the processor; with 16, as many lines of one set as a first-level cache does not hold.
constexpr int kSweepRows = 12;

template <typename Sweep, int... kBelow>
void sweep_some_rows(std::int64_t count, std::int64_t row, Sweep& sweep, std::integer_sequence<int, kBelow...>) {
  (void)((count == kBelow + 1 && (sweep(std::integral_constant<int, kBelow + 1>(), row), true)) || ...);
}

// Calls sweep(number of rows, first row), the number as an integral constant up to kMost, for all rows in order: in as
// few sweeps as can be, and as like in size.
template <int kMost, typename Sweep>
void sweep_rows(std::int64_t num_rows, Sweep sweep) {
  std::int64_t sweeps = (num_rows + kMost - 1) / kMost;
  for (std::int64_t row = 0; sweeps > 0; --sweeps) {
    const std::int64_t count = (num_rows - row + sweeps - 1) / sweeps;
    sweep_some_rows(count, row, sweep, std::make_integer_sequence<int, kMost>());
    row += count;
  }
}

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_SWEEPS_H_
