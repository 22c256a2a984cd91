#include "contract/distances.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

// ---- Pairs ----------------------------------------------------------------------------------------------------------

// A task has the pairs of two groups of clients, over one segment of the coordinates. Of them it works on so many
// columns at a time: those of a group stay in the second-level cache, those of kPairRows clients and of as many others
// in the first-level one, and yet the sums are seldom added up in float64.
constexpr std::int64_t kMostGroupClients = 128;
constexpr std::int64_t kFewestGroupClients = 32;
constexpr std::int64_t kPairColumns = 768;

// The clients in groups as like in size as can be. Every group meets every other one, and reads it anew: large groups,
// but small ones where there would not be tasks enough to keep the threads busy.
struct Groups {
  explicit Groups(const PairsProblem& problem) {
    const std::int64_t pieces = problem.shape.batch.count * problem.segments, all = problem.shape.clients;
    count = std::max<std::int64_t>(1, quotient_up(all, kMostGroupClients));
    while (pieces * pairs() < tasks_wanted() && quotient_up(all, 2 * count) >= kFewestGroupClients) count *= 2;
    clients = quotient_up(std::max<std::int64_t>(1, quotient_up(all, count)), kPairRows) * kPairRows;
  }

  std::int64_t pairs() const { return count * (count + 1) / 2; }

  std::int64_t count;
  std::int64_t clients;  // of a group, at most
};

// Some clients of a group, at one column. Behind the last of the group stand copies of it.
struct GroupRows {
  const void* rows[kMostGroupClients];

  void point_at(const View& view, const Shape& shape, std::int64_t batch, std::int64_t leaf, std::int64_t column,
                const std::int64_t* clients, std::int64_t count) {
    const std::int64_t element = bytes_of(view.type), stride = shape.coordinates[leaf] * element;
    const std::byte* const first = view.at(shape.batch, batch) + column * element;
    for (std::int64_t i = 0; i < quotient_up(count, kPairRows) * kPairRows; ++i) {
      rows[i] = first + clients[std::min(i, count - 1)] * stride;
    }
  }
};

void sum_pairs(const PairsProblem& problem, const Groups& groups, std::int64_t task) {
  thread_local std::vector<std::int64_t> present;
  const Shape& shape = problem.shape;
  std::int64_t second = task % groups.pairs(), first = 0;
  const std::int64_t segment = task / groups.pairs() % problem.segments;
  const std::int64_t batch = task / groups.pairs() / problem.segments;
  for (; second >= groups.count - first; ++first) second -= groups.count - first;
  second += first;

  present.clear();
  for (std::int64_t client = 0; client < shape.clients; ++client) {
    if (is_present(problem.where, shape, batch, client)) present.push_back(client);
  }
  const auto num_present = static_cast<std::int64_t>(present.size());
  const std::int64_t* const a_clients = present.data() + first * groups.clients;
  const std::int64_t* const b_clients = present.data() + second * groups.clients;
  const std::int64_t a_count = std::min(groups.clients, num_present - first * groups.clients);
  const std::int64_t b_count = std::min(groups.clients, num_present - second * groups.clients);
  if (b_count <= 0) return;

  thread_local std::vector<PairSums> sums;
  const std::int64_t a_tiles = quotient_up(a_count, kPairRows), b_tiles = quotient_up(b_count, kPairRows);
  sums.assign(a_tiles * b_tiles, PairSums());
  const std::int64_t num_blocks = problem.first_block.back();
  const std::int64_t past = (segment + 1) * num_blocks / problem.segments;
  for (std::int64_t block = segment * num_blocks / problem.segments; block < past; ++block) {
    const auto next_leaf = std::upper_bound(problem.first_block.begin(), problem.first_block.end(), block);
    const std::int64_t leaf = next_leaf - problem.first_block.begin() - 1;
    const std::int64_t begin = (block - problem.first_block[leaf]) * kReductionBlock;
    const std::int64_t end = std::min(begin + kReductionBlock, shape.coordinates[leaf]);
    const LinearKernels& kernels = linear_kernels(problem.updates[leaf].type);
    for (std::int64_t column = begin; column < end; column += kPairColumns) {
      GroupRows a, b, a_factors, b_factors;
      a.point_at(problem.updates[leaf], shape, batch, leaf, column, a_clients, a_count);
      b.point_at(problem.updates[leaf], shape, batch, leaf, column, b_clients, b_count);
      if (!problem.squares) {
        a_factors.point_at(problem.others[leaf], shape, batch, leaf, column, a_clients, a_count);
        b_factors.point_at(problem.others[leaf], shape, batch, leaf, column, b_clients, b_count);
      }
      const std::int64_t columns = std::min(kPairColumns, end - column);
      for (std::int64_t i = 0; i < a_tiles; ++i) {
        for (std::int64_t j = first == second ? i : 0; j < b_tiles; ++j) {
          kernels.difference_products(a.rows + i * kPairRows, b.rows + j * kPairRows,
                                      problem.squares ? nullptr : a_factors.rows + i * kPairRows,
                                      problem.squares ? nullptr : b_factors.rows + j * kPairRows, columns,
                                      &sums[i * b_tiles + j]);
        }
      }
    }
  }

  double* const partials = problem.partials + (batch * problem.segments + segment) * shape.clients * shape.clients;
  for (std::int64_t i = 0; i < a_count; ++i) {
    for (std::int64_t j = first == second ? i : 0; j < b_count; ++j) {
      const PairSums& tile = sums[i / kPairRows * b_tiles + j / kPairRows];
      double sum = 0;
      for (double lane : tile.lanes[i % kPairRows][j % kPairRows]) sum += lane;
      partials[a_clients[i] * shape.clients + b_clients[j]] = sum;
    }
  }
}

template <typename Real>
void finish_pairs(const PairsProblem& problem) {
  const Shape& shape = problem.shape;
  const std::int64_t clients = shape.clients;
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    Real* const pairs = reinterpret_cast<Real*>(problem.pairs.at(shape.batch, batch));
    for (std::int64_t i = 0; i < clients; ++i) {
      for (std::int64_t j = i; j < clients; ++j) {
        const bool both_present =
            is_present(problem.where, shape, batch, i) && is_present(problem.where, shape, batch, j);
        double sum = 0;
        for (std::int64_t segment = 0; both_present && segment < problem.segments; ++segment) {
          sum += problem.partials[((batch * problem.segments + segment) * clients + i) * clients + j];
        }
        pairs[i * clients + j] = pairs[j * clients + i] =
            static_cast<Real>(finish_pair(sum, problem.squares, both_present, i == j));
      }
    }
  }
}

// ---- Mixtures -------------------------------------------------------------------------------------------------------

// Columns of which all clients' stay in a cache while row after row is made of them.
constexpr std::int64_t kMixColumns = 1024;

template <typename Accumulator>
void mix_tile(const MixProblem& problem, const Tile& tile) {
  thread_local std::vector<void*> all, rows;
  thread_local std::vector<Accumulator> weights, sums;
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[tile.leaf];
  const View& mixed = problem.mixed[tile.leaf];
  const Type accumulator = accumulator_of(updates.type);
  const std::byte* const mixing = problem.mixing.at(shape.batch, tile.batch);
  const std::int64_t out_bytes = shape.coordinates[tile.leaf] * bytes_of(mixed.type);
  gather_rows(updates, View(), shape, tile, &all);
  sums.resize(kMixColumns);
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    rows.clear();
    weights.clear();
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      const std::int64_t index = row * shape.clients + client;
      const double coefficient = problem.mixing.type == Type::kFloat64 ? reinterpret_cast<const double*>(mixing)[index]
                                                                       : reinterpret_cast<const float*>(mixing)[index];
      if (coefficient == 0) continue;
      rows.push_back(all[client]);
      weights.push_back(static_cast<Accumulator>(coefficient));
    }
    void* const result = tile_data(mixed, shape, tile) + row * out_bytes;
    void* const out = mixed.type == accumulator ? result : sums.data();
    linear_kernels(updates.type).weighted_sum(rows.data(), weights.data(), rows.size(), tile.columns, nullptr, out);
    if (out != result) convert(accumulator, out, mixed.type, result, tile.columns);
  }
}

// ---- Steps ----------------------------------------------------------------------------------------------------------

constexpr std::int64_t kStepColumns = 1024;

// One block of coordinates, a few columns at a time: the step, and while the updates are in a cache, the distances.
template <typename Accumulator>
void step_tile(const StepProblem& problem, const Tile& block) {
  thread_local std::vector<void*> all, rows;
  thread_local std::vector<Accumulator> weights;
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[block.leaf];
  const LinearKernels& kernels = linear_kernels(updates.type);
  const std::byte* const given = problem.weights.at(shape.batch, block.batch);
  const std::int64_t num_blocks = problem.first_block.back();
  double* const partials = problem.partials + block.batch * shape.clients * num_blocks +
                           problem.first_block[block.leaf] + block.begin / kReductionBlock;
  for (std::int64_t client = 0; client < shape.clients; ++client) partials[client * num_blocks] = 0;
  for (std::int64_t begin = 0; begin < block.columns; begin += kStepColumns) {
    const Tile tile = {block.batch, block.leaf, block.begin + begin, std::min(kStepColumns, block.columns - begin)};
    gather_rows(updates, View(), shape, tile, &all);
    rows.clear();
    weights.clear();
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      const auto weight = static_cast<Accumulator>(problem.weights.type == Type::kFloat64
                                                       ? reinterpret_cast<const double*>(given)[client]
                                                       : reinterpret_cast<const float*>(given)[client]);
      if (weight == 0 || !is_present(problem.where, shape, block.batch, client)) continue;
      rows.push_back(all[client]);
      weights.push_back(weight);
    }
    void* const moved = tile_data(problem.moved[block.leaf], shape, tile);
    kernels.step(rows.data(), weights.data(), rows.size(), tile.columns,
                 tile_data(problem.center[block.leaf], shape, tile), moved);
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      if (!is_present(problem.where, shape, block.batch, client)) continue;
      partials[client * num_blocks] += kernels.squared_distance(all[client], moved, tile.columns);
    }
  }
}

template <typename Real>
void finish_distances(const StepProblem& problem) {
  const Shape& shape = problem.shape;
  const std::int64_t num_blocks = problem.first_block.back();
  const double* partial = problem.partials;
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    Real* const distances = reinterpret_cast<Real*>(problem.distances.at(shape.batch, batch));
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      double sum = 0;
      for (std::int64_t block = 0; block < num_blocks; ++block) sum += *partial++;
      const Real distance = static_cast<Real>(std::sqrt(sum));
      distances[client] = std::isfinite(distance) ? distance : std::numeric_limits<Real>::infinity();
    }
  }
}

}  // namespace

Work cut(std::shared_ptr<const PairsProblem> problem) {
  const Groups groups(*problem);
  Work work;
  work.tasks = problem->shape.batch.count * problem->segments * groups.pairs();
  // Of every client as many differences as there are others; eight of them cost what a byte does.
  work.cost = stacked_bytes(problem->shape, problem->updates) * (1 + problem->shape.clients / 8);
  work.run = [problem, groups](std::int64_t task) { sum_pairs(*problem, groups, task); };
  work.finish = [problem] {
    with_accumulator(problem->pairs.type, [&](auto zero) { finish_pairs<decltype(zero)>(*problem); });
  };
  return work;
}

Work cut(std::shared_ptr<const MixProblem> problem) {
  const std::int64_t cost = stacked_bytes(problem->shape, problem->updates) * (1 + problem->rows / 8);
  return cut_tiles(Tiles(problem->shape, kMixColumns), cost, [problem](const Tile& tile) {
    with_accumulator(problem->updates[tile.leaf].type, [&](auto zero) { mix_tile<decltype(zero)>(*problem, tile); });
  });
}

Work cut(std::shared_ptr<const StepProblem> problem) {
  const std::int64_t cost = stacked_bytes(problem->shape, problem->updates);
  Work work = cut_tiles(Tiles(problem->shape, kReductionBlock), cost, [problem](const Tile& tile) {
    with_accumulator(problem->updates[tile.leaf].type, [&](auto zero) { step_tile<decltype(zero)>(*problem, tile); });
  });
  work.finish = [problem] {
    with_accumulator(problem->distances.type, [&](auto zero) { finish_distances<decltype(zero)>(*problem); });
  };
  return work;
}

}  // namespace fedfuse
