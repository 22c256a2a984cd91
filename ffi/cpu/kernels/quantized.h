// Sums over clients of a chunk of quantised coordinates, and of the coordinates of one client; codes are widened in
// registers. Plain pointers in, numbers out, on the calling thread.
//
// Every column is summed in the order of the rows, with the same operations wherever in the chunk it stands.
#ifndef FEDFUSE_CPU_KERNELS_QUANTIZED_H_
#define FEDFUSE_CPU_KERNELS_QUANTIZED_H_

#include <cstdint>

#include "contract/compressed.h"

namespace fedfuse {

// A row points to a client's first byte of codes; `begin` is a coordinate, which may be in the middle of a byte. All
// other numbers are of the accumulator type, float or double.
struct QuantizedKernels {
  // out[c] = sum over i of slopes[i] * (code of rows[i] at begin + c - zeros[i]). No rows give 0.
  void (*sum)(const std::uint8_t* const* rows, const void* slopes, const void* zeros, std::int64_t num_rows,
              std::int64_t begin, std::int64_t columns, void* out);

  // The sum over c of (code at begin + c - *zero) * vector[c], in float64.
  double (*dot)(const std::uint8_t* row, const void* zero, std::int64_t begin, const void* vector,
                std::int64_t columns);
};

// By Codes. One set for each instruction set that the build has; only call what the processor supports.
#define FEDFUSE_DECLARE_QUANTIZED(isa)                        \
  namespace isa {                                             \
  extern const QuantizedKernels quantized_float32[kNumCodes]; \
  extern const QuantizedKernels quantized_float64[kNumCodes]; \
  }

FEDFUSE_DECLARE_QUANTIZED(baseline)
FEDFUSE_DECLARE_QUANTIZED(avx2)
FEDFUSE_DECLARE_QUANTIZED(avx512)

#undef FEDFUSE_DECLARE_QUANTIZED

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_QUANTIZED_H_
