// Norms that no square can overflow, and what a client's weight becomes when it is clipped.
#ifndef FEDFUSE_MATH_CLIPPING_H_
#define FEDFUSE_MATH_CLIPPING_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/platform.h"

namespace fedfuse {

// A sum of squares: sum * 4^exponent. The exponent is 0 but for float64 numbers whose squares would leave the range.
struct ScaledSum {
  double sum;
  double exponent;
};

// Where a plain sum of float64 squares has lost nothing to overflow or underflow.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE bool is_safe_sum_of_squares(double sum) { return sum > 1e-270 && sum < 1e300; }

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ScaledSum add(ScaledSum a, ScaledSum b) {
  if (a.sum == 0) return b;
  if (b.sum == 0) return a;
  const double exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
  return {ldexp(a.sum, 2 * static_cast<int>(a.exponent - exponent)) +
              ldexp(b.sum, 2 * static_cast<int>(b.exponent - exponent)),
          exponent};
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE double norm_of(ScaledSum squares) {
  return ldexp(sqrt(squares.sum), static_cast<int>(squares.exponent));
}

// min(1, bound / norm), and whether the client counts at all: not if its norm is not finite.
struct ClipFactor {
  double factor;
  double kept;
};

// The norm is root * 2^exponent. A bound that is negative or NaN gives NaN.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ClipFactor clip_factor(double root, double exponent, double bound) {
  if (!(root - root == 0)) return {0, 0};
  if (!(bound >= 0)) return {static_cast<double>(NAN), 1};
  const int shift = static_cast<int>(exponent);
  if (ldexp(root, shift) <= bound) return {1, 1};
  return {ldexp(bound, -shift) / root, 1};
}

// What a clipped client's rows are multiplied by, in the accumulator's type. Of a huge client the weight would be too
// small a number: then it is `shrink` times too large, and the row has to be divided by that first.
template <typename Accumulator>
struct ClippedWeight {
  Accumulator weight;
  bool shrink;

  static constexpr bool kWide = sizeof(Accumulator) == 8;
  static constexpr double kTooSmall = kWide ? 0x1p-900 : 0x1p-100;
  static constexpr double kShrink = kWide ? 0x1p512 : 0x1p64;
};

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE double toward_zero(double value, double) { return value; }

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float toward_zero(double value, float) {
  float nearest = static_cast<float>(value);
  const double back = nearest;
  if ((back < 0 ? -back : back) > (value < 0 ? -value : value)) {
    std::uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    --bits;
    memcpy(&nearest, &bits, sizeof bits);
  }
  return nearest;
}

// Rounded towards zero, so that a clipped client is not longer than it may be.
template <typename Accumulator>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ClippedWeight<Accumulator> clipped_weight(double weight, double factor) {
  using Result = ClippedWeight<Accumulator>;
  if (factor == 1) return {static_cast<Accumulator>(weight), false};
  const double product = weight * factor;
  const double magnitude = product < 0 ? -product : product;
  const bool shrink = magnitude < Result::kTooSmall;
  return {toward_zero(shrink ? product * Result::kShrink : product, Accumulator()), shrink};
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_CLIPPING_H_
