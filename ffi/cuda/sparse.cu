// topk_sparse_weighted_sum and its transposes.
//
// In the sum, a block owns a tile of the coordinates, in shared memory, and goes through the entries that fall into it,
// client after client, as many at a time as it has threads. Where several of those are for one coordinate, they take
// turns in their order: no floating-point atomics. Of a client with sorted indices a block finds its entries by
// bisection; of any other it looks at all.
#include <algorithm>

#include "cuda/clients.h"
#include "cuda/collectives.h"
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

struct SparseParameters {
  SparseShape shape;
  std::int64_t work;
  std::int64_t width;  // of a tile or chunk
  View values;
  View indices;
  View weights;
  View vector;
  View where;
  View result;
  std::uint8_t* sorted;
};

FEDFUSE_DEVICE const std::int32_t* indices_of(const SparseParameters& p, std::int64_t batch, std::int64_t client) {
  return reinterpret_cast<const std::int32_t*>(p.indices.at(p.shape.batch, batch)) + client * p.shape.entries;
}

// Marks a client whose indices never descend.
struct FindSorted {
  using Parameters = SparseParameters;
  static constexpr int kThreads = 256;

  using Shared = Reduction<int, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t row) {
    const std::int64_t batch = row / p.shape.clients;
    const std::int32_t* const indices = indices_of(p, batch, row - batch * p.shape.clients);
    Team<kThreads> team;
    const auto descends = [&](int thread, Nothing&) {
      int found = 0;
#pragma unroll 4
      for (std::int64_t i = thread; i + 1 < p.shape.entries; i += kThreads) found |= indices[i] > indices[i + 1];
      return found;
    };
    const int found = reduce(shared, team, descends, [](int a, int b) { return a | b; });
    team.each([&](int thread, Nothing&) {
      if (thread == 0) p.sorted[row] = found == 0;
    });
  }
};

template <Type type>
struct SparseSum {
  using Parameters = SparseParameters;
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kWidest = 16384 / static_cast<int>(sizeof(Accumulator));  // of tiles
  static constexpr std::uint32_t kNobody = ~0u;

  struct Shared {
    Accumulator sums[kWidest];
    std::uint32_t turn[kWidest];  // the first thread that waits to add to a coordinate
    // Of kThreads clients: their entries in the tile, and how many those and the clients before have.
    std::int64_t first[kThreads];
    std::int64_t end[kThreads];
    Accumulator weights[kThreads];
    Scan<std::int64_t, kThreads> scan;
    std::uint32_t waiting[2];
  };

  // A thread's entry, until it has been added.
  struct State {
    Accumulator term;
    std::int32_t column;
    bool waits;
    bool had_turn;
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const std::int64_t tiles = (p.shape.coordinates + p.width - 1) / p.width;
    const std::int64_t batch = task / tiles;
    const std::int64_t begin = (task - batch * tiles) * p.width;
    const std::int64_t rest = p.shape.coordinates - begin;
    const std::int64_t columns = rest < p.width ? rest : p.width;

    Team<kThreads, State> team;
    team.each([&](int thread, State&) {
      for (std::int64_t column = thread; column < columns; column += kThreads) {
        shared.sums[column] = 0;
        shared.turn[column] = kNobody;
      }
      if (thread < 2) shared.waiting[thread] = 0;
    });
    for (std::int64_t client = 0; client < p.shape.clients; client += kThreads) {
      const std::int64_t count = find_entries(p, shared, batch, client, begin, columns, team);
      for (std::int64_t entry = 0; entry < count; entry += kThreads) {
        team.each([&](int thread, State& state) {
          take_entry(p, shared, batch, client, begin, columns, entry + thread, count, &state);
        });
        take_turns(shared, team);
      }
    }
    Accumulator* const total = reinterpret_cast<Accumulator*>(p.result.at(p.shape.batch, batch)) + begin;
    team.each([&](int thread, State&) {
      for (std::int64_t column = thread; column < columns; column += kThreads) total[column] = shared.sums[column];
    });
  }

  // Where the entries are that clients from `client` on have in the tile; returns how many in all.
  template <typename Threads>
  static FEDFUSE_DEVICE std::int64_t find_entries(const Parameters& p, Shared& shared, std::int64_t batch,
                                                  std::int64_t client, std::int64_t begin, std::int64_t columns,
                                                  Threads& team) {
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const std::byte* const weights = p.weights.at(p.shape.batch, batch);
    const auto count_entries = [&](int thread, State&) {
      const std::int64_t own = client + thread;
      std::int64_t first = 0, last = 0;
      if (own < p.shape.clients && (where == nullptr || where[own] != 0)) {
        last = p.shape.entries;
        if (p.sorted[batch * p.shape.clients + own] != 0) {
          const std::int32_t* const indices = indices_of(p, batch, own);
          first = lower_bound(indices, 0, last, begin);
          last = lower_bound(indices, first, last, begin + columns);
        }
        shared.weights[thread] = reinterpret_cast<const Accumulator*>(weights)[own];
      }
      shared.first[thread] = first;
      return last - first;
    };
    scan(shared.scan, team, count_entries, [&](int thread, std::int64_t count) { shared.end[thread] = count; });
    return shared.end[kThreads - 1];
  }

  static FEDFUSE_DEVICE std::int64_t lower_bound(const std::int32_t* indices, std::int64_t first, std::int64_t last,
                                                 std::int64_t index) {
    while (first < last) {
      const std::int64_t middle = first + (last - first) / 2;
      if (indices[middle] < index) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }

  // The entry at this position, counted over the clients from `client` on.
  static FEDFUSE_DEVICE void take_entry(const Parameters& p, const Shared& shared, std::int64_t batch,
                                        std::int64_t client, std::int64_t begin, std::int64_t columns,
                                        std::int64_t position, std::int64_t count, State* state) {
    state->waits = false;
    if (position >= count) return;
    int low = 0, high = kThreads - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.end[middle] <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const std::int64_t own = client + low;
    const std::int64_t entry = shared.first[low] + position - (low == 0 ? 0 : shared.end[low - 1]);
    const std::int64_t column = indices_of(p, batch, own)[entry] - begin;
    if (column < 0 || column >= columns) return;
    const Bits* const values = reinterpret_cast<const Bits*>(p.values.at(p.shape.batch, batch)) + own * p.shape.entries;
    state->term = shared.weights[low] * Element<type>::widen(values[entry]);
    state->column = static_cast<std::int32_t>(column);
    state->waits = true;
  }

  // Every thread adds its entry; those with the same coordinate in the order of the threads.
  template <typename Threads>
  static FEDFUSE_DEVICE void take_turns(Shared& shared, Threads& team) {
    for (int round = 0;; round ^= 1) {
      team.each([&](int thread, State& state) {
        if (state.waits) lower_shared(&shared.turn[state.column], static_cast<std::uint32_t>(thread));
      });
      team.each([&](int thread, State& state) {
        state.had_turn = state.waits && shared.turn[state.column] == static_cast<std::uint32_t>(thread);
        if (state.had_turn) {
          shared.sums[state.column] += state.term;
          state.waits = false;
        } else if (state.waits) {
          add_to_shared(&shared.waiting[round], 1);
        }
        // For the next round; nobody looks at it before.
        if (thread == 0) shared.waiting[round ^ 1] = 0;
      });
      team.each([&](int, State& state) {
        if (state.had_turn) shared.turn[state.column] = kNobody;
      });
      if (shared.waiting[round] == 0) return;
    }
  }
};

template <Type type>
struct SparseSpread {
  using Parameters = SparseParameters;
  using Shared = Nothing;
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;

  static constexpr int kThreads = 256;
  static constexpr int kEntries = 4 * kThreads;  // a task's

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    const std::int64_t chunks = (p.shape.entries + kEntries - 1) / kEntries;
    const std::int64_t row = task / chunks, batch = row / p.shape.clients, client = row - batch * p.shape.clients;
    const std::int64_t begin = (task - row * chunks) * kEntries;
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const bool present = where == nullptr || where[client] != 0;
    const Accumulator weight = reinterpret_cast<const Accumulator*>(p.weights.at(p.shape.batch, batch))[client];
    const Accumulator* const vector = reinterpret_cast<const Accumulator*>(p.vector.at(p.shape.batch, batch));
    const std::int32_t* const indices = indices_of(p, batch, client);
    Bits* const spread = reinterpret_cast<Bits*>(p.result.at(p.shape.batch, batch)) + client * p.shape.entries;
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
#pragma unroll
      for (int part = 0; part < kEntries; part += kThreads) {
        const std::int64_t entry = begin + part + thread;
        if (entry >= p.shape.entries) return;
        const std::int32_t index = indices[entry];
        const bool counts = present && index >= 0 && index < p.shape.coordinates;
        spread[entry] = Element<type>::narrow(counts ? weight * vector[index] : Accumulator{0});
      }
    });
  }
};

template <Type type>
struct SparseDots {
  using Parameters = SparseParameters;
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;

  static constexpr int kThreads = 256;

  using Shared = Reduction<double, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t row) {
    const std::int64_t batch = row / p.shape.clients, client = row - batch * p.shape.clients;
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const bool present = where == nullptr || where[client] != 0;
    const Accumulator* const vector = reinterpret_cast<const Accumulator*>(p.vector.at(p.shape.batch, batch));
    const std::int32_t* const indices = indices_of(p, batch, client);
    const Bits* const values =
        reinterpret_cast<const Bits*>(p.values.at(p.shape.batch, batch)) + client * p.shape.entries;
    Team<kThreads> team;
    const double dot = add_up(shared, team, [&](int thread, Nothing&) {
      double sum = 0;
#pragma unroll 4
      for (std::int64_t entry = thread; present && entry < p.shape.entries; entry += kThreads) {
        const std::int32_t index = indices[entry];
        if (index < 0 || index >= p.shape.coordinates) continue;
        sum += static_cast<double>(Element<type>::widen(values[entry])) * static_cast<double>(vector[index]);
      }
      return sum;
    });
    team.each([&](int thread, Nothing&) {
      if (thread == 0) store_as(p.result.type, dot, p.result.at(p.shape.batch, batch), client);
    });
  }
};

// Calls use(std::integral_constant) for one floating type.
template <typename Use>
std::string with_type(Type type, Use use) {
  return for_each_type([&](auto each) { return each == type ? use(each) : std::string(); });
}

}  // namespace

std::string enqueue(const SparseSumProblem& problem, Stream stream) {
  const SparseShape& shape = problem.shape;
  SparseParameters p{};
  p.shape = shape;
  p.values = problem.values;
  p.indices = problem.indices;
  p.weights = problem.weights;
  p.where = problem.where;
  p.result = problem.total;
  p.sorted = problem.sorted;
  p.work = shape.batch.count * shape.clients;
  if (std::string error = launch<FindSorted>(p, stream); !error.empty()) return error;
  return with_type(problem.values.type, [&](auto type) {
    using Body = SparseSum<decltype(type)::value>;
    // Narrower tiles where there are few, so that every multiprocessor has some.
    constexpr std::int64_t kTilesWanted = 512, kNarrowest = 256;
    const std::int64_t width = (shape.coordinates + kTilesWanted - 1) / kTilesWanted;
    p.width = std::clamp<std::int64_t>(width, kNarrowest, Body::kWidest);
    p.work = shape.batch.count * ((shape.coordinates + p.width - 1) / p.width);
    return launch<Body>(p, stream);
  });
}

std::string enqueue(const SparseSpreadProblem& problem, Stream stream) {
  const SparseShape& shape = problem.shape;
  SparseParameters p{};
  p.shape = shape;
  p.indices = problem.indices;
  p.weights = problem.weights;
  p.vector = problem.vector;
  p.where = problem.where;
  p.result = problem.spread;
  return with_type(problem.spread.type, [&](auto type) {
    using Body = SparseSpread<decltype(type)::value>;
    p.work = shape.batch.count * shape.clients * ((shape.entries + Body::kEntries - 1) / Body::kEntries);
    return launch<Body>(p, stream);
  });
}

std::string enqueue(const SparseDotsProblem& problem, Stream stream) {
  SparseParameters p{};
  p.shape = problem.shape;
  p.values = problem.values;
  p.indices = problem.indices;
  p.vector = problem.vector;
  p.where = problem.where;
  p.result = problem.dots;
  p.work = problem.shape.batch.count * problem.shape.clients;
  return with_type(problem.values.type,
                   [&](auto type) { return launch<SparseDots<decltype(type)::value>>(p, stream); });
}

}  // namespace cuda
}  // namespace fedfuse
