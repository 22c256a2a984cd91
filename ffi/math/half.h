// bfloat16 and float16, held in std::uint16_t, to and from float: branch-free, exact one way, to nearest even the
// other; NaN stays NaN. Right also where subnormal floats are flushed to zero.
#ifndef FEDFUSE_MATH_HALF_H_
#define FEDFUSE_MATH_HALF_H_

#include <cstdint>
#include <cstring>

#include "math/platform.h"

namespace fedfuse {
namespace half_internal {

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace half_internal

// The bits of a float16 as those of a float. Word and Float are a plain integer and float or vectors of them.
template <typename Word, typename Float>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Word float32_bits_from_float16(Word half) {
  const Word sign = (half & 0x8000u) << 16;
  const Word magnitude = (half & 0x7fffu) << 13;  // exponent and fraction where float has them
  const Word normal = magnitude + ((127u - 15u) << 23);
  const Word infinity = magnitude | 0x7f800000u;
  const Word quiet_nan = infinity | 0x00400000u;  // as processors make them
  const Word special = magnitude > (31u << 23) ? quiet_nan : infinity;
  // A subnormal is fraction * 2^-24: what stands behind the point of 2^-14, once 2^-14 is taken away.
  const Word smallest_normal = (magnitude & 0u) + (113u << 23);
  const Word shifted = magnitude | smallest_normal;
  Float minuend, subtrahend;
  std::memcpy(&minuend, &shifted, sizeof minuend);
  std::memcpy(&subtrahend, &smallest_normal, sizeof subtrahend);
  const Float difference = minuend - subtrahend;
  Word subnormal;
  std::memcpy(&subnormal, &difference, sizeof subnormal);
  const Word finite = magnitude < (1u << 23) ? subnormal : normal;
  return sign | (magnitude >= (31u << 23) ? special : finite);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float bfloat16_to_float(std::uint16_t half) {
  return half_internal::float_from_bits(static_cast<std::uint32_t>(half) << 16);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = half_internal::bits_from_float(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float float16_to_float(std::uint16_t half) {
  return half_internal::float_from_bits(float32_bits_from_float16<std::uint32_t, float>(half));
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::uint16_t float_to_float16(float value) {
  const std::uint32_t bits = half_internal::bits_from_float(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  constexpr std::uint32_t kRebias = (127u - 15u) << 23;
  // A carry out of the fraction goes into the exponent, and out of the greatest exponent makes infinity: as it should.
  const std::uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2, whose last bit is worth 2^-24, rounds to a multiple of 2^-24.
  const std::uint32_t subnormal =
      half_internal::bits_from_float(half_internal::float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // 65520 is half way between the greatest float16 and the next power of two.
  return static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_HALF_H_
