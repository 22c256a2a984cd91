// pairwise_squared_distances, mix_clients and step_toward_clients.
#include <cmath>
#include <limits>

#include "contract/distances.h"
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"
#include "cuda/reductions.h"

namespace fedfuse {
namespace cuda {
namespace {

// ---- Pairs ----------------------------------------------------------------------------------------------------------

struct PairOptions {
  View where;
  double* partials;
  std::int64_t segments;
  std::int64_t groups;  // of clients
  bool squares;
};

constexpr int kGroupClients = 32;

// Which two groups of clients a task is of: (first, second), second >= first.
struct GroupPair {
  std::int64_t first = 0;
  std::int64_t second;

  FEDFUSE_DEVICE GroupPair(std::int64_t index, std::int64_t groups) : second(index) {
    for (; second >= groups - first; ++first) second -= groups - first;
    second += first;
  }
};

// Adds, for the pairs of two groups of clients, what the leaves of a table have in one segment to its partial sums. A
// thread has four pairs, and shares what it reads of the clients with the others.
template <Type type>
struct SumPairs {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Parameters = cuda::Parameters<2, PairOptions>;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  static constexpr int kTileColumns = kReductionBlock;
  static constexpr int kColumns = 16;  // at a time
  static constexpr int kSide = 16;     // threads
  static constexpr int kEach = kGroupClients / kSide;
  static constexpr int kPairs = kEach * kEach;

  struct Shared {
    // Of the first and the second group; and of the factors. One column more, for the banks.
    Accumulator values[2][2][kGroupClients][kColumns + 1];
  };

  struct State {
    double sums[kPairs] = {};
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const std::int64_t group_pairs = p.options.groups * (p.options.groups + 1) / 2;
    const GroupPair groups(task % group_pairs, p.options.groups);
    const std::int64_t segment = task / group_pairs % p.options.segments;
    const std::int64_t batch = task / group_pairs / p.options.segments;
    Team<kThreads, State> team;
    team.each([&](int, State& state) {
      for (int pair = 0; pair < kPairs; ++pair) state.sums[pair] = 0;
    });
    const std::int64_t past = (segment + 1) * p.tiles / p.options.segments;
    for (std::int64_t index = segment * p.tiles / p.options.segments; index < past; ++index) {
      add_tile(p, locate(p, batch * p.tiles + index, kTileColumns), groups, shared, team);
    }
    double* const partials = p.options.partials + (batch * p.options.segments + segment) * p.clients * p.clients;
    team.each([&](int thread, State& state) {
      for (int pair = 0; pair < kPairs; ++pair) {
        const std::int64_t i = groups.first * kGroupClients + thread / kSide + pair / kEach * kSide;
        const std::int64_t j = groups.second * kGroupClients + thread % kSide + pair % kEach * kSide;
        if (i < p.clients && j < p.clients) partials[i * p.clients + j] += state.sums[pair];
      }
    });
  }

  static FEDFUSE_DEVICE void add_tile(const Parameters& p, const Tile& tile, const GroupPair& groups, Shared& shared,
                                      Team<kThreads, State>& team) {
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const int operands = p.options.squares ? 1 : 2;
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    for (std::int64_t column = 0; column < tile.columns; column += kColumns) {
      team.each([&](int thread, State&) {
        for (int operand = 0; operand < operands; ++operand) {
          const Bits* const rows =
              reinterpret_cast<const Bits*>(operand_data(p, tile, operand, p.clients, sizeof(Bits))) + tile.begin;
          for (int i = thread; i < 2 * kGroupClients * kColumns; i += kThreads) {
            const int side = i / (kGroupClients * kColumns), row = i / kColumns % kGroupClients, at = i % kColumns;
            const std::int64_t client = (side == 0 ? groups.first : groups.second) * kGroupClients + row;
            const bool there =
                client < p.clients && column + at < tile.columns && (where == nullptr || where[client] != 0);
            shared.values[operand][side][row][at] =
                there ? Element<type>::widen(rows[client * coordinates + column + at]) : Accumulator{0};
          }
        }
      });
      team.each([&](int thread, State& state) {
        Accumulator sums[kPairs] = {};
#pragma unroll 4
        for (int at = 0; at < kColumns; ++at) {
          for (int pair = 0; pair < kPairs; ++pair) {
            const int i = thread / kSide + pair / kEach * kSide, j = thread % kSide + pair % kEach * kSide;
            const Accumulator apart = shared.values[0][0][i][at] - shared.values[0][1][j][at];
            const Accumulator factor =
                p.options.squares ? apart : shared.values[1][0][i][at] - shared.values[1][1][j][at];
            sums[pair] += apart * factor;
          }
        }
        for (int pair = 0; pair < kPairs; ++pair) state.sums[pair] += sums[pair];
      });
    }
  }
};

struct ClearSums {
  struct Parameters {
    std::int64_t work;
    std::int64_t count;
    double* sums;
  };
  using Shared = Nothing;

  static constexpr int kThreads = 256;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t index = task * kThreads + thread;
      if (index < p.count) p.sums[index] = 0;
    });
  }
};

std::string clear_sums(double* sums, std::int64_t count, Stream stream) {
  ClearSums::Parameters p{};
  p.count = count;
  p.work = (count + ClearSums::kThreads - 1) / ClearSums::kThreads;
  p.sums = sums;
  return launch<ClearSums>(p, stream);
}

// Adds the segments of each pair.
struct FinishPairs {
  struct Parameters {
    Batch batch;
    std::int64_t work;
    std::int64_t clients;
    std::int64_t segments;
    const double* partials;
    View where;
    View pairs;
    bool squares;
  };
  using Shared = Nothing;

  static constexpr int kThreads = 256;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t pairs = p.clients * p.clients, index = task * kThreads + thread;
      if (index >= p.batch.count * pairs) return;
      const std::int64_t batch = index / pairs, i = index % pairs / p.clients, j = index % p.clients;
      // Only the groups at and above the diagonal were summed.
      const bool swapped = i / kGroupClients > j / kGroupClients;
      const std::int64_t summed = swapped ? j * p.clients + i : i * p.clients + j;
      double sum = 0;
      for (std::int64_t segment = 0; segment < p.segments; ++segment) {
        sum += p.partials[(batch * p.segments + segment) * pairs + summed];
      }
      const std::uint8_t* const where = where_of(p.where, p.batch, batch);
      const bool both_present = where == nullptr || (where[i] && where[j]);
      store_as(p.pairs.type, finish_pair(sum, p.squares, both_present, i == j), p.pairs.at(p.batch, batch),
               i * p.clients + j);
    });
  }
};

// ---- Mixtures -------------------------------------------------------------------------------------------------------

struct MixOptions {
  View mixing;
  std::int64_t rows;
  Type mixed_type;
};

// A thread has a column, and goes over its clients for a few rows of the matrix at a time.
template <Type type>
struct Mix {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Parameters = cuda::Parameters<2, MixOptions>;
  using Shared = Nothing;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = type == Type::kFloat64 ? 0 : 2;  // see kBlocksWanted
  static constexpr int kTileColumns = kThreads;
  static constexpr int kRows = 8;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const Bits* const updates =
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin;
    std::byte* const mixed = operand_data(p, tile, 1, p.options.rows, bytes_of(p.options.mixed_type));
    const std::byte* const mixing = p.options.mixing.at(p.batch, tile.batch);
    Team<kThreads> team;
    team.each([&](int column, Nothing&) {
      if (column >= tile.columns) return;
      for (std::int64_t first = 0; first < p.options.rows; first += kRows) {
        Accumulator sums[kRows] = {};
#pragma unroll 2
        for (std::int64_t client = 0; client < p.clients; ++client) {
          const Accumulator value = Element<type>::widen(updates[client * coordinates + column]);
          for (int row = 0; row < kRows; ++row) {
            if (first + row >= p.options.rows) continue;
            const auto coefficient =
                load_as<Accumulator>(p.options.mixing.type, mixing, (first + row) * p.clients + client);
            if (coefficient != 0) sums[row] += coefficient * value;
          }
        }
        for (int row = 0; row < kRows; ++row) {
          if (first + row >= p.options.rows) continue;
          store_as(p.options.mixed_type, sums[row], mixed, (first + row) * coordinates + tile.begin + column);
        }
      }
    });
  }
};

// ---- Steps ----------------------------------------------------------------------------------------------------------

struct StepOptions {
  View weights;
  View where;
  std::int64_t num_blocks;
};

// One block of coordinates, a few at a time: the step, and while the updates are in a cache, the distances. The last
// operand is where a leaf's partial sums are.
template <Type type>
struct StepToward {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Parameters = cuda::Parameters<4, StepOptions>;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kTileColumns = kReductionBlock;
  static constexpr int kColumns = 1024;  // at a time
  // A warp has a client's distance.
  static constexpr int kClients = kThreads / kWarpThreads;

  struct Shared {
    Accumulator moved[kColumns];
    WarpReduction<double, kThreads> sums;
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const Bits* const updates =
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin;
    const Accumulator* const center =
        reinterpret_cast<const Accumulator*>(operand_data(p, tile, 1, 1, sizeof(Accumulator))) + tile.begin;
    Accumulator* const moved =
        reinterpret_cast<Accumulator*>(operand_data(p, tile, 2, 1, sizeof(Accumulator))) + tile.begin;
    double* const partials = reinterpret_cast<double*>(p.leaves[tile.leaf].data[3]) +
                             tile.batch * p.clients * p.options.num_blocks + tile.begin / kReductionBlock;
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    const std::byte* const weights = p.options.weights.at(p.batch, tile.batch);

    Team<kThreads> team;
    for (std::int64_t begin = 0; begin < tile.columns; begin += kColumns) {
      const std::int64_t columns = tile.columns - begin < kColumns ? tile.columns - begin : kColumns;
      team.each([&](int thread, Nothing&) {
        for (std::int64_t column = thread; column < columns; column += kThreads) {
          const Accumulator start = center[begin + column];
          Accumulator sum = 0;
#pragma unroll 4
          for (std::int64_t client = 0; client < p.clients; ++client) {
            const auto weight = load_as<Accumulator>(p.options.weights.type, weights, client);
            if (weight == 0 || (where != nullptr && !where[client])) continue;
            sum += weight * (Element<type>::widen(updates[client * coordinates + begin + column]) - start);
          }
          shared.moved[column] = start + sum;
          moved[begin + column] = start + sum;
        }
      });
      for (std::int64_t first = 0; first < p.clients; first += kClients) {
        const auto add_squares = [&](int thread, Nothing&) {
          const std::int64_t client = first + thread / kWarpThreads;
          const bool present = client < p.clients && (where == nullptr || where[client] != 0);
          double sum = 0;
          for (std::int64_t column = thread % kWarpThreads; present && column < columns; column += kWarpThreads) {
            const Accumulator value = Element<type>::widen(updates[client * coordinates + begin + column]);
            const double apart = value - shared.moved[column];
            sum += apart * apart;
          }
          return sum;
        };
        add_up_warps(shared.sums, team, add_squares, [&](int warp, double sum) {
          const std::int64_t client = first + warp;
          if (client >= p.clients) return;
          double& partial = partials[client * p.options.num_blocks];
          partial = begin == 0 ? sum : partial + sum;
        });
      }
    }
  }
};

// Adds the blocks of each client.
struct FinishDistances {
  struct Parameters {
    Batch batch;
    std::int64_t work;
    std::int64_t clients;
    std::int64_t num_blocks;
    const double* partials;
    View distances;
  };

  static constexpr int kThreads = kReductionThreads;

  using Shared = Reduction<double, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    Team<kThreads> team;
    const double squares = add_blocks(p.partials + task * p.num_blocks, p.num_blocks, shared, team);
    team.each([&](int thread, Nothing&) {
      if (thread != 0) return;
      const double distance = sqrt(squares);
      const std::int64_t batch = task / p.clients;
      // NaN as well is infinitely far; what is too large for a float32 becomes infinite by itself.
      store_as(p.distances.type, distance == distance ? distance : __builtin_inf(), p.distances.at(p.batch, batch),
               task - batch * p.clients);
    });
  }
};

}  // namespace

std::string enqueue(const PairsProblem& problem, Stream stream) {
  const Shape& shape = problem.shape;
  const std::int64_t pairs = shape.clients * shape.clients;
  std::string error = clear_sums(problem.partials, shape.batch.count * problem.segments * pairs, stream);
  if (!error.empty()) return error;
  const std::int64_t groups = (shape.clients + kGroupClients - 1) / kGroupClients;
  error = for_each_type([&](auto type) {
    using Body = SumPairs<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options = {problem.where, problem.partials, problem.segments, groups, problem.squares};
    return for_each_table(
        shape, {&problem.updates, &problem.others}, Body::kTileColumns, 1, &p,
        [&](typename Body::Parameters& table) {
          // Tasks are groups of clients and segments of the table, not tiles.
          table.work = shape.batch.count * problem.segments * (groups * (groups + 1) / 2);
          return launch<Body>(table, stream);
        },
        [&](std::size_t leaf) { return problem.updates[leaf].type == type; });
  });
  if (!error.empty()) return error;
  FinishPairs::Parameters p{};
  p.batch = shape.batch;
  p.work = (shape.batch.count * pairs + FinishPairs::kThreads - 1) / FinishPairs::kThreads;
  p.clients = shape.clients;
  p.segments = problem.segments;
  p.partials = problem.partials;
  p.where = problem.where;
  p.pairs = problem.pairs;
  p.squares = problem.squares;
  return launch<FinishPairs>(p, stream);
}

std::string enqueue(const MixProblem& problem, Stream stream) {
  return for_each_type([&](auto type) {
    using Body = Mix<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.mixing = problem.mixing;
    p.options.rows = problem.rows;
    return for_each_type([&](auto mixed_type) {
      p.options.mixed_type = mixed_type;
      return for_each_table(
          problem.shape, {&problem.updates, &problem.mixed}, Body::kTileColumns, 1, &p,
          [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
          [&](std::size_t leaf) {
            return problem.updates[leaf].type == type && problem.mixed[leaf].type == mixed_type;
          });
    });
  });
}

std::string enqueue(const StepProblem& problem, Stream stream) {
  const Shape& shape = problem.shape;
  std::vector<View> partials(shape.coordinates.size());
  for (std::size_t leaf = 0; leaf < partials.size(); ++leaf) {
    partials[leaf].data = reinterpret_cast<std::byte*>(problem.partials + problem.first_block[leaf]);
  }
  std::string error = for_each_type([&](auto type) {
    using Body = StepToward<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options = {problem.weights, problem.where, problem.first_block.back()};
    return for_each_table(
        shape, {&problem.updates, &problem.center, &problem.moved, &partials}, Body::kTileColumns, 1, &p,
        [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.updates[leaf].type == type; });
  });
  if (!error.empty()) return error;
  FinishDistances::Parameters p{};
  p.batch = shape.batch;
  p.clients = shape.clients;
  p.work = shape.batch.count * shape.clients;
  p.num_blocks = problem.first_block.back();
  p.partials = problem.partials;
  p.distances = problem.distances;
  return launch<FinishDistances>(p, stream);
}

}  // namespace cuda
}  // namespace fedfuse
