#include <cstring>

#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

void accumulate_tile(const AccumulateProblem& problem, const Tile& tile) {
  const Shape& shape = problem.shape;
  const View& update = problem.update[tile.leaf];
  const std::byte* from = problem.weight.at(shape.batch, tile.batch);
  const double weight = problem.weight.type == Type::kFloat64 ? *reinterpret_cast<const double*>(from)
                                                              : *reinterpret_cast<const float*>(from);
  const float narrow_weight = static_cast<float>(weight);
  const bool wide = update.type == Type::kFloat64;
  linear_kernels(update.type)
      .accumulate(tile_data(problem.total[tile.leaf], shape, tile), tile_data(update, shape, tile),
                  wide ? static_cast<const void*>(&weight) : &narrow_weight, tile.columns,
                  tile_data(problem.result[tile.leaf], shape, tile));
}

void stack_tile(const StackProblem& problem, const Tile& tile) {
  const Shape& shape = problem.shape;
  const View& stacked = problem.stacked[tile.leaf];
  const std::int64_t bytes = tile.columns * bytes_of(stacked.type);
  const std::int64_t row_bytes = shape.coordinates[tile.leaf] * bytes_of(stacked.type);
  std::byte* row = tile_data(stacked, shape, tile);
  for (const std::vector<View>& client : problem.clients) {
    std::memcpy(row, tile_data(client[tile.leaf], shape, tile), bytes);
    row += row_bytes;
  }
}

}  // namespace

Work cut(std::shared_ptr<const AccumulateProblem> problem) {
  std::int64_t cost = 0;
  for (std::int64_t coordinates : problem->shape.coordinates) {
    cost += problem->shape.batch.count * coordinates * (2 * sizeof(float) + sizeof(float));
  }
  return cut_tiles(Tiles::balanced(problem->shape), cost,
                   [problem](const Tile& tile) { accumulate_tile(*problem, tile); });
}

Work cut(std::shared_ptr<const StackProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), 2 * stacked_bytes(problem->shape, problem->stacked),
                   [problem](const Tile& tile) { stack_tile(*problem, tile); });
}

}  // namespace fedfuse
