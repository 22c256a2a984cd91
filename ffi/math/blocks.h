// Where a coordinate of a device's block of a leaf lies in the whole leaf.
#ifndef FEDFUSE_MATH_BLOCKS_H_
#define FEDFUSE_MATH_BLOCKS_H_

#include <cstdint>

#include "math/platform.h"

namespace fedfuse {

// Of each level, from the slowest to the fastest: where the block begins, how long the leaf is, how long the block is.
struct BlockLevel {
  std::uint32_t origin;
  std::uint32_t extent;
  std::uint32_t own;
};

// The row-major index in the leaf of the block's coordinate with this row-major index in the block.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::uint64_t index_in_leaf(const BlockLevel* levels, int num_levels,
                                                               std::uint64_t index) {
  std::uint64_t result = 0, stride = 1;
  for (int level = num_levels - 1; level >= 0; --level) {
    const std::uint64_t own = levels[level].own == 0 ? 1 : levels[level].own;
    result += (levels[level].origin + index % own) * stride;
    stride *= levels[level].extent;
    index /= own;
  }
  return result;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_BLOCKS_H_
