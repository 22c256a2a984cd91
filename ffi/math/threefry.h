// Threefry-2x32 with 20 rounds (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), as JAX lays its counters
// out when jax_threefry_partitionable is set: the 32 bits of an element are those of its row-major index.
#ifndef FEDFUSE_MATH_THREEFRY_H_
#define FEDFUSE_MATH_THREEFRY_H_

#include <cstdint>

#include "math/platform.h"

namespace fedfuse {

struct ThreefryKey {
  std::uint32_t words[3];

  FEDFUSE_HOST_DEVICE static ThreefryKey from(std::uint32_t first, std::uint32_t second) {
    return {{first, second, first ^ second ^ 0x1bd11bdau}};
  }
};

template <int kRotation, typename Word>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE void threefry_round(Word& x0, Word& x1) {
  x0 = x0 + x1;
  x1 = (x1 << kRotation) | (x1 >> (32 - kRotation));
  x1 = x1 ^ x0;
}

template <int kFirst, int kSecond, int kThird, int kFourth, typename Word>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE void threefry_group(Word& x0, Word& x1, std::uint32_t key0, std::uint32_t key1) {
  threefry_round<kFirst>(x0, x1);
  threefry_round<kSecond>(x0, x1);
  threefry_round<kThird>(x0, x1);
  threefry_round<kFourth>(x0, x1);
  x0 = x0 + key0;
  x1 = x1 + key1;
}

// The random bits of the counter high * 2^32 + low. Word is std::uint32_t or a vector of them.
template <typename Word>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Word threefry_bits(const ThreefryKey& key, Word high, Word low) {
  const std::uint32_t* const k = key.words;
  Word x0 = high + k[0], x1 = low + k[1];
  threefry_group<13, 15, 26, 6>(x0, x1, k[1], k[2] + 1u);
  threefry_group<17, 29, 16, 24>(x0, x1, k[2], k[0] + 2u);
  threefry_group<13, 15, 26, 6>(x0, x1, k[0], k[1] + 3u);
  threefry_group<17, 29, 16, 24>(x0, x1, k[1], k[2] + 4u);
  threefry_group<13, 15, 26, 6>(x0, x1, k[2], k[0] + 5u);
  return x0 ^ x1;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_THREEFRY_H_
