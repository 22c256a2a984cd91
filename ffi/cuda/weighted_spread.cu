// weighted_spread: a thread holds a few adjacent cotangents and writes them, weighted, to one client after the other.
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

struct SpreadOptions {
  View weights;
  View where;
  Type cotangent_type;
};

template <Type type>
struct WeightedSpread {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Elements = Pack<Bits>;
  using Parameters = cuda::Parameters<2, SpreadOptions>;
  using Shared = Nothing;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kColumns = Elements::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared&, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const std::int64_t cotangent_bytes = bytes_of(p.options.cotangent_type);
    const std::byte* const cotangents = operand_data(p, tile, 0, 1, cotangent_bytes) + tile.begin * cotangent_bytes;
    Bits* const spread = reinterpret_cast<Bits*>(operand_data(p, tile, 1, p.clients, sizeof(Bits))) + tile.begin;
    const bool aligned = is_aligned(spread, kPackBytes) && coordinates % kColumns == 0;
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    const std::byte* const weights = p.options.weights.at(p.batch, tile.batch);

    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t column = thread * kColumns;
      const std::int64_t columns = tile.columns - column;
      if (columns <= 0) return;
      Accumulator values[kColumns];
      for (int i = 0; i < kColumns; ++i) {
        values[i] = i < columns ? load_as<Accumulator>(p.options.cotangent_type, cotangents, column + i) : 0;
      }
      for (std::int64_t client = 0; client < p.clients; ++client) {
        const bool is_present = where == nullptr || where[client] != 0;
        const Accumulator weight = load_as<Accumulator>(p.options.weights.type, weights, client);
        Elements elements;
        // Selected, not multiplied by zero: the gradient of an absent client is 0 even where the cotangent is NaN.
        for (int i = 0; i < kColumns; ++i) {
          elements.elements[i] = is_present ? Element<type>::narrow(weight * values[i]) : Bits{0};
        }
        elements.store(spread + client * coordinates + column, aligned, columns);
      }
    });
  }
};

}  // namespace

std::string enqueue(const WeightedSpreadProblem& problem, Stream stream) {
  return for_each_type([&](auto type) {
    using Body = WeightedSpread<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.weights = problem.weights;
    p.options.where = problem.where;
    return for_each_type([&](auto cotangent_type) {
      p.options.cotangent_type = cotangent_type;
      return for_each_table(
          problem.shape, {&problem.cotangents, &problem.spread}, Body::kTileColumns, 1, &p,
          [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
          [&](std::size_t leaf) {
            return problem.spread[leaf].type == type && problem.cotangents[leaf].type == cotangent_type;
          });
    });
  });
}

}  // namespace cuda
}  // namespace fedfuse
