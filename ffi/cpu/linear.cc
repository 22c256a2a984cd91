#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

// The weights of the clients that take part, as a leaf with this accumulator wants them.
template <typename Accumulator, typename Problem>
void gather_weights(const Problem& problem, std::int64_t batch, std::vector<Accumulator>* weights) {
  const Shape& shape = problem.shape;
  const std::byte* from = problem.weights.at(shape.batch, batch);
  weights->clear();
  for (std::int64_t client = 0; client < shape.clients; ++client) {
    if (!is_present(problem.where, shape, batch, client)) continue;
    weights->push_back(problem.weights.type == Type::kFloat64
                           ? static_cast<Accumulator>(reinterpret_cast<const double*>(from)[client])
                           : static_cast<Accumulator>(reinterpret_cast<const float*>(from)[client]));
  }
}

template <typename Accumulator>
void run_tile(const WeightedSumProblem& problem, const Tile& tile) {
  thread_local std::vector<void*> rows;
  thread_local std::vector<Accumulator> weights;
  thread_local std::vector<Accumulator> sums;
  const View& updates = problem.updates[tile.leaf];
  const View& reduced = problem.reduced[tile.leaf];
  gather_rows(updates, problem.where, problem.shape, tile, &rows);
  gather_weights(problem, tile.batch, &weights);
  Accumulator total = 0;
  for (Accumulator weight : weights) total += weight;

  const Type accumulator = accumulator_of(updates.type);
  void* result = tile_data(reduced, problem.shape, tile);
  void* out = result;
  if (reduced.type != accumulator) {
    sums.resize(tile.columns);
    out = sums.data();
  }
  linear_kernels(updates.type)
      .weighted_sum(rows.data(), weights.data(), rows.size(), tile.columns, problem.divide ? &total : nullptr, out);
  if (out != result) convert(accumulator, out, reduced.type, result, tile.columns);
}

template <typename Accumulator>
void spread_tile(const WeightedSpreadProblem& problem, const Tile& tile) {
  thread_local std::vector<void*> rows;
  thread_local std::vector<Accumulator> weights;
  thread_local std::vector<Accumulator> widened;
  const View& cotangents = problem.cotangents[tile.leaf];
  const View& spread = problem.spread[tile.leaf];
  const Type accumulator = accumulator_of(spread.type);
  const void* values = tile_data(cotangents, problem.shape, tile);
  if (cotangents.type != accumulator) {
    widened.resize(tile.columns);
    convert(cotangents.type, values, accumulator, widened.data(), tile.columns);
    values = widened.data();
  }
  if (problem.where.present()) {
    gather_rows(spread, View(), problem.shape, tile, &rows);
    for (void* row : rows) std::memset(row, 0, tile.columns * bytes_of(spread.type));
  }
  gather_rows(spread, problem.where, problem.shape, tile, &rows);
  gather_weights(problem, tile.batch, &weights);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    linear_kernels(spread.type).scale(values, &weights[row], tile.columns, rows[row]);
  }
}

}  // namespace

Work cut(std::shared_ptr<const WeightedSumProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), stacked_bytes(problem->shape, problem->updates),
                   [problem](const Tile& tile) {
                     with_accumulator(problem->updates[tile.leaf].type,
                                      [&](auto zero) { run_tile<decltype(zero)>(*problem, tile); });
                   });
}

Work cut(std::shared_ptr<const WeightedSpreadProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), stacked_bytes(problem->shape, problem->spread),
                   [problem](const Tile& tile) {
                     with_accumulator(problem->spread[tile.leaf].type,
                                      [&](auto zero) { spread_tile<decltype(zero)>(*problem, tile); });
                   });
}

}  // namespace fedfuse
