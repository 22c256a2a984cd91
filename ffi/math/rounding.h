// Narrowing a double by way of a float without rounding twice.
#ifndef FEDFUSE_MATH_ROUNDING_H_
#define FEDFUSE_MATH_ROUNDING_H_

#include <cstdint>
#include <cstring>

#include "math/platform.h"

namespace fedfuse {

// `value` rounded to odd: whoever rounds the result to nearest in a type at least two bits shorter gets what rounding
// `value` itself would give (Boldo and Melquiond 2008, https://doi.org/10.1109/TC.2007.70819).
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  if (back == value || value != value) return nearest;
  std::uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  // Towards zero, then odd. One less is one step towards zero for either sign.
  const bool away = (value < 0 ? -back : back) > (value < 0 ? -value : value);
  bits = (bits - (away ? 1u : 0u)) | 1u;
  float odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return odd;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_ROUNDING_H_
