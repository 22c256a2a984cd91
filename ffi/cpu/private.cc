#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/squares.h"
#include "cpu/tiles.h"
#include "math/blocks.h"

namespace fedfuse {
namespace {

double load_real(const View& view, const Batch& batch, std::int64_t element, std::int64_t index) {
  const std::byte* const from = view.at(batch, element);
  return view.type == Type::kFloat64 ? reinterpret_cast<const double*>(from)[index]
                                     : reinterpret_cast<const float*>(from)[index];
}

void store_real(const View& view, const Batch& batch, std::int64_t element, std::int64_t index, double value) {
  std::byte* const to = view.at(batch, element);
  if (view.type == Type::kFloat64) {
    reinterpret_cast<double*>(to)[index] = value;
  } else {
    reinterpret_cast<float*>(to)[index] = static_cast<float>(value);
  }
}

// ---- Norms ----------------------------------------------------------------------------------------------------------

// Squares that leave the range of float64 are taken of numbers scaled by a power of two.
ScaledSum sum_scaled_squares(const double* row, std::int64_t columns) {
  double largest = 0;
  for (std::int64_t column = 0; column < columns; ++column) largest = std::fmax(largest, std::fabs(row[column]));
  if (largest == 0 || std::isinf(largest)) return {largest, 0};
  const int exponent = std::ilogb(largest);
  double sum = 0;
  for (std::int64_t column = 0; column < columns; ++column) {
    const double scaled = std::ldexp(row[column], -exponent);
    sum += scaled * scaled;
  }
  return {sum, static_cast<double>(exponent)};
}

void norm_tile(const ClientNormsProblem& problem, const Tile& tile) {
  const Shape& shape = problem.shape;
  const View& updates = problem.updates[tile.leaf];
  const std::int64_t num_blocks = problem.first_block.back();
  ScaledSum* partial = problem.partials + tile.batch * shape.clients * num_blocks + problem.first_block[tile.leaf] +
                       tile.begin / kReductionBlock;
  for_each_square(updates, problem.where, shape, tile, [&](const void* row, double sum) {
    *partial = {sum, 0};
    if (row != nullptr && updates.type == Type::kFloat64 && !is_safe_sum_of_squares(sum) && !std::isnan(sum)) {
      *partial = sum_scaled_squares(static_cast<const double*>(row), tile.columns);
    }
    partial += num_blocks;
  });
}

// Adds a client's partial sums, block after block.
ScaledSum add_partials(const ClientNormsProblem& problem, std::int64_t batch, std::int64_t client) {
  const std::int64_t num_blocks = problem.first_block.back();
  const ScaledSum* partial = problem.partials + (batch * problem.shape.clients + client) * num_blocks;
  ScaledSum sum = {0, 0};
  for (std::int64_t block = 0; block < num_blocks; ++block) sum = add(sum, partial[block]);
  return sum;
}

// Calls use(batch, client, squared norm) for all of them.
template <typename Use>
void for_each_norm(const ClientNormsProblem& problem, Use use) {
  for (std::int64_t batch = 0; batch < problem.shape.batch.count; ++batch) {
    for (std::int64_t client = 0; client < problem.shape.clients; ++client) {
      const ScaledSum squares = add_partials(problem, batch, client);
      store_real(problem.norms, problem.shape.batch, batch, client, norm_of(squares));
      use(batch, client, squares);
    }
  }
}

Work cut_norms(std::shared_ptr<const ClientNormsProblem> problem, std::function<void()> finish) {
  const std::int64_t cost = stacked_bytes(problem->shape, problem->updates);
  Work work = cut_tiles(Tiles(problem->shape, kReductionBlock), cost,
                        [problem](const Tile& tile) { norm_tile(*problem, tile); });
  work.finish = std::move(finish);
  return work;
}

// ---- Sums -----------------------------------------------------------------------------------------------------------

void find_factors(const PrivateSumProblem& problem) {
  const Shape& shape = problem.shape;
  for_each_norm(problem.norms, [&](std::int64_t batch, std::int64_t client, ScaledSum squares) {
    const double bound = load_real(problem.max_norm, shape.batch, batch, 0);
    // Whether it counts is seen by the norm as it is returned, which is what derivatives and other devices see.
    const bool counts = std::isfinite(load_real(problem.norms.norms, shape.batch, batch, client));
    problem.factors[batch * shape.clients + client] =
        counts ? clip_factor(std::sqrt(squares.sum), squares.exponent, bound) : ClipFactor{0, 0, 0};
  });
}

void take_given_norms(const PrivateSumProblem& problem) {
  const Shape& shape = problem.shape;
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    const double bound = load_real(problem.max_norm, shape.batch, batch, 0);
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      const double norm = load_real(problem.given_norms, shape.batch, batch, client);
      store_real(problem.norms.norms, shape.batch, batch, client, norm);
      problem.factors[batch * shape.clients + client] = clip_factor(norm, 0, bound);
    }
  }
}

// The rows that are added up, and what each is multiplied by.
template <typename Accumulator>
struct Terms {
  std::vector<const void*> rows;
  std::vector<Accumulator> weights;
  std::vector<Accumulator> scales;  // what rows are multiplied by first, powers of two
  std::vector<Accumulator> scaled;
  bool is_scaled;  // any of them by another than 1

  void gather(const PrivateSumProblem& problem, const Tile& tile) {
    const Shape& shape = problem.shape;
    const View& updates = problem.updates[tile.leaf];
    const std::int64_t stride = shape.coordinates[tile.leaf] * bytes_of(updates.type);
    const std::byte* row = tile_data(updates, shape, tile);
    rows.clear();
    weights.clear();
    scales.clear();
    is_scaled = false;
    for (std::int64_t client = 0; client < shape.clients; ++client, row += stride) {
      if (!is_present(problem.where, shape, tile.batch, client)) continue;
      ClipFactor clip = {1, 0, 1};
      if (problem.max_norm.present()) clip = problem.factors[tile.batch * shape.clients + client];
      if (clip.kept == 0) continue;
      const double weight = load_real(problem.weights, shape.batch, tile.batch, client);
      const ClippedWeight<Accumulator> clipped = clipped_weight<Accumulator>(weight, clip);
      rows.push_back(row);
      weights.push_back(clipped.weight);
      scales.push_back(clipped.scale);
      is_scaled = is_scaled || clipped.scale != 1;
    }
  }

  // sums[c] = the sum over the rows of weight * (scale * row[c]).
  void add_up(Type type, std::int64_t columns, Accumulator* sums) {
    if (!is_scaled) {
      linear_kernels(type).weighted_sum(rows.data(), weights.data(), rows.size(), columns, nullptr, sums);
      return;
    }
    // Copies, in the accumulator's type: a low-precision one has no room for what is scaled. A few columns at a time.
    const LinearKernels& kernels = linear_kernels(accumulator_of(type));
    const std::int64_t bytes = bytes_of(type), width = std::min(columns, kScaledColumns);
    std::vector<const void*> copies(rows.size());
    scaled.resize(rows.size() * width);
    for (std::int64_t first = 0; first < columns; first += width) {
      const std::int64_t count = std::min(width, columns - first);
      for (std::size_t row = 0; row < rows.size(); ++row) {
        Accumulator* const copy = scaled.data() + row * width;
        convert(type, static_cast<const std::byte*>(rows[row]) + first * bytes, accumulator_of(type), copy, count);
        kernels.scale(copy, &scales[row], count, copy);
        copies[row] = copy;
      }
      kernels.weighted_sum(copies.data(), weights.data(), copies.size(), count, nullptr, sums + first);
    }
  }

 private:
  static constexpr std::int64_t kScaledColumns = 512;
};

void add_noise(const NoiseKernels& kernels, const std::uint32_t* key, std::uint64_t counter, double stddev,
               std::int64_t columns, float* sums) {
  kernels.add_to_floats(key[0], key[1], counter, static_cast<float>(stddev), columns, sums);
}

void add_noise(const NoiseKernels& kernels, const std::uint32_t* key, std::uint64_t counter, double stddev,
               std::int64_t columns, double* sums) {
  kernels.add_to_doubles(key[0], key[1], counter, stddev, columns, sums);
}

// Noise for a tile of a leaf, or of this device's block of it: run by run of coordinates that are neighbours there.
template <typename Accumulator>
void add_noise(const PrivateSumProblem& problem, const Tile& tile, Accumulator* sums) {
  const Noise& noise = problem.noise;
  const Batch& batch = problem.shape.batch;
  const double stddev = load_real(noise.stddev, batch, tile.batch, 0);
  if (stddev == 0) return;
  const NoiseKernels& kernels = *fedfuse::kernels().noise;
  const std::uint32_t* const key =
      reinterpret_cast<const std::uint32_t*>(noise.keys.at(batch, tile.batch)) + 2 * tile.leaf;
  if (!noise.blocks.present()) return add_noise(kernels, key, tile.begin, stddev, tile.columns, sums);
  const BlockLevel* const levels =
      reinterpret_cast<const BlockLevel*>(noise.blocks.at(batch, tile.batch)) + tile.leaf * noise.levels;
  const std::int64_t run = levels[noise.levels - 1].own;
  for (std::int64_t column = 0; column < tile.columns;) {
    const std::int64_t index = tile.begin + column;
    const std::int64_t columns = std::min(tile.columns - column, run - index % run);
    add_noise(kernels, key, index_in_leaf(levels, noise.levels, index), stddev, columns, sums + column);
    column += columns;
  }
}

template <typename Accumulator>
void sum_tile(const PrivateSumProblem& problem, const Tile& tile) {
  thread_local Terms<Accumulator> terms;
  terms.gather(problem, tile);
  Accumulator* const sums = reinterpret_cast<Accumulator*>(tile_data(problem.reduced[tile.leaf], problem.shape, tile));
  terms.add_up(problem.updates[tile.leaf].type, tile.columns, sums);
  if (problem.noise.keys.present()) add_noise(problem, tile, sums);
}

Work cut_sums(std::shared_ptr<const PrivateSumProblem> problem) {
  const std::int64_t cost = stacked_bytes(problem->shape, problem->updates);
  return cut_tiles(Tiles::balanced(problem->shape), cost, [problem](const Tile& tile) {
    with_accumulator(problem->updates[tile.leaf].type, [&](auto zero) { sum_tile<decltype(zero)>(*problem, tile); });
  });
}

}  // namespace

Work cut(std::shared_ptr<const ClientNormsProblem> problem) {
  return cut_norms(problem, [problem] { for_each_norm(*problem, [](std::int64_t, std::int64_t, ScaledSum) {}); });
}

Work cut(std::shared_ptr<const PrivateSumProblem> problem) {
  if (const std::string error = check_blocks(*problem); !error.empty()) throw std::invalid_argument(error);
  Work sums = cut_sums(problem);
  if (!problem->max_norm.present()) return sums;
  if (problem->given_norms.present()) {
    take_given_norms(*problem);
    return sums;
  }
  Work work = cut_norms({problem, &problem->norms}, [problem] { find_factors(*problem); });
  work.next = std::make_shared<Work>(std::move(sums));
  return work;
}

}  // namespace fedfuse
