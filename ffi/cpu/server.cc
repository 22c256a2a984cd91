#include <cstring>
#include <limits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/tiles.h"

namespace fedfuse {
namespace {

template <typename Real>
Real load_real(const View& view, const Batch& batch, std::int64_t element) {
  const std::byte* const from = view.at(batch, element);
  return static_cast<Real>(view.type == Type::kFloat64 ? *reinterpret_cast<const double*>(from)
                                                       : *reinterpret_cast<const float*>(from));
}

// The least magnitude that rounds to infinity: half a unit in the last place past the largest number.
template <typename Real>
Real overflow_of(Type type) {
  if (type == Type::kBFloat16) return static_cast<Real>(0x1.FFp127);
  if (type == Type::kFloat16) return static_cast<Real>(65520);
  return std::numeric_limits<Real>::infinity();
}

// One tile's step, with parameters in the accumulators' type, in `params` where that is not their own.
template <typename Real>
ServerChunk<Real> chunk_of(const ServerUpdateProblem& problem, const Tile& tile, std::vector<Real>* params) {
  const Shape& shape = problem.shape;
  const auto data = [&](const std::vector<View>& views) {
    return reinterpret_cast<Real*>(tile_data(views[tile.leaf], shape, tile));
  };
  const auto rate = [&](const View& view) { return load_real<Real>(view, shape.batch, tile.batch); };
  ServerChunk<Real> chunk;
  chunk.rates = {rate(problem.learning_rate), rate(problem.b1), rate(problem.b2), rate(problem.tau)};
  chunk.delta = data(problem.mean.reduced);
  chunk.first = data(problem.old.first);
  chunk.second = data(problem.old.second);
  chunk.new_first = data(problem.updated.first);
  chunk.new_second = data(problem.updated.second);
  chunk.param = data(problem.old.params);
  chunk.new_param = data(problem.updated.params);
  chunk.columns = tile.columns;
  const Type accumulator = problem.old.first[tile.leaf].type;
  const Type type = problem.old.params[tile.leaf].type;
  chunk.overflow = overflow_of<Real>(type);
  if (type != accumulator) {
    params->resize(tile.columns);
    convert(type, chunk.param, accumulator, params->data(), tile.columns);
    chunk.param = chunk.new_param = params->data();
  }
  return chunk;
}

// Nothing is written before every tile has been judged: results may take the operands' place.
template <typename Real>
void judge_tile(const ServerUpdateProblem& problem, const Tile& tile) {
  thread_local std::vector<Real> params;
  std::int32_t* const accepted = problem.accepted + tile.batch;
  if (__atomic_load_n(accepted, __ATOMIC_RELAXED) == 0) return;
  const ServerChunk<Real> chunk = chunk_of(problem, tile, &params);
  const int rule = static_cast<int>(problem.rule);
  bool fine;
  if constexpr (sizeof(Real) == sizeof(double)) {
    fine = kernels().server_rules->judge_doubles[rule](chunk);
  } else {
    fine = kernels().server_rules->judge_floats[rule](chunk);
  }
  // In parallel all tiles write the same number, so they write it atomically.
  if (!fine) __atomic_store_n(accepted, 0, __ATOMIC_RELAXED);
}

void count_step(const ServerUpdateProblem& problem) {
  const Shape& shape = problem.shape;
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    bool somebody = false;
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      somebody = somebody || is_present(problem.mean.where, shape, batch, client);
    }
    if (!somebody) problem.accepted[batch] = 0;
    const auto* const old = reinterpret_cast<const std::int32_t*>(problem.old.step.at(shape.batch, batch));
    *reinterpret_cast<std::int32_t*>(problem.updated.step.at(shape.batch, batch)) =
        next_step(*old, problem.accepted[batch]);
  }
}

void keep(const View& old, const View& updated, const Shape& shape, const Tile& tile) {
  const std::byte* const from = tile_data(old, shape, tile);
  std::byte* const to = tile_data(updated, shape, tile);
  if (from != to) std::memcpy(to, from, tile.columns * bytes_of(old.type));
}

template <typename Real>
void step_tile(const ServerUpdateProblem& problem, const Tile& tile) {
  thread_local std::vector<Real> params;
  const ServerChunk<Real> chunk = chunk_of(problem, tile, &params);
  const int rule = static_cast<int>(problem.rule);
  if constexpr (sizeof(Real) == sizeof(double)) {
    kernels().server_rules->step_doubles[rule](chunk);
  } else {
    kernels().server_rules->step_floats[rule](chunk);
  }
  if (chunk.new_param == params.data()) {
    const View& out = problem.updated.params[tile.leaf];
    convert(problem.old.first[tile.leaf].type, params.data(), out.type, tile_data(out, problem.shape, tile),
            tile.columns);
  }
}

}  // namespace

Work cut(std::shared_ptr<const ServerUpdateProblem> problem) {
  const Tiles tiles = Tiles::balanced(problem->shape);
  std::fill_n(problem->accepted, problem->shape.batch.count, 1);

  Work work = cut(std::shared_ptr<const WeightedSumProblem>(problem, &problem->mean));
  work.run = [problem, tiles, average = std::move(work.run)](std::int64_t task) {
    average(task);
    const Tile tile = tiles[task];
    with_accumulator(problem->old.first[tile.leaf].type,
                     [&](auto zero) { judge_tile<decltype(zero)>(*problem, tile); });
  };
  work.finish = [problem] { count_step(*problem); };

  std::int64_t cost = 0;
  for (std::size_t leaf = 0; leaf < problem->old.params.size(); ++leaf) {
    const std::int64_t bytes = bytes_of(problem->old.params[leaf].type) + 2 * bytes_of(problem->old.first[leaf].type);
    cost += 2 * problem->shape.batch.count * problem->shape.coordinates[leaf] * bytes;
  }
  Work step = cut_tiles(Tiles::balanced(problem->shape), cost, [problem](const Tile& tile) {
    if (problem->accepted[tile.batch] == 0) {
      keep(problem->old.params[tile.leaf], problem->updated.params[tile.leaf], problem->shape, tile);
      keep(problem->old.first[tile.leaf], problem->updated.first[tile.leaf], problem->shape, tile);
      keep(problem->old.second[tile.leaf], problem->updated.second[tile.leaf], problem->shape, tile);
    } else {
      with_accumulator(problem->old.first[tile.leaf].type,
                       [&](auto zero) { step_tile<decltype(zero)>(*problem, tile); });
    }
  });
  work.next = std::make_shared<Work>(std::move(step));
  return work;
}

}  // namespace fedfuse
