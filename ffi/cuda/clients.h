// Which clients take part, found by a block.
#ifndef FEDFUSE_CUDA_CLIENTS_H_
#define FEDFUSE_CUDA_CLIENTS_H_

#include <cstdint>

#include "contract/buffers.h"
#include "cuda/team.h"

namespace fedfuse {
namespace cuda {

FEDFUSE_DEVICE int count_bits(std::uint32_t word) {
#if defined(__CUDACC__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The participation of an element of the batch; null if everybody takes part. In bytes: one that is neither 0 nor 1 is
// not a bool, and whoever has such a byte takes part.
FEDFUSE_DEVICE const std::uint8_t* where_of(const View& where, const Batch& batch, std::int64_t index) {
  return where.type == Type::kBool ? reinterpret_cast<const std::uint8_t*>(where.at(batch, index)) : nullptr;
}

// In shared memory: a bit for each of kClients clients, and for what there is room beyond them.
template <int kClients>
struct PresentClients {
  static constexpr int kWords = (kClients + 31) / 32;

  std::uint8_t flags[32 * kWords];
  std::uint32_t words[kWords];

  FEDFUSE_DEVICE bool has(int client) const { return (words[client / 32] >> (client % 32) & 1u) != 0; }

  // How many of the first `clients` are present.
  FEDFUSE_DEVICE int count_before(int clients) const {
    int count = 0;
    for (int word = 0; word < clients / 32; ++word) count += count_bits(words[word]);
    if (clients % 32 != 0) count += count_bits(words[clients / 32] & ((1u << (clients % 32)) - 1));
    return count;
  }

  // Looks at the clients from `first` on.
  template <typename Threads>
  FEDFUSE_DEVICE void find(const std::uint8_t* where, std::int64_t first, std::int64_t clients, Threads& team) {
    find_if([=](std::int64_t client) { return where == nullptr || where[client] != 0; }, first, clients, team);
  }

  template <typename Predicate, int kThreads, typename State>
  FEDFUSE_DEVICE void find_if(Predicate counts, std::int64_t first, std::int64_t clients, Team<kThreads, State>& team) {
    team.each([&](int thread, auto&) {
      for (int i = thread; i < 32 * kWords; i += kThreads) flags[i] = first + i < clients && counts(first + i);
    });
    team.each([&](int thread, auto&) {
      if (thread >= kWords) return;
      std::uint32_t word = 0;
      for (int bit = 0; bit < 32; ++bit) word |= static_cast<std::uint32_t>(flags[32 * thread + bit]) << bit;
      words[thread] = word;
    });
  }
};

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_CLIENTS_H_
