#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/squares.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

// The partial sums of all clients over one block of coordinates.
void dot_tile(const ClientDotsProblem& problem, const Tile& tile) {
  thread_local std::vector<double> widened;
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[tile.leaf];
  const View& others = problem.others[tile.leaf];
  const Type accumulator = accumulator_of(updates.type);
  const std::int64_t row_bytes = shape.coordinates[tile.leaf] * bytes_of(updates.type);
  const std::int64_t other_bytes = problem.shared ? 0 : shape.coordinates[tile.leaf] * bytes_of(others.type);
  const std::byte* row = tile_data(updates, shape, tile);
  const std::byte* other = tile_data(others, shape, tile);
  const LinearKernels& kernels = linear_kernels(updates.type);
  const std::int64_t num_blocks = problem.first_block.back();
  double* partial = problem.partials + tile.batch * shape.clients * num_blocks + problem.first_block[tile.leaf] +
                    tile.begin / kReductionBlock;
  if (problem.squares) {
    for_each_square(updates, problem.where, shape, tile, [&](const void*, double sum) {
      *partial = sum;
      partial += num_blocks;
    });
    return;
  }
  widened.resize(kReductionBlock);
  bool shared_is_widened = false;
  for (std::int64_t client = 0; client < shape.clients; ++client) {
    if (!is_present(problem.where, shape, tile.batch, client)) {
      *partial = 0;
    } else {
      const void* values = other;
      if (others.type != accumulator) {
        if (!shared_is_widened) convert(others.type, other, accumulator, widened.data(), tile.columns);
        shared_is_widened = problem.shared;
        values = widened.data();
      }
      *partial = kernels.dot(row, values, tile.columns);
    }
    row += row_bytes;
    other += other_bytes;
    partial += num_blocks;
  }
}

// Adds the partial sums, block after block.
void add_partials(const ClientDotsProblem& problem) {
  const Shape& shape = problem.shape;
  const std::int64_t num_blocks = problem.first_block.back();
  const double* partial = problem.partials;
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    std::byte* dots = problem.dots.at(shape.batch, batch);
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      double sum = 0;
      for (std::int64_t block = 0; block < num_blocks; ++block) sum += *partial++;
      if (problem.dots.type == Type::kFloat64) {
        reinterpret_cast<double*>(dots)[client] = sum;
      } else {
        reinterpret_cast<float*>(dots)[client] = static_cast<float>(sum);
      }
    }
  }
}

// Tiles find infinities and NaNs in parallel: all of them write the same byte, so they write it atomically.
void mark_finite(const FiniteClientsProblem& problem, const Tile& tile) {
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[tile.leaf];
  const LinearKernels& kernels = linear_kernels(updates.type);
  const std::int64_t row_bytes = shape.coordinates[tile.leaf] * bytes_of(updates.type);
  const std::byte* row = tile_data(updates, shape, tile);
  bool* finite = reinterpret_cast<bool*>(problem.finite.at(shape.batch, tile.batch));
  for (std::int64_t client = 0; client < shape.clients; ++client, row += row_bytes) {
    if (__atomic_load_n(finite + client, __ATOMIC_RELAXED) && !kernels.all_finite(row, tile.columns)) {
      __atomic_store_n(finite + client, false, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace

Work cut(std::shared_ptr<const ClientDotsProblem> problem) {
  Work work = cut_tiles(Tiles(problem->shape, kReductionBlock), stacked_bytes(problem->shape, problem->updates),
                        [problem](const Tile& tile) { dot_tile(*problem, tile); });
  work.finish = [problem] { add_partials(*problem); };
  return work;
}

Work cut(std::shared_ptr<const FiniteClientsProblem> problem) {
  std::fill_n(reinterpret_cast<bool*>(problem->finite.data), problem->shape.batch.count * problem->shape.clients, true);
  return cut_tiles(Tiles(problem->shape, kReductionBlock), stacked_bytes(problem->shape, problem->updates),
                   [problem](const Tile& tile) { mark_finite(*problem, tile); });
}

}  // namespace fedfuse
