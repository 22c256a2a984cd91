#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

template <typename Accumulator, typename Problem>
Accumulator weight_of(const Problem& problem, std::int64_t batch, std::int64_t client) {
  const std::byte* weights = problem.weights.at(problem.shape.batch, batch);
  return problem.weights.type == Type::kFloat64
             ? static_cast<Accumulator>(reinterpret_cast<const double*>(weights)[client])
             : static_cast<Accumulator>(reinterpret_cast<const float*>(weights)[client]);
}

template <typename Accumulator>
void run_tile(const WeightedSumProblem& problem, const Tile& tile) {
  thread_local std::vector<void*> rows;
  thread_local std::vector<Accumulator> weights;
  thread_local std::vector<Accumulator> sums;
  const View& updates = problem.updates[tile.leaf];
  const View& reduced = problem.reduced[tile.leaf];
  gather_rows(updates, problem.where, problem.shape, tile, &rows);
  weights.clear();
  for (std::int64_t client = 0; client < problem.shape.clients; ++client) {
    if (!is_present(problem.where, problem.shape, tile.batch, client)) continue;
    weights.push_back(weight_of<Accumulator>(problem, tile.batch, client));
  }
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
void spread_piece(const WeightedSpreadProblem& problem, const RowPiece& piece) {
  thread_local std::vector<Accumulator> widened;
  const Shape& shape = problem.shape;
  const Tile& tile = piece.tile;
  const View& cotangents = problem.cotangents[tile.leaf];
  const View& spread = problem.spread[tile.leaf];
  const Type accumulator = accumulator_of(spread.type);
  const void* values = tile_data(cotangents, shape, tile);
  if (cotangents.type != accumulator) {
    widened.resize(tile.columns);
    convert(cotangents.type, values, accumulator, widened.data(), tile.columns);
    values = widened.data();
  }
  for (std::int64_t client = piece.first_client; client < piece.first_client + piece.clients; ++client) {
    std::byte* row = row_data(spread, shape, tile, client);
    if (is_present(problem.where, shape, tile.batch, client)) {
      const Accumulator weight = weight_of<Accumulator>(problem, tile.batch, client);
      linear_kernels(spread.type).scale(values, &weight, tile.columns, row);
    } else {
      std::memset(row, 0, tile.columns * bytes_of(spread.type));
    }
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
  return cut_rows(RowPieces(problem->shape), stacked_bytes(problem->shape, problem->spread),
                  [problem](const RowPiece& piece) {
                    with_accumulator(problem->spread[piece.tile.leaf].type,
                                     [&](auto zero) { spread_piece<decltype(zero)>(*problem, piece); });
                  });
}

}  // namespace fedfuse
