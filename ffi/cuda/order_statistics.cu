// coordinate_median, trimmed_mean and their derivatives: which kernel is to run, and those for many clients.
#include <type_traits>
#include <utility>

#include "cuda/operations.h"
#include "cuda/order_statistics.h"
#include "cuda/searches.h"

namespace fedfuse {
namespace cuda {
namespace {

// Means of kept clients, and who is kept, from the keys that a search finds.
template <typename Search>
struct SelectionBody {
  static constexpr Type type = Search::type;
  using Columns = cuda::Columns<type>;
  using Bits = typename Columns::Bits;
  using Unsigned = typename Columns::Unsigned;
  using Accumulator = typename Element<type>::Accumulator;
  using Threads = typename Search::Threads;
  using Parameters = OrderParameters;

  static constexpr int kThreads = Search::kThreads;
  static constexpr int kBlocks = Search::kBlocks;
  static constexpr int kTileColumns = Search::kTileColumns;
  static constexpr int kGroups = Search::kGroups;

  struct Shared {
    typename Search::Shared search;
    typename Search::Ranked ranked;
    // For the searches, which need the registers: of the clients that are present so many are dropped around the
    // median, and so many kept, from this rank on; and how many searches come before the last.
    struct Plan {
      std::uint32_t dropped;
      std::uint32_t num_kept;
      std::uint32_t first_kept;
      std::uint32_t width;
      int searches_before;
    } plan;
    // Around the median: the two middle keys, and what is known of the first kept rank, [first, past].
    Unsigned middle[kSides][kTileColumns];
    std::uint32_t first[kTileColumns];
    std::uint32_t past[kTileColumns];
    std::uint32_t num_present;
    Mean<Accumulator> means[kGroups][kTileColumns];
  };

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    Threads team;
    {
      const Tile tile = locate(p, task, kTileColumns);
      const Columns columns = columns_of(p, tile);
      count_present(columns, shared, team);
      const Kept kept = kept_of_tile(p, tile, shared);
      if (kept.count > 0) {
        Search::prepare(columns, tile.columns, shared.search, team);
        find_bounds(columns, kept, p.options.around_median, tile.columns, shared, team);
      }
    }
    // While the search ran, it had the registers. What else was in them is found out once more.
    const Tile tile = locate(p, forgotten(task), kTileColumns);
    const Columns columns = columns_of(p, tile);
    const Kept kept = kept_of_tile(p, tile, shared);
    if (p.options.wanted == Wanted::kMean) {
      store_means(p, tile, columns, kept, shared, team);
    } else {
      consume(p, tile, columns, kept, shared, team);
    }
  }

  static FEDFUSE_DEVICE Columns columns_of(const Parameters& p, const Tile& tile) {
    return {reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin,
            p.leaves[tile.leaf].coordinates, p.clients, where_of(p.options.where, p.batch, tile.batch),
            p.options.wanted != Wanted::kMean};
  }

  static FEDFUSE_DEVICE Kept kept_of_tile(const Parameters& p, const Tile& tile, const Shared& shared) {
    return kept_of(static_cast<int>(shared.num_present), trim_of(p.options, p.batch, tile.batch),
                   p.options.around_median);
  }

  static FEDFUSE_DEVICE void count_present(const Columns& columns, Shared& shared, Threads& team) {
    team.each([&](int thread, auto&) {
      if (thread == 0) shared.num_present = columns.where == nullptr ? static_cast<std::uint32_t>(columns.clients) : 0;
    });
    if (columns.where == nullptr) return;
    team.each([&](int thread, auto&) {
      std::uint32_t count = 0;
      for (std::int64_t client = thread; client < columns.clients; client += kThreads) count += columns.has(client);
      add_to_shared(&shared.num_present, count);
    });
  }

  // Searches for the keys of the first and the last kept rank of each column. Around the median, the middle keys come
  // before, and then the first rank, by bisection. One search in a loop, not three: it is long, and inline.
  static FEDFUSE_DEVICE void find_bounds(const Columns& columns, const Kept& kept, bool around_median,
                                         std::int64_t width, Shared& shared, Threads& team) {
    team.each([&](int thread, auto&) {
      if (thread > 0) return;
      const auto num_kept = static_cast<std::uint32_t>(kept.count);
      const std::uint32_t dropped = around_median ? shared.num_present - num_kept : 0;
      int searches_before = dropped > 0 ? 1 : 0;
      for (std::uint32_t span = dropped; span > 0; span /= 2) ++searches_before;
      shared.plan = {dropped, num_kept, static_cast<std::uint32_t>(kept.first), static_cast<std::uint32_t>(width),
                     searches_before};
    });
#pragma unroll 1
    for (int search = 0;; ++search) {
      team.each([&](int column, auto&) {
        if (column < kTileColumns) choose_ranks(search, column, shared);
      });
      Search::select(columns, width, shared.ranked, shared.search, team);
      if (search == shared.plan.searches_before) return;
      team.each([&](int column, auto&) {
        if (column < static_cast<int>(shared.plan.width)) learn(search, column, shared);
      });
    }
  }

  // The next rank to try as the first. A column that is done asks once more for what it knows.
  static FEDFUSE_DEVICE std::uint32_t tried(const Shared& shared, int column) {
    const std::uint32_t rank = (shared.first[column] + shared.past[column]) / 2;
    return rank < shared.plan.dropped ? rank : shared.plan.dropped - 1;
  }

  static FEDFUSE_DEVICE void choose_ranks(int search, int column, Shared& shared) {
    const auto& plan = shared.plan;
    std::uint32_t first = 0, last = 0;
    if (column >= static_cast<int>(plan.width)) {
      // Any ranks will do.
    } else if (search == plan.searches_before) {
      first = plan.dropped > 0 ? shared.first[column] : plan.first_kept;
      last = first + plan.num_kept - 1;
    } else if (search == 0) {
      first = (shared.num_present - 1) / 2;
      last = shared.num_present / 2;
    } else {
      first = tried(shared, column);
      last = first + plan.num_kept;
    }
    shared.ranked.ranks[0][column] = first;
    shared.ranked.ranks[1][column] = last;
  }

  static FEDFUSE_DEVICE void learn(int search, int column, Shared& shared) {
    if (search == 0) {
      for (int side = 0; side < kSides; ++side) shared.middle[side][column] = shared.ranked.prefixes[side][column];
      shared.first[column] = 0;
      shared.past[column] = shared.plan.dropped;
    } else if (shared.first[column] != shared.past[column]) {
      const std::uint32_t rank = tried(shared, column);
      if (window_slides_at(shared, column)) {
        shared.first[column] = rank + 1;
      } else {
        shared.past[column] = rank;
      }
    }
  }

  static FEDFUSE_DEVICE Accumulator value_of(Unsigned key) {
    return Element<type>::widen(bits_from_key<type>(Columns::signed_key(key)));
  }

  static FEDFUSE_DEVICE bool window_slides_at(const Shared& shared, int column) {
    const Accumulator lost = value_of(shared.ranked.prefixes[0][column]),
                      gained = value_of(shared.ranked.prefixes[1][column]);
    const Accumulator a = value_of(shared.middle[0][column]), b = value_of(shared.middle[1][column]);
    // Where a sum overflows, its halves are exact.
    const bool overflows = !is_finite(lost + gained) || !is_finite(a + b);
    return window_slides<Accumulator>(lost, gained, a, b, overflows ? Accumulator{0.5} : Accumulator{1},
                                      std::numeric_limits<Accumulator>::infinity());
  }

  // ---- Means --------------------------------------------------------------------------------------------------------

  static FEDFUSE_DEVICE void store_means(const Parameters& p, const Tile& tile, const Columns& columns,
                                         const Kept& kept, Shared& shared, Threads& team) {
    const Accumulator scale = Mean<Accumulator>::scale_for(kept.count);
    if (kept.count > 2) {
      team.each([&](int thread, auto&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        if (column >= tile.columns) return;
        const Unsigned low = shared.ranked.prefixes[0][column], high = shared.ranked.prefixes[1][column];
        Mean<Accumulator> mean;
        columns.visit(column, group, kGroups, columns.clients, [&](std::int64_t, Bits bits) {
          const Unsigned key = columns.key(bits);
          if (low < key && key < high) mean.add(Element<type>::widen(bits), scale);
        });
        shared.means[group][column] = mean;
      });
    }
    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    std::byte* const reduced = operand_data(p, tile, 2, 1, reduced_bytes);
    team.each([&](int column, auto&) {
      if (column >= tile.columns) return;
      store_as(p.options.reduced_type, mean_of(kept, scale, column, shared), reduced, tile.begin + column);
    });
  }

  // From the sums of what lies strictly between the two keys, and those who are kept of what is equal to either.
  static FEDFUSE_DEVICE Accumulator mean_of(const Kept& kept, Accumulator scale, int column, const Shared& shared) {
    if (kept.count == 0) return quiet_nan<Accumulator>();
    const Unsigned low_key = shared.ranked.prefixes[0][column], high_key = shared.ranked.prefixes[1][column];
    const Accumulator low = Element<type>::widen(bits_from_key<type>(Columns::signed_key(low_key)));
    const Accumulator high = Element<type>::widen(bits_from_key<type>(Columns::signed_key(high_key)));
    // One value, whatever it is; and of two NaNs a sum might give either.
    if (low_key == high_key || high != high) return high;
    Mean<Accumulator> mean;
    for (int group = 0; kept.count > 2 && group < kGroups; ++group) mean.add(shared.means[group][column]);
    const auto low_kept = static_cast<Accumulator>(shared.ranked.equal[0][column] - shared.ranked.ranks[0][column]);
    const auto high_kept = static_cast<Accumulator>(shared.ranked.ranks[1][column] + 1);
    mean.sum = mean.sum + low_kept * low + high_kept * high;
    mean.scaled = mean.scaled + low_kept * (low * scale) + high_kept * (high * scale);
    return mean.of(kept.count, scale);
  }

  // ---- Who is kept --------------------------------------------------------------------------------------------------

  // Each group of threads has clients in a row, and first counts those who tie with either bound.
  static FEDFUSE_DEVICE void consume(const Parameters& p, const Tile& tile, const Columns& columns, const Kept& kept,
                                     Shared& shared, Threads& team) {
    const bool spreads = p.options.wanted == Wanted::kSpread;
    const std::byte* const given =
        operand_data(p, tile, 1, spreads ? 1 : p.clients, spreads ? bytes_of(p.options.cotangent_type) : sizeof(Bits));
    Bits* const spread = reinterpret_cast<Bits*>(operand_data(p, tile, 2, p.clients, sizeof(Bits))) + tile.begin;
    const std::int64_t group_clients = (p.clients + kGroups - 1) / kGroups;
    const auto past = [&](int group) {
      const std::int64_t end = (group + 1) * group_clients;
      return end < p.clients ? end : p.clients;
    };
    team.each([&](int thread, auto&) {
      const int group = thread / kTileColumns, column = thread % kTileColumns;
      if (kept.count == 0 || column >= tile.columns) return;
      std::uint32_t lows = 0, highs = 0;
      columns.visit(column, group * group_clients, 1, past(group), [&](std::int64_t, Bits bits) {
        const Unsigned key = columns.key(bits);
        lows += key == shared.ranked.prefixes[0][column];
        highs += key == shared.ranked.prefixes[1][column];
      });
      shared.ranked.group_counts[0][group][column] = lows;
      shared.ranked.group_counts[1][group][column] = highs;
    });
    team.each([&](int thread, auto&) {
      const int group = thread / kTileColumns, column = thread % kTileColumns;
      if (column >= tile.columns) return;
      Bounds<Bits> bounds;
      if (kept.count > 0) bounds = bounds_of(group, column, shared);
      Consumer<type> consumer(p.options, kept, given, tile.begin + column);
      const Bits* const values = reinterpret_cast<const Bits*>(given) + tile.begin + column;
      for (std::int64_t client = group * group_clients; client < past(group); ++client) {
        const std::int64_t offset = client * columns.stride;
        const bool is_kept = kept.count > 0 && columns.has(client) &&
                             bounds.keeps(Columns::signed_key(columns.key(columns.updates[offset + column])));
        consumer.take(is_kept, values + offset, spread + offset + column);
      }
      shared.means[group][column] = consumer.mean;
    });
    if (spreads) return;
    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    std::byte* const reduced = operand_data(p, tile, 2, 1, reduced_bytes);
    team.each([&](int column, auto&) {
      if (column >= tile.columns) return;
      Mean<Accumulator> mean;
      for (int group = 0; group < kGroups; ++group) mean.add(shared.means[group][column]);
      store_as(p.options.reduced_type, mean.of(kept.count, Mean<Accumulator>::scale_for(kept.count)), reduced,
               tile.begin + column);
    });
  }

  // What the clients before this group leave to be skipped and taken.
  static FEDFUSE_DEVICE Bounds<Bits> bounds_of(int group, int column, const Shared& shared) {
    Bounds<Bits> bounds{
        Columns::signed_key(shared.ranked.prefixes[0][column]), Columns::signed_key(shared.ranked.prefixes[1][column]),
        static_cast<int>(shared.ranked.ranks[0][column]), static_cast<int>(shared.ranked.ranks[1][column]) + 1};
    for (int before = 0; before < group; ++before) {
      bounds.skip -= static_cast<int>(shared.ranked.group_counts[0][before][column]);
      bounds.take -= static_cast<int>(shared.ranked.group_counts[1][before][column]);
    }
    return bounds;
  }
};

template <typename Search>
OrderKernel make_selection_kernel() {
  using Body = SelectionBody<Search>;
  return {launch<Body>, Body::kTileColumns};
}

// By bit planes, where a block's registers have room for the clients.
template <Type type, int... kWarps>
OrderKernel bit_plane_kernel(std::integer_sequence<int, kWarps...>, std::int64_t clients) {
  OrderKernel found;
  (void)((clients <= 32 * kWarps && (found = make_selection_kernel<BitPlaneSearch<type, kWarps>>(), true)) || ...);
  return found;
}

template <Type type>
OrderKernel choose_kernel(std::int64_t clients, std::int64_t trim, bool around_median) {
  // A key of 64 bits takes twice the registers.
  using Warps = std::conditional_t<type == Type::kFloat64, std::integer_sequence<int, 4, 8, 16>,
                                   std::integer_sequence<int, 4, 8, 16, 32>>;
  OrderKernel kernel = around_median ? OrderKernel() : network_kernel<type>(clients, trim);
  if (kernel.launch == nullptr) kernel = bit_plane_kernel<type>(Warps(), clients);
  return kernel.launch != nullptr ? kernel : make_selection_kernel<RadixSearch<type>>();
}

// The kernels for all leaves. `given` is the second operand, if there is one.
std::string enqueue_order(const Shape& shape, const Trim& trim, Wanted wanted, const std::vector<View>& updates,
                          const std::vector<View>* given, const std::vector<View>& results, Stream stream) {
  OrderParameters p{};
  p.options.where = trim.where;
  p.options.trim_count = trim.count;
  p.options.trim = trim.attribute;
  p.options.around_median = trim.around_median;
  p.options.wanted = wanted;
  const bool known = wanted == Wanted::kMean && !trim.where.present() && !trim.count.present();
  // Leaves may differ in the type of their means and cotangents.
  const std::vector<View>& others = wanted == Wanted::kSpread ? *given : results;
  return for_each_type([&](auto type) {
    const OrderKernel kernel =
        choose_kernel<decltype(type)::value>(shape.clients, known ? trim.attribute : -1, trim.around_median);
    return for_each_type([&](auto other_type) {
      p.options.reduced_type = p.options.cotangent_type = other_type;
      return for_each_table(
          shape, {&updates, given, &results}, kernel.tile_columns, 1, &p,
          [&](const OrderParameters& table) { return kernel.launch(table, stream); },
          [&](std::size_t leaf) { return updates[leaf].type == type && others[leaf].type == other_type; });
    });
  });
}

}  // namespace

std::string enqueue(const TrimmedMeanProblem& problem, Stream stream) {
  return enqueue_order(problem.shape, problem.trim, Wanted::kMean, problem.updates, nullptr, problem.reduced, stream);
}

std::string enqueue(const SelectedMeanProblem& problem, Stream stream) {
  return enqueue_order(problem.shape, problem.trim, Wanted::kSelectedMean, problem.updates, &problem.values,
                       problem.reduced, stream);
}

std::string enqueue(const SpreadProblem& problem, Stream stream) {
  return enqueue_order(problem.shape, problem.trim, Wanted::kSpread, problem.updates, &problem.cotangents,
                       problem.spread, stream);
}

}  // namespace cuda
}  // namespace fedfuse
