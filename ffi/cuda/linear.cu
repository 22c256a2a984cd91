// weighted_sum and weighted_mean: a thread sums a few adjacent columns over the clients, in their order.
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

struct SumOptions {
  View weights;
  View where;
  Type reduced_type;
  bool divide;
};

template <Type type>
struct WeightedSum {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Elements = Pack<Bits>;
  using Sums = Pack<Accumulator>;
  using Parameters = cuda::Parameters<2, SumOptions>;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kColumns = Elements::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;
  static constexpr int kRowsInFlight = 4;

  struct Shared {
    PresentClients<kThreads> present;
    // Of those who take part, in order.
    int clients[kThreads];
    Accumulator weights[kThreads];
  };

  struct State {
    Accumulator sums[kColumns] = {};
    Accumulator total_weight = 0;
  };

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared& shared, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const Bits* const updates =
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin;
    const bool aligned = is_aligned(updates, kPackBytes) && coordinates % kColumns == 0;
    const std::uint8_t* const where = where_of(p.options.where, p.batch, tile.batch);
    const std::byte* const weights = p.options.weights.at(p.batch, tile.batch);

    Team<kThreads, State> team;
    for (std::int64_t first = 0; first < p.clients; first += kThreads) {
      shared.present.find(where, first, p.clients, team);
      team.each([&](int thread, State&) {
        if (!shared.present.has(thread)) return;
        const int position = shared.present.count_before(thread);
        shared.clients[position] = thread;
        shared.weights[position] = load_as<Accumulator>(p.options.weights.type, weights, first + thread);
      });
      team.each([&](int thread, State& state) {
        const std::int64_t column = thread * kColumns;
        add_rows(shared, updates + first * coordinates + column, coordinates, aligned, tile.columns - column, &state);
      });
    }

    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    std::byte* const reduced = operand_data(p, tile, 1, 1, reduced_bytes) + tile.begin * reduced_bytes;
    team.each([&](int thread, State& state) {
      const std::int64_t column = thread * kColumns;
      for (int i = 0; p.options.divide && i < kColumns; ++i) state.sums[i] /= state.total_weight;
      store(state.sums, p.options.reduced_type, tile.columns - column, reduced + column * reduced_bytes);
    });
  }

  // Adds the rows of those who take part, `columns` of each.
  static FEDFUSE_DEVICE void add_rows(const Shared& shared, const Bits* rows, std::int64_t stride, bool aligned,
                                      std::int64_t columns, State* state) {
    const int count = shared.present.count_before(kThreads);
    if (columns <= 0) return;
    const auto add = [&](Accumulator weight, const Elements& elements) {
      for (int i = 0; i < kColumns; ++i) state->sums[i] += weight * Element<type>::widen(elements.elements[i]);
      state->total_weight += weight;
    };
    int row = 0;
    for (; row + kRowsInFlight <= count; row += kRowsInFlight) {
      Elements elements[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        elements[i] = Elements::load(rows + shared.clients[row + i] * stride, aligned, columns);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) add(shared.weights[row + i], elements[i]);
    }
#pragma unroll 1
    for (; row < count; ++row) {
      add(shared.weights[row], Elements::load(rows + shared.clients[row] * stride, aligned, columns));
    }
  }

  static FEDFUSE_DEVICE void store(const Accumulator* sums, Type to_type, std::int64_t columns, std::byte* to) {
    if (to_type != accumulator_of(type)) {
      for (int i = 0; i < kColumns; ++i) {
        if (i < columns) store_as(to_type, sums[i], to, i);
      }
      return;
    }
    for (int i = 0; i < kColumns; i += Sums::kSize) {
      Sums pack;
      for (int j = 0; j < Sums::kSize; ++j) pack.elements[j] = sums[i + j];
      pack.store(reinterpret_cast<Accumulator*>(to) + i, is_aligned(to, kPackBytes), columns - i);
    }
  }
};

}  // namespace

std::string enqueue(const WeightedSumProblem& problem, Stream stream) {
  return for_each_type([&](auto type) {
    using Body = WeightedSum<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.weights = problem.weights;
    p.options.where = problem.where;
    p.options.divide = problem.divide;
    // Leaves may differ in the type of their results as well.
    return for_each_type([&](auto reduced_type) {
      p.options.reduced_type = reduced_type;
      return for_each_table(
          problem.shape, {&problem.updates, &problem.reduced}, Body::kTileColumns, 1, &p,
          [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
          [&](std::size_t leaf) {
            return problem.updates[leaf].type == type && problem.reduced[leaf].type == reduced_type;
          });
    });
  });
}

}  // namespace cuda
}  // namespace fedfuse
