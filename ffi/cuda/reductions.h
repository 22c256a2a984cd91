// What reductions over a client's coordinates have in common.
#ifndef FEDFUSE_CUDA_REDUCTIONS_H_
#define FEDFUSE_CUDA_REDUCTIONS_H_

#include <cstdint>

#include "cuda/collectives.h"
#include "cuda/launch.h"
#include "cuda/team.h"

namespace fedfuse {
namespace cuda {

inline constexpr int kReductionThreads = 256;

// The sum of the partial sums of one client.
template <int kThreads, typename Threads>
FEDFUSE_DEVICE double add_blocks(const double* partials, std::int64_t num_blocks, Reduction<double, kThreads>& shared,
                                 Threads& team) {
  return add_up(shared, team, [&](int thread, auto&) {
    double sum = 0;
    for (std::int64_t block = thread; block < num_blocks; block += kThreads) sum += partials[block];
    return sum;
  });
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
