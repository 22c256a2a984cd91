// Gaussian noise on a chunk of contiguous sums.
#ifndef FEDFUSE_CPU_KERNELS_NOISE_H_
#define FEDFUSE_CPU_KERNELS_NOISE_H_

#include <cstdint>

namespace fedfuse {

// sums[c] += stddev * normal(key, counter + c). The same for a counter wherever in a chunk it stands.
struct NoiseKernels {
  void (*add_to_floats)(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter, float stddev,
                        std::int64_t columns, float* sums);
  void (*add_to_doubles)(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter, double stddev,
                         std::int64_t columns, double* sums);
};

// One for each instruction set that the build has; only call what the processor supports.
#define FEDFUSE_DECLARE_NOISE(isa) \
  namespace isa {                  \
  extern const NoiseKernels noise; \
  }

FEDFUSE_DECLARE_NOISE(baseline)
FEDFUSE_DECLARE_NOISE(avx2)
FEDFUSE_DECLARE_NOISE(avx512)

#undef FEDFUSE_DECLARE_NOISE

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_NOISE_H_
