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

void stack_piece(const StackProblem& problem, const RowPiece& piece) {
  const Tile& tile = piece.tile;
  const View& stacked = problem.stacked[tile.leaf];
  for (std::int64_t client = piece.first_client; client < piece.first_client + piece.clients; ++client) {
    std::memcpy(row_data(stacked, problem.shape, tile, client),
                tile_data(problem.clients[client][tile.leaf], problem.shape, tile),
                tile.columns * bytes_of(stacked.type));
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
  return cut_rows(RowPieces(problem->shape), 2 * stacked_bytes(problem->shape, problem->stacked),
                  [problem](const RowPiece& piece) { stack_piece(*problem, piece); });
}

}  // namespace fedfuse
