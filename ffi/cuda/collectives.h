// What the threads of a block find out together: CUB's collectives in CUDA, loops in the host tests.
//
// In floating point the bits of a sum hang on the order of the additions. CUB's is fixed by its algorithm, which is
// named here, and by the number of threads, so a call gives the same bits whenever it is made. The loops add in another
// order: whoever compares the two allows for rounding.
#ifndef FEDFUSE_CUDA_COLLECTIVES_H_
#define FEDFUSE_CUDA_COLLECTIVES_H_

#include <vector>

#include "cuda/team.h"

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#endif

namespace fedfuse {
namespace cuda {

inline constexpr int kWarpThreads = 32;

#if defined(__CUDACC__)

template <typename T, int kThreads>
using BlockReduce = cub::BlockReduce<T, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
template <typename T, int kThreads>
using BlockScan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// In shared memory, for the functions below; may be used again as soon as one has returned.
template <typename T, int kThreads>
struct Reduction {
  typename BlockReduce<T, kThreads>::TempStorage storage;
  T result;
};
template <typename T, int kThreads>
struct WarpReduction {
  typename cub::WarpReduce<T>::TempStorage storage[kThreads / kWarpThreads];
};
template <typename T, int kThreads>
struct Scan {
  typename BlockScan<T, kThreads>::TempStorage storage;
};

#else

template <typename T, int kThreads>
struct Reduction {};
template <typename T, int kThreads>
struct WarpReduction {};
template <typename T, int kThreads>
struct Scan {};

// What value(thread, state) gives for every thread.
template <typename T, int kThreads, typename Threads, typename Value>
std::vector<T> values_of(Threads& team, Value value) {
  std::vector<T> values(kThreads);
  team.each([&](int thread, auto& state) { values[thread] = value(thread, state); });
  return values;
}

#endif

// Combines what value(thread, state) gives for every thread, for all of them.
template <typename T, int kThreads, typename Threads, typename Value, typename Combine>
FEDFUSE_DEVICE T reduce([[maybe_unused]] Reduction<T, kThreads>& shared, Threads& team, Value value, Combine combine) {
#if defined(__CUDACC__)
  team.each([&](int thread, auto& state) {
    const T result = BlockReduce<T, kThreads>(shared.storage).Reduce(value(thread, state), combine);
    if (thread == 0) shared.result = result;
  });
  return shared.result;
#else
  const std::vector<T> values = values_of<T, kThreads>(team, value);
  T result = values[0];
  for (int thread = 1; thread < kThreads; ++thread) result = combine(result, values[thread]);
  return result;
#endif
}

template <typename T, int kThreads, typename Threads, typename Value>
FEDFUSE_DEVICE T add_up(Reduction<T, kThreads>& shared, Threads& team, Value value) {
  return reduce(shared, team, value, [](T a, T b) { return a + b; });
}

// Adds what value(thread, state) gives, warp by warp; calls use(warp, sum) once for each.
template <typename T, int kThreads, typename Threads, typename Value, typename Use>
FEDFUSE_DEVICE void add_up_warps([[maybe_unused]] WarpReduction<T, kThreads>& shared, Threads& team, Value value,
                                 Use use) {
#if defined(__CUDACC__)
  team.each([&](int thread, auto& state) {
    const int warp = thread / kWarpThreads;
    const T sum = cub::WarpReduce<T>(shared.storage[warp]).Sum(value(thread, state));
    if (thread % kWarpThreads == 0) use(warp, sum);
  });
#else
  const std::vector<T> values = values_of<T, kThreads>(team, value);
  for (int warp = 0; warp < kThreads / kWarpThreads; ++warp) {
    T sum = values[warp * kWarpThreads];
    for (int lane = 1; lane < kWarpThreads; ++lane) sum += values[warp * kWarpThreads + lane];
    use(warp, sum);
  }
#endif
}

// Calls use(thread, sum) for every thread with the sum of what value(thread, state) gives for it and those before it.
template <typename T, int kThreads, typename Threads, typename Value, typename Use>
FEDFUSE_DEVICE void scan([[maybe_unused]] Scan<T, kThreads>& shared, Threads& team, Value value, Use use) {
#if defined(__CUDACC__)
  team.each([&](int thread, auto& state) {
    T sum;
    BlockScan<T, kThreads>(shared.storage).InclusiveSum(value(thread, state), sum);
    use(thread, sum);
  });
#else
  const std::vector<T> values = values_of<T, kThreads>(team, value);
  T sum = 0;
  for (int thread = 0; thread < kThreads; ++thread) use(thread, sum += values[thread]);
#endif
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_COLLECTIVES_H_
