// One coordinate's step of a server optimizer: Reddi et al. 2021 (https://arxiv.org/abs/2003.00295), and Hsu et al.
// 2019 (https://arxiv.org/abs/1909.06335) for momentum.
#ifndef FEDFUSE_MATH_SERVER_RULES_H_
#define FEDFUSE_MATH_SERVER_RULES_H_

#include <cmath>
#include <cstdint>

#include "math/platform.h"

namespace fedfuse {

// In the order of fedfuse_jax.reference.SERVER_RULES.
enum class ServerRule { kAvgM, kAdagrad, kAdam, kYogi };
inline constexpr int kNumServerRules = 4;

template <typename Real>
struct Rates {
  Real learning_rate, b1, b2, tau;
};

template <typename Real>
struct ServerCoordinate {
  Real param, first, second;
};

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

template <ServerRule kRule, typename Real>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE ServerCoordinate<Real> server_step(const Rates<Real>& rates,
                                                                      ServerCoordinate<Real> old, Real delta) {
  if constexpr (kRule == ServerRule::kAvgM) {
    const Real first = rates.b1 * old.first + delta;
    return {old.param + rates.learning_rate * first, first, old.second};
  } else {
    const Real square = delta * delta;
    const Real first = rates.b1 * old.first + (1 - rates.b1) * delta;
    Real second = old.second;
    if constexpr (kRule == ServerRule::kAdagrad) {
      second += square;
    } else if constexpr (kRule == ServerRule::kAdam) {
      second = rates.b2 * second + (1 - rates.b2) * square;
    } else {
      const Real step = (1 - rates.b2) * square;
      // NaN goes through the last of these.
      second = second > square ? second - step : second < square ? second + step : second + (second - square);
    }
    // Without anything to divide by, a coordinate stays where it is.
    const Real divisor = square_root(second) + rates.tau;
    const Real step = divisor == 0 ? 0 : rates.learning_rate * first / divisor;
    return {old.param + step, first, second};
  }
}

// Whether a round may take this step: everything is finite, the parameter also when it is rounded to its own type, in
// which magnitudes from `overflow` on are infinite.
template <typename Real>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE bool stays_finite(const ServerCoordinate<Real>& updated, Real overflow) {
  // NaN and infinities are not equal to themselves less themselves.
  const Real param = updated.param < 0 ? -updated.param : updated.param;
  return (param < overflow) & (updated.first - updated.first == 0) & (updated.second - updated.second == 0);
}

// The step after this one if the round counts; the greatest there is stays.
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::int32_t next_step(std::int32_t step, std::int32_t counts) {
  return counts != 0 && step < INT32_MAX ? step + 1 : step;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_SERVER_RULES_H_
