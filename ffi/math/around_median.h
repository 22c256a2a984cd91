// Which of the values in order are nearest the median, over a value type: a number, or a vector of them.
#ifndef FEDFUSE_MATH_AROUND_MEDIAN_H_
#define FEDFUSE_MATH_AROUND_MEDIAN_H_

#include "math/platform.h"

namespace fedfuse {

// Values nearest a point are neighbours in rank. Their window slides up from the lowest rank while the value it would
// gain is nearer the median than the one it would lose: median - lost > gained - median, which is lost + gained < a + b
// for the two middle values a and b. Of two as near the smaller stays.

// What rounding lost in total = a + b (Knuth, TAOCP 2, 4.2.2). Not for compilers that reorder sums.
template <typename Value>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Value lost_in_sum(Value a, Value b, Value total) {
  const Value rounded = total - a;
  return (a - (total - rounded)) + (b - rounded);
}

// Whether the window slides, exactly, as what `<` gives of two values; not if a sum is NaN. `half` is 1, or 1/2 where a
// sum of two of the four would overflow. An infinite median is at no distance from itself, and infinitely far from all
// else.
template <typename Value>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE auto window_slides(Value lost, Value gained, Value a, Value b, Value half,
                                                      Value infinity) {
  const Value scaled_lost = lost * half, scaled_gained = gained * half, scaled_a = a * half, scaled_b = b * half;
  const Value left = scaled_lost + scaled_gained, right = scaled_a + scaled_b;
  const auto less =
      (left < right) |
      ((left == right) & (lost_in_sum(scaled_lost, scaled_gained, left) < lost_in_sum(scaled_a, scaled_b, right)));
  return less | ((right == infinity) & (b == infinity) & (gained == infinity) & (lost < infinity));
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_AROUND_MEDIAN_H_
