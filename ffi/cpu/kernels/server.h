// Steps of server optimizers over a chunk of contiguous coordinates.
#ifndef FEDFUSE_CPU_KERNELS_SERVER_H_
#define FEDFUSE_CPU_KERNELS_SERVER_H_

#include <cstdint>
#include <limits>

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
  // The least magnitude that is infinite in the parameters' own type.
  Real overflow = std::numeric_limits<Real>::infinity();
};

// By ServerRule. Each coordinate is computed alike wherever in a chunk it stands.
struct ServerKernels {
  void (*step_floats[kNumServerRules])(const ServerChunk<float>& chunk);
  void (*step_doubles[kNumServerRules])(const ServerChunk<double>& chunk);
  // Whether all that a step would write is finite; it writes nothing.
  bool (*judge_floats[kNumServerRules])(const ServerChunk<float>& chunk);
  bool (*judge_doubles[kNumServerRules])(const ServerChunk<double>& chunk);
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
