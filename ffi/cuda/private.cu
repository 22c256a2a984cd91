// client_norms, and sums that are clipped, noisy, or both: a pass that finds the norms, and one that adds up.
#include "contract/private.h"
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"
#include "cuda/reductions.h"
#include "math/blocks.h"
#include "math/normal.h"
#include "math/threefry.h"

namespace fedfuse {
namespace cuda {
namespace {

// ---- Norms ----------------------------------------------------------------------------------------------------------

struct NormOptions {
  View where;
  std::int64_t num_blocks;
};

// The sum of squares of one client over one block of coordinates. The second operand is where a leaf's partial sums
// are.
template <Type type>
struct PartialNorm {
  using Bits = typename Element<type>::Bits;
  using Elements = Pack<Bits>;
  using Parameters = cuda::Parameters<2, NormOptions>;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = kReductionThreads;
  static constexpr int kBlocks = 4;
  static constexpr int kColumns = Elements::kSize;
  static constexpr int kTileColumns = kReductionBlock;

  using Shared = Reduction<double, kThreads>;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared& shared, std::int64_t task) {
    const ClientTile at = locate_client(p, task, kTileColumns);
    const Tile& tile = at.tile;
    const Bits* const updates = reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) +
                                at.client * p.leaves[tile.leaf].coordinates + tile.begin;
    const bool aligned = is_aligned(updates, kPackBytes);
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    const bool present = where == nullptr || where[at.client] != 0;
    // Calls use(value) for every coordinate of a thread; those behind the end are 0.
    const auto each_value = [&](int thread, auto use) {
      if (!present) return;
#pragma unroll 4
      for (std::int64_t column = thread * kColumns; column < tile.columns; column += kThreads * kColumns) {
        const Elements elements = Elements::load(updates + column, aligned, tile.columns - column);
        for (int i = 0; i < kColumns; ++i) use(static_cast<double>(Element<type>::widen(elements.elements[i])));
      }
    };

    Team<kThreads> team;
    const double plain = add_up(shared, team, [&](int thread, Nothing&) {
      double sum = 0;
      each_value(thread, [&](double value) { sum += value * value; });
      return sum;
    });
    ScaledSum result = {plain, 0};
    if constexpr (type == Type::kFloat64) {
      // Squares that left the range are taken again, of numbers scaled by a power of two. All threads agree on that.
      if (!is_safe_sum_of_squares(plain) && plain == plain) result = scaled(shared, team, each_value);
    }
    ScaledSum* const partials = reinterpret_cast<ScaledSum*>(p.leaves[tile.leaf].data[1]);
    team.each([&](int thread, Nothing&) {
      if (thread != 0) return;
      partials[(tile.batch * p.clients + at.client) * p.options.num_blocks + tile.begin / kReductionBlock] = result;
    });
  }

  template <typename Threads, typename EachValue>
  static FEDFUSE_DEVICE ScaledSum scaled(Shared& shared, Threads& team, EachValue each_value) {
    const auto largest_of = [&](int thread, Nothing&) {
      double largest = 0;
      each_value(thread, [&](double value) { largest = fmax(largest, fabs(value)); });
      return largest;
    };
    const double largest = reduce(shared, team, largest_of, [](double a, double b) { return fmax(a, b); });
    if (largest == 0 || largest - largest != 0) return {largest, 0};
    const int exponent = ilogb(largest);
    const double sum = add_up(shared, team, [&](int thread, Nothing&) {
      double squares = 0;
      each_value(thread, [&](double value) {
        const double small = ldexp(value, -exponent);
        squares += small * small;
      });
      return squares;
    });
    return {sum, static_cast<double>(exponent)};
  }
};

// Adds the partial sums of one client; where clients are clipped, finds its factor.
struct FindNorms {
  struct Parameters {
    Batch batch;
    std::int64_t clients;
    std::int64_t work;
    std::int64_t num_blocks;
    const ScaledSum* partials;
    View given;  // norms that are known, or not present
    View norms;
    View max_norm;  // or not present: no factors
    ClipFactor* factors;
  };

  static constexpr int kThreads = kReductionThreads;

  using Shared = Reduction<ScaledSum, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const std::int64_t batch = task / p.clients;
    const std::int64_t client = task - batch * p.clients;
    const bool is_given = p.given.type != Type::kOther;
    Team<kThreads> team;
    const auto add_blocks = [&](int thread, Nothing&) {
      ScaledSum sum = {0, 0};
      for (std::int64_t block = thread; !is_given && block < p.num_blocks; block += kThreads) {
        sum = add(sum, p.partials[task * p.num_blocks + block]);
      }
      return sum;
    };
    const ScaledSum squares = reduce(shared, team, add_blocks, [](ScaledSum a, ScaledSum b) { return add(a, b); });
    team.each([&](int thread, Nothing&) {
      if (thread != 0) return;
      const double given = is_given ? load_as<double>(p.given.type, p.given.at(p.batch, batch), client) : 0;
      store_as(p.norms.type, is_given ? given : norm_of(squares), p.norms.at(p.batch, batch), client);
      if (p.max_norm.type == Type::kOther) return;
      const double bound = load_as<double>(p.max_norm.type, p.max_norm.at(p.batch, batch), 0);
      // Whether it counts is seen by the norm as it is returned, which is what derivatives and other devices see.
      const double norm = load_as<double>(p.norms.type, p.norms.at(p.batch, batch), client);
      p.factors[task] = !(norm - norm == 0)
                            ? ClipFactor{0, 0, 0}
                            : clip_factor(is_given ? given : sqrt(squares.sum), is_given ? 0 : squares.exponent, bound);
    });
  }
};

std::string enqueue_partials(const ClientNormsProblem& problem, Stream stream) {
  std::vector<View> partials(problem.shape.coordinates.size());
  for (std::size_t leaf = 0; leaf < partials.size(); ++leaf) {
    partials[leaf].data = reinterpret_cast<std::byte*>(problem.partials + problem.first_block[leaf]);
  }
  return for_each_type([&](auto type) {
    using Body = PartialNorm<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.where = problem.where;
    p.options.num_blocks = problem.first_block.back();
    return for_each_table(
        problem.shape, {&problem.updates, &partials}, Body::kTileColumns, problem.shape.clients, &p,
        [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.updates[leaf].type == type; });
  });
}

FindNorms::Parameters find_norms(const ClientNormsProblem& problem) {
  FindNorms::Parameters p{};
  p.batch = problem.shape.batch;
  p.clients = problem.shape.clients;
  p.work = problem.shape.batch.count * problem.shape.clients;
  p.num_blocks = problem.first_block.back();
  p.partials = problem.partials;
  p.norms = problem.norms;
  return p;
}

// ---- Sums -----------------------------------------------------------------------------------------------------------

struct Lane {
  using Float = float;
  using Word = std::uint32_t;
  static FEDFUSE_DEVICE float to_float(std::uint32_t x) { return static_cast<float>(x); }
  static FEDFUSE_DEVICE float root(float x) { return sqrtf(x); }
  static FEDFUSE_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
  static FEDFUSE_DEVICE bool any(bool mask) { return mask; }
};

struct PrivateOptions {
  View weights;
  View where;
  View stddev;  // or not present: no noise
  View keys;    // for the batch; the third operand is where a leaf's are
  View blocks;  // likewise, the fourth; or not present
  int levels;
  const ClipFactor* factors;  // (batch, clients), or null
};

// A thread sums a few adjacent columns over the clients, in their order, and adds their noise.
template <Type type>
struct PrivateSum {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Elements = Pack<Bits>;
  using Sums = Pack<Accumulator>;
  using Parameters = cuda::Parameters<4, PrivateOptions>;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kColumns = Elements::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;
  static constexpr int kRowsInFlight = 4;

  struct Shared {
    PresentClients<kThreads> present;
    // Of those who count, in order; rows are multiplied by a power of two first, mostly 1.
    int clients[kThreads];
    Accumulator scales[kThreads];
    Accumulator weights[kThreads];
  };

  struct State {
    Accumulator sums[kColumns] = {};
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const Bits* const updates =
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin;
    const bool aligned = is_aligned(updates, kPackBytes) && coordinates % kColumns == 0;
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    const std::byte* const weights = p.options.weights.at(p.batch, tile.batch);
    const ClipFactor* const factors =
        p.options.factors == nullptr ? nullptr : p.options.factors + tile.batch * p.clients;
    const auto counts = [=](std::int64_t client) {
      return (where == nullptr || where[client] != 0) && (factors == nullptr || factors[client].kept != 0);
    };

    Team<kThreads, State> team;
    for (std::int64_t first = 0; first < p.clients; first += kThreads) {
      shared.present.find_if(counts, first, p.clients, team);
      team.each([&](int thread, State&) {
        if (!shared.present.has(thread)) return;
        const int position = shared.present.count_before(thread);
        const double weight = load_as<double>(p.options.weights.type, weights, first + thread);
        const ClipFactor factor = factors == nullptr ? ClipFactor{1, 0, 1} : factors[first + thread];
        const ClippedWeight<Accumulator> clipped = clipped_weight<Accumulator>(weight, factor);
        shared.clients[position] = thread;
        shared.scales[position] = clipped.scale;
        shared.weights[position] = clipped.weight;
      });
      team.each([&](int thread, State& state) {
        const std::int64_t column = thread * kColumns;
        add_rows(shared, updates + first * coordinates + column, coordinates, aligned, tile.columns - column, &state);
      });
    }
    Accumulator* const reduced =
        reinterpret_cast<Accumulator*>(operand_data(p, tile, 1, 1, sizeof(Accumulator))) + tile.begin;
    team.each([&](int thread, State& state) {
      const std::int64_t column = thread * kColumns;
      if (column >= tile.columns) return;
      add_noise(p, tile, column, &state);
      for (int i = 0; i < kColumns; i += Sums::kSize) {
        Sums pack;
        for (int j = 0; j < Sums::kSize; ++j) pack.elements[j] = state.sums[i + j];
        pack.store(reduced + column + i, is_aligned(reduced, kPackBytes), tile.columns - column - i);
      }
    });
  }

  // Adds the rows of those who count, `columns` of each.
  static FEDFUSE_DEVICE void add_rows(const Shared& shared, const Bits* rows, std::int64_t stride, bool aligned,
                                      std::int64_t columns, State* state) {
    const int count = shared.present.count_before(kThreads);
    if (columns <= 0) return;
    const auto add_row = [&](int row, const Elements& elements) {
      const Accumulator scale = shared.scales[row], weight = shared.weights[row];
      for (int i = 0; i < kColumns; ++i) {
        state->sums[i] += weight * (scale * Element<type>::widen(elements.elements[i]));
      }
    };
    int row = 0;
    for (; row + kRowsInFlight <= count; row += kRowsInFlight) {
      Elements elements[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        elements[i] = Elements::load(rows + shared.clients[row + i] * stride, aligned, columns);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) add_row(row + i, elements[i]);
    }
#pragma unroll 1
    for (; row < count; ++row) {
      add_row(row, Elements::load(rows + shared.clients[row] * stride, aligned, columns));
    }
  }

  static FEDFUSE_DEVICE void add_noise(const Parameters& p, const Tile& tile, std::int64_t column, State* state) {
    const PrivateOptions& options = p.options;
    if (options.stddev.type == Type::kOther) return;
    const Accumulator stddev = load_as<Accumulator>(options.stddev.type, options.stddev.at(p.batch, tile.batch), 0);
    if (stddev == 0) return;
    const auto& leaf = p.leaves[tile.leaf];
    const auto* const words = reinterpret_cast<const std::uint32_t*>(
        leaf.data[2] + (options.keys.at(p.batch, tile.batch) - options.keys.data));
    const ThreefryKey key = ThreefryKey::from(words[0], words[1]);
    const bool is_whole = options.blocks.type == Type::kOther;
    const BlockLevel* levels = nullptr;
    if (!is_whole) {
      levels = reinterpret_cast<const BlockLevel*>(leaf.data[3] +
                                                   (options.blocks.at(p.batch, tile.batch) - options.blocks.data));
    }
#pragma unroll 1
    for (int i = 0; i < kColumns; ++i) {
      std::uint64_t index = static_cast<std::uint64_t>(tile.begin + column + i);
      if (!is_whole) index = index_in_leaf(levels, options.levels, index);
      const std::uint32_t bits =
          threefry_bits<std::uint32_t>(key, static_cast<std::uint32_t>(index >> 32), static_cast<std::uint32_t>(index));
      add_to(state->sums, i, stddev * static_cast<Accumulator>(normal_from_bits<Lane>(bits)));
    }
  }

  // With a constant index for every register: an array indexed by a variable would lie in memory.
  static FEDFUSE_DEVICE void add_to(Accumulator (&sums)[kColumns], int index, Accumulator value) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += i == index ? value : Accumulator{0};
  }
};

}  // namespace

std::string enqueue(const ClientNormsProblem& problem, Stream stream) {
  if (std::string error = enqueue_partials(problem, stream); !error.empty()) return error;
  return launch<FindNorms>(find_norms(problem), stream);
}

std::string enqueue(const PrivateSumProblem& problem, Stream stream) {
  const Shape& shape = problem.shape;
  if (problem.max_norm.present()) {
    FindNorms::Parameters p = find_norms(problem.norms);
    p.given = problem.given_norms;
    p.max_norm = problem.max_norm;
    p.factors = problem.factors;
    std::string error = problem.given_norms.present() ? "" : enqueue_partials(problem.norms, stream);
    if (error.empty()) error = launch<FindNorms>(p, stream);
    if (!error.empty()) return error;
  }
  const Noise& noise = problem.noise;
  std::vector<View> keys(shape.coordinates.size()), blocks(shape.coordinates.size());
  for (std::size_t leaf = 0; noise.keys.present() && leaf < keys.size(); ++leaf) {
    keys[leaf].data = noise.keys.data + leaf * 2 * sizeof(std::uint32_t);
    if (noise.blocks.present()) blocks[leaf].data = noise.blocks.data + leaf * noise.levels * sizeof(BlockLevel);
  }
  return for_each_type([&](auto type) {
    using Body = PrivateSum<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.weights = problem.weights;
    p.options.where = problem.where;
    p.options.stddev = noise.stddev;
    p.options.keys = noise.keys;
    p.options.blocks = noise.blocks;
    p.options.levels = noise.levels;
    p.options.factors = problem.max_norm.present() ? problem.factors : nullptr;
    return for_each_table(
        shape, {&problem.updates, &problem.reduced, &keys, &blocks}, Body::kTileColumns, 1, &p,
        [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.updates[leaf].type == type; });
  });
}

}  // namespace cuda
}  // namespace fedfuse
