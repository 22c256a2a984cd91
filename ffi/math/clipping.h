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

// min(1, bound / norm) as factor * 2^exponent, which no quotient is too small for; and whether the client counts at
// all: not if its norm is not finite.
struct ClipFactor {
  double factor;
  std::int32_t exponent;
  std::int32_t kept;
};

// The norm is root * 2^exponent. A bound that is negative or NaN gives NaN.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ClipFactor clip_factor(double root, double exponent, double bound) {
  if (!(root - root == 0)) return {0, 0, 0};
  if (!(bound >= 0)) return {static_cast<double>(NAN), 0, 1};
  if (!(root > 0) || !(bound - bound == 0)) return {1, 0, 1};
  if (bound == 0) return {0, 0, 1};
  int root_exponent, bound_exponent;
  const double root_fraction = frexp(root, &root_exponent), bound_fraction = frexp(bound, &bound_exponent);
  const int shift = bound_exponent - root_exponent - static_cast<int>(exponent);
  if (shift > 0 || (shift == 0 && root_fraction <= bound_fraction)) return {1, 0, 1};
  return {bound_fraction / root_fraction, shift, 1};
}

// What a clipped client's rows are multiplied by, in the accumulator's type: by `scale` first, a power of two that is 1
// but where the product of weight and factor is too small a number for that type, and then by `weight`. They share the
// product's exponent, so that nothing of the client is lost to either that is not too small a number in the sum.
template <typename Accumulator>
struct ClippedWeight {
  Accumulator weight;
  Accumulator scale;

  static constexpr bool kWide = sizeof(Accumulator) == 8;
  static constexpr int kSmallExponent = kWide ? -900 : -100;
  static constexpr int kLeastScaleExponent = kWide ? -1020 : -124;
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
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ClippedWeight<Accumulator> clipped_weight(double weight, ClipFactor clip) {
  using Result = ClippedWeight<Accumulator>;
  if (clip.factor == 1 && clip.exponent == 0) return {static_cast<Accumulator>(weight), 1};
  int exponent = 0;
  const double fraction = weight - weight == 0 ? frexp(weight, &exponent) : weight;
  const double product = fraction * clip.factor;
  exponent += clip.exponent;
  if (product == 0 || !(product - product == 0)) return {static_cast<Accumulator>(product), 1};
  if (exponent >= Result::kSmallExponent) return {toward_zero(ldexp(product, exponent), Accumulator()), 1};
  int half = exponent / 2;
  if (half < Result::kLeastScaleExponent) half = Result::kLeastScaleExponent;
  return {toward_zero(ldexp(product, exponent - half), Accumulator()), static_cast<Accumulator>(ldexp(1.0, half))};
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_CLIPPING_H_
