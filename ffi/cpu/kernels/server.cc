// Compiled once per instruction set; see simd.h. The compiler makes vectors of the plain loops here.
#include "cpu/kernels/server.h"

#include <type_traits>

#include "cpu/kernels/simd.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

template <typename Real>
constexpr int kColumns = 256 / static_cast<int>(sizeof(Real));

template <typename Real>
struct Block {
  alignas(kCacheLineBytes) Real delta[kColumns<Real>];
  alignas(kCacheLineBytes) Real param[kColumns<Real>];
  alignas(kCacheLineBytes) Real first[kColumns<Real>];
  alignas(kCacheLineBytes) Real second[kColumns<Real>];
};

template <typename Real>
FEDFUSE_INLINE void copy(Real* to, const Real* from, std::int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(Real));
}

// Out of line, so that whole blocks and the last one run the same instructions.
template <ServerRule kRule, typename Real>
__attribute__((noinline)) void step_block(const Rates<Real>& rates, Block<Real>& block) {
  for (int i = 0; i < kColumns<Real>; ++i) {
    const ServerCoordinate<Real> old = {block.param[i], block.first[i], block.second[i]};
    const ServerCoordinate<Real> updated = server_step<kRule, Real>(rates, old, block.delta[i]);
    block.param[i] = updated.param;
    block.first[i] = updated.first;
    block.second[i] = updated.second;
  }
}

// Steps one block after the other, until `use(block, column, count)` says that it has seen enough.
template <ServerRule kRule, typename Real, typename Use>
FEDFUSE_INLINE bool for_each_block(const ServerChunk<Real>& chunk, const Use& use) {
  Block<Real> block = {};
  for (std::int64_t column = 0; column < chunk.columns; column += kColumns<Real>) {
    const std::int64_t rest = chunk.columns - column;
    const std::int64_t count = rest < kColumns<Real> ? rest : kColumns<Real>;
    copy(block.delta, chunk.delta + column, count);
    copy(block.param, chunk.param + column, count);
    copy(block.first, chunk.first + column, count);
    copy(block.second, chunk.second + column, count);
    step_block<kRule, Real>(chunk.rates, block);
    if (!use(block, column, count)) return false;
  }
  return true;
}

template <ServerRule kRule, typename Real>
void step(const ServerChunk<Real>& chunk) {
  for_each_block<kRule, Real>(chunk, [&](const Block<Real>& block, std::int64_t column, std::int64_t count) {
    copy(chunk.new_param + column, block.param, count);
    copy(chunk.new_first + column, block.first, count);
    copy(chunk.new_second + column, block.second, count);
    return true;
  });
}

template <ServerRule kRule, typename Real>
bool judge(const ServerChunk<Real>& chunk) {
  // As wide as a number, so that it is a vector too.
  using Mask = std::conditional_t<sizeof(Real) == sizeof(float), std::int32_t, std::int64_t>;
  return for_each_block<kRule, Real>(chunk, [&](const Block<Real>& block, std::int64_t, std::int64_t count) {
    Mask fine = -1;
    for (std::int64_t i = 0; i < count; ++i) {
      fine &= stays_finite<Real>({block.param[i], block.first[i], block.second[i]}, chunk.overflow) ? -1 : 0;
    }
    return fine != 0;
  });
}

}  // namespace

extern const ServerKernels server_rules = {
    {step<ServerRule::kAvgM, float>, step<ServerRule::kAdagrad, float>, step<ServerRule::kAdam, float>,
     step<ServerRule::kYogi, float>},
    {step<ServerRule::kAvgM, double>, step<ServerRule::kAdagrad, double>, step<ServerRule::kAdam, double>,
     step<ServerRule::kYogi, double>},
    {judge<ServerRule::kAvgM, float>, judge<ServerRule::kAdagrad, float>, judge<ServerRule::kAdam, float>,
     judge<ServerRule::kYogi, float>},
    {judge<ServerRule::kAvgM, double>, judge<ServerRule::kAdagrad, double>, judge<ServerRule::kAdam, double>,
     judge<ServerRule::kYogi, double>},
};

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
