// A matrix of 32 x 32 bits, transposed in registers: keys, a word each, become bit planes, each of which has one bit of
// all the keys.
#ifndef FEDFUSE_MATH_BIT_PLANES_H_
#define FEDFUSE_MATH_BIT_PLANES_H_

#include <cstdint>

#include "math/platform.h"

namespace fedfuse {

// Exchanges the upper half of each group of 2 * kDistance bits of a with the lower half of that of b.
template <int kDistance>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE void exchange_halves(std::uint32_t& a, std::uint32_t& b) {
  constexpr std::uint32_t kLower = 0xffffffffu / ((1u << kDistance) + 1u);
#if defined(__CUDA_ARCH__)
  if constexpr (kDistance >= 8) {  // whole bytes: one instruction a word
    const std::uint32_t lower = __byte_perm(a, b, kDistance == 16 ? 0x5410 : 0x6240);
    b = __byte_perm(a, b, kDistance == 16 ? 0x7632 : 0x7351);
    a = lower;
    return;
  }
#endif
  const std::uint32_t upper = (a >> kDistance) & kLower;
  a = (a & kLower) | ((b & kLower) << kDistance);
  b = (b & ~kLower) | upper;
}

template <int kDistance>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE void exchange_all_halves(std::uint32_t* words) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if ((i & kDistance) == 0) exchange_halves<kDistance>(words[i], words[i + kDistance]);
  }
}

// Bit j of word i becomes what was bit i of word j.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE void transpose_bits(std::uint32_t* words) {
  exchange_all_halves<16>(words);
  exchange_all_halves<8>(words);
  exchange_all_halves<4>(words);
  exchange_all_halves<2>(words);
  exchange_all_halves<1>(words);
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_BIT_PLANES_H_
