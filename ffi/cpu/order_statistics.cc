#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

// What sorting costs, in passes over the updates, when it comes to whether a second thread pays.
constexpr std::int64_t kPasses = 4;

// Memory for one tile's worth of accumulators, one a thread.
std::byte* scratch() {
  thread_local std::vector<double> values(kMostColumns);
  return reinterpret_cast<std::byte*>(values.data());
}

// What is kept in an element of the batch, with a trim of -1 if that is nobody of the rows.
KeptRanks kept_of(const Trim& trim, const Shape& shape, std::int64_t batch, std::size_t num_rows) {
  std::int64_t k = trim.attribute;
  if (trim.count.present()) {
    std::int32_t count;
    std::memcpy(&count, trim.count.at(shape.batch, batch), sizeof count);
    k = count;
  }
  KeptRanks kept{k, trim.around_median};
  if (k < 0 || kept.count(static_cast<std::int64_t>(num_rows)) < 1) kept.trim = -1;
  return kept;
}

void fill_nan(Type accumulator, std::int64_t columns, void* out) {
  if (accumulator == Type::kFloat64) {
    std::fill_n(static_cast<double*>(out), columns, std::numeric_limits<double>::quiet_NaN());
  } else {
    std::fill_n(static_cast<float*>(out), columns, std::numeric_limits<float>::quiet_NaN());
  }
}

// One tile of a reduction to a mean of what is kept; `reduce(kernels, rows, kept, out)` is the kernel to call.
template <typename Problem, typename Reduce>
void reduce_tile(const Problem& problem, const Tile& tile, Reduce reduce) {
  thread_local std::vector<void*> rows;
  const View& updates = problem.updates[tile.leaf];
  const View& reduced = problem.reduced[tile.leaf];
  gather_rows(updates, problem.trim.where, problem.shape, tile, &rows);
  const KeptRanks ranks = kept_of(problem.trim, problem.shape, tile.batch, rows.size());

  const Type accumulator = accumulator_of(updates.type);
  void* result = tile_data(reduced, problem.shape, tile);
  void* out = reduced.type == accumulator ? result : scratch();
  if (ranks.trim < 0) {
    fill_nan(accumulator, tile.columns, out);
  } else {
    reduce(order_statistic_kernels(updates.type), rows, ranks, static_cast<std::byte*>(out));
  }
  if (out != result) convert(accumulator, out, reduced.type, result, tile.columns);
}

void spread_tile(const SpreadProblem& problem, const Tile& tile) {
  thread_local std::vector<void*> rows;
  thread_local std::vector<void*> kept;
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[tile.leaf];
  const View& cotangents = problem.cotangents[tile.leaf];
  const View& spread = problem.spread[tile.leaf];
  gather_rows(updates, problem.trim.where, shape, tile, &rows);
  const KeptRanks ranks = kept_of(problem.trim, shape, tile.batch, rows.size());

  const std::int64_t bytes = tile.columns * bytes_of(spread.type);
  if (ranks.trim < 0 || rows.size() < static_cast<std::size_t>(shape.clients)) {
    // The kernel writes the rows of those who take part; the others' gradient is exactly 0.
    gather_rows(spread, View(), shape, tile, &kept);
    for (void* row : kept) std::memset(row, 0, bytes);
  }
  if (ranks.trim < 0) return;
  gather_rows(spread, problem.trim.where, shape, tile, &kept);
  const Type accumulator = accumulator_of(updates.type);
  const void* cotangent = tile_data(cotangents, shape, tile);
  if (cotangents.type != accumulator) {
    convert(cotangents.type, cotangent, accumulator, scratch(), tile.columns);
    cotangent = scratch();
  }
  order_statistic_kernels(updates.type).spread(rows.data(), cotangent, rows.size(), tile.columns, ranks, kept.data());
}

template <typename Problem>
std::int64_t cost_of(const Problem& problem) {
  return kPasses * stacked_bytes(problem.shape, problem.updates);
}

}  // namespace

Work cut(std::shared_ptr<const TrimmedMeanProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), cost_of(*problem), [problem](const Tile& tile) {
    reduce_tile(*problem, tile,
                [&](const OrderStatisticKernels& kernels, const std::vector<void*>& rows, KeptRanks ranks,
                    std::byte* out) { kernels.mean(rows.data(), rows.size(), tile.columns, ranks, out); });
  });
}

Work cut(std::shared_ptr<const SelectedMeanProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), cost_of(*problem), [problem](const Tile& tile) {
    thread_local std::vector<void*> values;
    gather_rows(problem->values[tile.leaf], problem->trim.where, problem->shape, tile, &values);
    reduce_tile(
        *problem, tile,
        [&](const OrderStatisticKernels& kernels, const std::vector<void*>& rows, KeptRanks ranks, std::byte* out) {
          kernels.selected_mean(rows.data(), values.data(), rows.size(), tile.columns, ranks, out);
        });
  });
}

Work cut(std::shared_ptr<const SpreadProblem> problem) {
  return cut_tiles(Tiles::balanced(problem->shape), cost_of(*problem),
                   [problem](const Tile& tile) { spread_tile(*problem, tile); });
}

}  // namespace fedfuse
