// Coordinate-wise order statistics of a chunk of columns: the trimmed mean (the median is the one with
// trim = (num_rows - 1) / 2), the mean around the median, and their derivatives. Plain pointers in, numbers out, on the
// calling thread.
//
// The order is total: -inf < finite < +inf < NaN, all NaNs equal. Clients are ranked in it column by column, ties
// (-0 and +0 too) going to the lower index, and a client is *kept* in a column if its rank there is in
// [trim, num_rows - trim). Around the median, the kept ranks are the num_rows - trim in a row whose values are nearest
// the median, from the lowest first rank that can be (math/around_median.h). A mean is a sum in the accumulator type,
// in an order fixed by num_rows and trim alone, over the count; a single kept value comes out as it is, and no mean of
// finite values overflows. A column's result does not depend on where in a chunk it stands.
#ifndef FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_H_
#define FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_H_

#include <cstdint>

namespace fedfuse {

// What is kept of so many rows.
struct KeptRanks {
  std::int64_t trim = 0;
  bool around_median = false;

  std::int64_t count(std::int64_t num_rows) const { return num_rows - (around_median ? trim : 2 * trim); }
};

// Rows are contiguous, aligned to their element only. num_rows >= 1, columns >= 1, trim >= 0, kept.count(num_rows)
// >= 1. The accumulator type is double for float64 and float for the others.
struct OrderStatisticKernels {
  // out[c] = mean of the kept values of column c, in the accumulator type.
  void (*mean)(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks kept, void* out);

  // out[c] = mean of tangents[i][c] over the clients i kept in column c of rows, in the accumulator type; tangents are
  // of the rows' type.
  void (*selected_mean)(const void* const* rows, const void* const* tangents, std::int64_t num_rows,
                        std::int64_t columns, KeptRanks kept, void* out);

  // out[i][c] = cotangent[c] / kept.count(num_rows) if client i is kept in column c, else 0: in the rows' type, the
  // cotangent in the accumulator type.
  void (*spread)(const void* const* rows, const void* cotangent, std::int64_t num_rows, std::int64_t columns,
                 KeptRanks kept, void* const* out);
};

// One set for each instruction set that the build has; only call what the processor supports. avx512 stands for the
// features of Ice Lake and Zen 4: F, BW, DQ, VL and VPOPCNTDQ.
#define FEDFUSE_DECLARE_ORDER_STATISTICS(isa)                   \
  namespace isa {                                               \
  extern const OrderStatisticKernels order_statistics_float32;  \
  extern const OrderStatisticKernels order_statistics_float64;  \
  extern const OrderStatisticKernels order_statistics_bfloat16; \
  extern const OrderStatisticKernels order_statistics_float16;  \
  }

FEDFUSE_DECLARE_ORDER_STATISTICS(baseline)
FEDFUSE_DECLARE_ORDER_STATISTICS(avx2)
FEDFUSE_DECLARE_ORDER_STATISTICS(avx512)

#undef FEDFUSE_DECLARE_ORDER_STATISTICS

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_H_
