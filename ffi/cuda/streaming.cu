// accumulate_weighted and stack_clients.
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

struct AccumulateOptions {
  View weight;
};

template <Type type>
struct Accumulate {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Elements = Pack<Bits>;
  using Sums = Pack<Accumulator>;
  using Parameters = cuda::Parameters<3, AccumulateOptions>;
  using Shared = Nothing;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = 256;
  static constexpr int kColumns = Elements::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared&, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const auto accumulators = [&](int operand) {
      return reinterpret_cast<Accumulator*>(operand_data(p, tile, operand, 1, sizeof(Accumulator))) + tile.begin;
    };
    const Accumulator* const total = accumulators(0);
    const Bits* const update = reinterpret_cast<const Bits*>(operand_data(p, tile, 1, 1, sizeof(Bits))) + tile.begin;
    Accumulator* const result = accumulators(2);  // may be total
    const bool update_aligned = is_aligned(update, kPackBytes);
    const bool sums_aligned = is_aligned(total, kPackBytes) && is_aligned(result, kPackBytes);
    const Accumulator weight = load_as<Accumulator>(p.options.weight.type, p.options.weight.at(p.batch, tile.batch), 0);

    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t column = thread * kColumns;
      const std::int64_t columns = tile.columns - column;
      if (columns <= 0) return;
      const Elements elements = Elements::load(update + column, update_aligned, columns);
      for (int i = 0; i < kColumns; i += Sums::kSize) {
        Sums sums = Sums::load(total + column + i, sums_aligned, columns - i);
        for (int j = 0; j < Sums::kSize; ++j) {
          sums.elements[j] += weight * Element<type>::widen(elements.elements[i + j]);
        }
        sums.store(result + column + i, sums_aligned, columns - i);
      }
    });
  }
};

// Copies elements of so many bytes, whatever they mean. The table has an entry for each client and leaf.
template <typename Bits>
struct Stack {
  using Parameters = cuda::Parameters<2, Nothing>;
  using Shared = Nothing;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = 256;
  static constexpr int kPacks = 4;  // a thread's
  static constexpr int kTileColumns = kThreads * kPacks * Pack<Bits>::kSize;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared&, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const Bits* const from = reinterpret_cast<const Bits*>(operand_data(p, tile, 0, 1, sizeof(Bits))) + tile.begin;
    Bits* const to = reinterpret_cast<Bits*>(operand_data(p, tile, 1, p.clients, sizeof(Bits))) + tile.begin;
    const bool aligned = is_aligned(from, kPackBytes) && is_aligned(to, kPackBytes);
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      if (aligned && tile.columns == kTileColumns) {
        Pack<Bits> packs[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          packs[i] = Pack<Bits>::load(from + (i * kThreads + thread) * Pack<Bits>::kSize, true, kTileColumns);
        }
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          packs[i].store(to + (i * kThreads + thread) * Pack<Bits>::kSize, true, kTileColumns);
        }
      } else {
#pragma unroll 4
        for (std::int64_t column = thread; column < tile.columns; column += kThreads) to[column] = from[column];
      }
    });
  }
};

template <typename Bits>
std::string enqueue_stack(const StackProblem& problem, Stream stream) {
  using Body = Stack<Bits>;
  const Shape& shape = problem.shape;
  typename Body::Parameters p{};
  p.batch = shape.batch;
  p.clients = shape.clients;
  const auto flush = [&] {
    p.work = shape.batch.count * p.tiles;
    const std::string error = launch<Body>(p, stream);
    p.num_leaves = 0;
    p.tiles = 0;
    return error;
  };
  for (std::size_t leaf = 0; leaf < shape.coordinates.size(); ++leaf) {
    const std::int64_t row_bytes = shape.coordinates[leaf] * static_cast<std::int64_t>(sizeof(Bits));
    if (bytes_of(problem.stacked[leaf].type) != sizeof(Bits) || row_bytes == 0) continue;
    for (std::int64_t client = 0; client < shape.clients; ++client) {
      View row = problem.stacked[leaf];
      row.data += client * row_bytes;
      const std::array<View, 2> operands = {problem.clients[client][leaf], row};
      if (add_leaf(operands, shape.coordinates[leaf], Body::kTileColumns, &p)) continue;
      if (std::string error = flush(); !error.empty()) return error;
      add_leaf(operands, shape.coordinates[leaf], Body::kTileColumns, &p);
    }
  }
  return flush();
}

}  // namespace

std::string enqueue(const AccumulateProblem& problem, Stream stream) {
  return for_each_type([&](auto type) {
    using Body = Accumulate<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.weight = problem.weight;
    return for_each_table(
        problem.shape, {&problem.total, &problem.update, &problem.result}, Body::kTileColumns, 1, &p,
        [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.update[leaf].type == type; });
  });
}

std::string enqueue(const StackProblem& problem, Stream stream) {
  std::string error = enqueue_stack<std::int16_t>(problem, stream);
  if (error.empty()) error = enqueue_stack<std::int32_t>(problem, stream);
  if (error.empty()) error = enqueue_stack<std::int64_t>(problem, stream);
  return error;
}

}  // namespace cuda
}  // namespace fedfuse
