// What reductions over a client's coordinates have in common.
#ifndef FEDFUSE_CUDA_REDUCTIONS_H_
#define FEDFUSE_CUDA_REDUCTIONS_H_

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/team.h"

namespace fedfuse {
namespace cuda {

inline constexpr int kReductionThreads = 256;

// Adds what the threads have, as a fixed tree; the sum ends up in sums[0]. kThreads is a power of two.
template <int kThreads, typename Threads>
FEDFUSE_DEVICE void add_up(double (&sums)[kThreads], Threads& team) {
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    team.each([&](int thread, auto&) {
      if (thread < distance) sums[thread] += sums[thread + distance];
    });
  }
}

// A task of these kernels: a tile of one client.
struct ClientTile {
  Tile tile;
  std::int64_t client;
};

template <typename P>
FEDFUSE_DEVICE ClientTile locate_client(const P& p, std::int64_t task, std::int64_t width) {
  const std::int64_t row = task / p.tiles;  // (batch, client)
  const std::int64_t batch = row / p.clients;
  return {locate(p, batch * p.tiles + (task - row * p.tiles), width), row - batch * p.clients};
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_REDUCTIONS_H_
