// Sums over clients, and over the coordinates of one client or of two, of a chunk of contiguous elements. Plain
// pointers in, numbers out, on the calling thread.
//
// The accumulator type is double for float64 and float for the others. Every column is summed in the order of the
// rows, with the same operations wherever in the chunk it stands.
#ifndef FEDFUSE_CPU_KERNELS_LINEAR_H_
#define FEDFUSE_CPU_KERNELS_LINEAR_H_

#include <cstdint>

namespace fedfuse {

// Rows of either side of the pairs that are worked on at a time.
inline constexpr int kPairRows = 4;
// Partial sums of a pair, which are added up at the very end.
inline constexpr int kPairLanes = 8;

struct alignas(64) PairSums {
  double lanes[kPairRows][kPairRows][kPairLanes];
};

// Rows are aligned to their element only; weights, divisor, totals and `out` are of the accumulator type.
struct LinearKernels {
  // out[c] = sum over i of weights[i] * rows[i][c], divided by *divisor unless that is null. No rows give 0.
  void (*weighted_sum)(const void* const* rows, const void* weights, std::int64_t num_rows, std::int64_t columns,
                       const void* divisor, void* out);

  // out[c] = total[c] + *weight * update[c]; out may be total.
  void (*accumulate)(const void* total, const void* update, const void* weight, std::int64_t columns, void* out);

  // out[c] = *weight * values[c], values of the accumulator type, out of the rows' type.
  void (*scale)(const void* values, const void* weight, std::int64_t columns, void* out);

  // totals[i] = the sum of the squares of rows[i], in float64.
  void (*sums_of_squares)(const void* const* rows, std::int64_t num_rows, std::int64_t columns, double* totals);

  // The sum of the products with `others` (of the accumulator type), in float64.
  double (*dot)(const void* row, const void* others, std::int64_t columns);

  bool (*all_finite)(const void* row, std::int64_t columns);

  // out[c] = center[c] + sum over i of weights[i] * (rows[i][c] - center[c]), center of the accumulator type.
  void (*step)(const void* const* rows, const void* weights, std::int64_t num_rows, std::int64_t columns,
               const void* center, void* out);

  // The sum of the squared differences from `others` (of the accumulator type), in float64.
  double (*squared_distance)(const void* row, const void* others, std::int64_t columns);

  // Adds to the lanes of [i][j] the sum over c of (a[i][c] - b[j][c])^2 for kPairRows rows of either; or, unless
  // a_factors is null, of (a[i][c] - b[j][c]) * (a_factors[i][c] - b_factors[j][c]). A few dozen products are added in
  // the accumulator type, the rest in float64.
  void (*difference_products)(const void* const* a, const void* const* b, const void* const* a_factors,
                              const void* const* b_factors, std::int64_t columns, PairSums* sums);
};

// One set for each instruction set that the build has; only call what the processor supports.
#define FEDFUSE_DECLARE_LINEAR(isa)           \
  namespace isa {                             \
  extern const LinearKernels linear_float32;  \
  extern const LinearKernels linear_float64;  \
  extern const LinearKernels linear_bfloat16; \
  extern const LinearKernels linear_float16;  \
  }

FEDFUSE_DECLARE_LINEAR(baseline)
FEDFUSE_DECLARE_LINEAR(avx2)
FEDFUSE_DECLARE_LINEAR(avx512)

#undef FEDFUSE_DECLARE_LINEAR

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_LINEAR_H_
