// Steps of server optimizers over a chunk of contiguous coordinates.
#ifndef FEDFUSE_CPU_KERNELS_SERVER_H_
#define FEDFUSE_CPU_KERNELS_SERVER_H_

#include <cstdint>

#include "math/server_rules.h"

namespace fedfuse {

template <typename Real>
struct ServerChunk {
  Rates<Real> rates;
  const Real* delta;
  const Real* param;
  const Real* first;
  const Real* second;
  // May be the same memory as what they come from.
  Real* new_param;
  Real* new_first;
  Real* new_second;
  std::int64_t columns;
};

// By ServerRule. Each coordinate is computed alike wherever in a chunk it stands.
struct ServerKernels {
  void (*step_floats[kNumServerRules])(const ServerChunk<float>& chunk);
  void (*step_doubles[kNumServerRules])(const ServerChunk<double>& chunk);
};

// One for each instruction set that the build has; only call what the processor supports.
#define FEDFUSE_DECLARE_SERVER(isa)        \
  namespace isa {                          \
  extern const ServerKernels server_rules; \
  }

FEDFUSE_DECLARE_SERVER(baseline)
FEDFUSE_DECLARE_SERVER(avx2)
FEDFUSE_DECLARE_SERVER(avx512)

#undef FEDFUSE_DECLARE_SERVER

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_SERVER_H_
