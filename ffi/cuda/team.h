// The threads of a block, and how kernels are launched.
//
// A kernel is a struct, a *body*: Body::run(parameters, shared, task) does one task with a whole block. It is written
// as phases: team.each(f) calls f(thread, state) for every thread and returns when all of them are done. In CUDA a
// thread calls f once and waits for the others; a C++ compiler makes a loop of it. So the same bodies, tables and
// launches run in the host tests, on machines without a card. What threads find out together is in collectives.h.
#ifndef FEDFUSE_CUDA_TEAM_H_
#define FEDFUSE_CUDA_TEAM_H_

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FEDFUSE_DEVICE __device__ __forceinline__
#else
#define FEDFUSE_DEVICE inline
#endif

struct CUstream_st;

namespace fedfuse {
namespace cuda {

using Stream = CUstream_st*;  // cudaStream_t

struct Nothing {};

// Whether a kernel does little but read and write, and has a second table for few leaves: see kFewLeaves.
template <typename Body, typename = void>
inline constexpr bool kStreams = false;
template <typename Body>
inline constexpr bool kStreams<Body, std::void_t<decltype(Body::kStreams)>> = Body::kStreams;

#if defined(__CUDACC__)

template <int kThreads, typename State = Nothing>
class Team {
 public:
  template <typename Phase>
  FEDFUSE_DEVICE void each(Phase phase) {
    phase(static_cast<int>(threadIdx.x), state_);
    __syncthreads();
  }

 private:
  State state_;
};

// Integers only: their sums and minima do not depend on the order.
FEDFUSE_DEVICE void add_to_shared(std::uint32_t* counter, std::uint32_t count) { atomicAdd(counter, count); }
FEDFUSE_DEVICE void lower_shared(std::uint32_t* least, std::uint32_t value) { atomicMin(least, value); }

// How many blocks of a kernel should fit on a multiprocessor at once; 0 leaves it to the compiler, which then trades a
// few spilled registers for one block more where it likes to.
template <typename Body, typename = void>
inline constexpr int kBlocksWanted = 0;
template <typename Body>
inline constexpr int kBlocksWanted<Body, std::void_t<decltype(Body::kBlocks)>> = Body::kBlocks;

template <typename Body, typename P>
FEDFUSE_DEVICE void run_all(const P& p) {
  __shared__ typename Body::Shared shared;
  for (std::int64_t task = blockIdx.x; task < p.work; task += gridDim.x) Body::run(p, shared, task);
}

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, kBlocksWanted<Body>)
    run_tasks(const __grid_constant__ typename Body::Parameters p) {
  run_all<Body>(p);
}

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, kBlocksWanted<Body>)
    run_tasks_of_few(const __grid_constant__ typename Body::Parameters::FewLeaves p) {
  run_all<Body>(p);
}

template <typename Body, typename P>
std::string launch_kernel(const P& p, Stream stream) {
  const void* kernel;
  if constexpr (std::is_same_v<P, typename Body::Parameters>) {
    kernel = reinterpret_cast<const void*>(run_tasks<Body>);
  } else {
    kernel = reinterpret_cast<const void*>(run_tasks_of_few<Body>);
  }
  void* arguments[] = {const_cast<P*>(&p)};
  const dim3 blocks(static_cast<unsigned>(blocks_for(p.work)));
  const cudaError_t error = cudaLaunchKernel(kernel, blocks, dim3(Body::kThreads), arguments, 0, stream);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#else

// The order in which the host tests run the threads of a phase; the results must not depend on it.
inline bool reversed_threads = false;

template <int kThreads, typename State = Nothing>
class Team {
 public:
  template <typename Phase>
  void each(Phase phase) {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = reversed_threads ? kThreads - 1 - i : i;
      phase(thread, states_[thread]);
    }
  }

 private:
  std::vector<State> states_ = std::vector<State>(kThreads);
};

inline void add_to_shared(std::uint32_t* counter, std::uint32_t count) { *counter += count; }
inline void lower_shared(std::uint32_t* least, std::uint32_t value) { *least = value < *least ? value : *least; }

template <typename Body, typename P>
std::string launch_kernel(const P& p, Stream) {
  // What a kernel finds in shared memory is what the last one left there.
  std::vector<std::uint64_t> memory(sizeof(typename Body::Shared) / 8 + 1, 0xa5a5a5a5a5a5a5a5u);
  for (std::int64_t task = 0; task < p.work; ++task) {
    Body::run(p, *reinterpret_cast<typename Body::Shared*>(memory.data()), task);
  }
  return "";
}

#endif

template <typename Body>
std::string launch(const typename Body::Parameters& p, Stream stream) {
  static_assert(sizeof p <= kParameterBytes);
  if (p.work == 0) return "";
  if constexpr (kStreams<Body>) {
    if (p.num_leaves <= kFewLeaves) return launch_kernel<Body>(p.few_leaves(), stream);
  }
  return launch_kernel<Body>(p, stream);
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_TEAM_H_
