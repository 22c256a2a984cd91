// coordinate_median, trimmed_mean and their derivatives: which kernel is to run, and the one for many clients.
#include <type_traits>

#include "cuda/operations.h"
#include "cuda/order_statistics.h"

namespace fedfuse {
namespace cuda {
namespace {

// Any number of clients, by radix selection: a block counts, for a few columns at a time, how often each value of the
// keys' topmost byte occurs, which tells the byte of the wanted ranks; then, among the keys that begin so, the next
// byte. Counts are integers in shared memory, so nothing depends on the order of the threads.
template <Type type>
struct RadixBody {
  using Bits = typename Element<type>::Bits;
  using Accumulator = typename Element<type>::Accumulator;
  using Unsigned = std::make_unsigned_t<Bits>;
  using Parameters = OrderParameters;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kTileColumns = 16;
  static constexpr int kGroups = kThreads / kTileColumns;  // of threads, each with a row
  static constexpr int kBits = 8;
  static constexpr int kBins = 1 << kBits;
  static constexpr int kBinsOfGroup = kBins / kGroups;
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Bits));
  static constexpr int kRowsInFlight = 4;
  static constexpr int kSides = 2;  // the least and the greatest kept rank

  struct Shared {
    std::uint32_t counts[kSides][kBins][kTileColumns];
    std::uint32_t group_counts[kSides][kGroups][kTileColumns];
    // Of the keys of the wanted ranks: the bits known so far, the others 0; the rank among those that begin so; how
    // many those are.
    Unsigned prefixes[kSides][kTileColumns];
    std::uint32_t ranks[kSides][kTileColumns];
    std::uint32_t equal[kSides][kTileColumns];
    // Around the median: the two middle keys, and what is known of the first kept rank, [first, past].
    Unsigned middle[kSides][kTileColumns];
    std::uint32_t first[kTileColumns];
    std::uint32_t past[kTileColumns];
    std::uint32_t num_present;
    Mean<Accumulator> means[kGroups][kTileColumns];
  };

  // The columns of a tile, and where a thread stands in them.
  struct Columns {
    const Bits* updates;
    std::int64_t stride;
    std::int64_t clients;
    const bool* where;
    bool merges_zeros;

    FEDFUSE_DEVICE bool has(std::int64_t client) const {
      return client < clients && (where == nullptr || where[client]);
    }

    // Calls use(client, bits) for clients first, first + step ... below `past` that are present, some loads ahead.
    template <typename Use>
    FEDFUSE_DEVICE void visit(int column, std::int64_t first, std::int64_t step, std::int64_t past, Use use) const {
      for (std::int64_t client = first; client < past; client += kRowsInFlight * step) {
        Bits bits[kRowsInFlight];
        bool there[kRowsInFlight];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          const std::int64_t row = client + i * step;
          there[i] = row < past && has(row);
          bits[i] = there[i] ? updates[row * stride + column] : Bits{0};
        }
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          if (there[i]) use(client + i * step, bits[i]);
        }
      }
    }

    // Keys without a sign, in the same order.
    FEDFUSE_DEVICE Unsigned key(Bits bits) const {
      const Bits key = merges_zeros ? canonical_key<type>(bits) : key_from_bits<type>(bits);
      return static_cast<Unsigned>(static_cast<Unsigned>(key) ^ (Unsigned{1} << (kKeyBits - 1)));
    }
  };

  static FEDFUSE_DEVICE Bits signed_key(Unsigned key) {
    return static_cast<Bits>(static_cast<Unsigned>(key ^ (Unsigned{1} << (kKeyBits - 1))));
  }

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const Columns columns = {
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + tile.begin,
        p.leaves[tile.leaf].coordinates, p.clients, where_of(p.options.where, p.batch, tile.batch),
        p.options.wanted != Wanted::kMean};
    Team<kThreads> team;
    count_present(columns, shared, team);
    const bool around_median = p.options.around_median;
    const Kept kept =
        kept_of(static_cast<int>(shared.num_present), trim_of(p.options, p.batch, tile.batch), around_median);
    if (kept.count > 0) {
      if (around_median) find_first_ranks(columns, kept, tile.columns, shared, team);
      const auto bounds = [&](int side, int column) {
        const std::uint32_t first = around_median ? shared.first[column] : static_cast<std::uint32_t>(kept.first);
        return side == 0 ? first : first + static_cast<std::uint32_t>(kept.count - 1);
      };
      select(columns, bounds, tile.columns, shared, team);
    }
    if (p.options.wanted == Wanted::kMean) {
      store_means(p, tile, columns, kept, shared, team);
    } else {
      consume(p, tile, columns, kept, shared, team);
    }
  }

  static FEDFUSE_DEVICE void count_present(const Columns& columns, Shared& shared, Team<kThreads>& team) {
    team.each([&](int thread, Nothing&) {
      if (thread == 0) shared.num_present = columns.where == nullptr ? static_cast<std::uint32_t>(columns.clients) : 0;
    });
    if (columns.where == nullptr) return;
    team.each([&](int thread, Nothing&) {
      std::uint32_t count = 0;
      for (std::int64_t client = thread; client < columns.clients; client += kThreads) count += columns.has(client);
      add_to_shared(&shared.num_present, count);
    });
  }

  // Around the median: the first kept rank of each column, by bisection.
  static FEDFUSE_DEVICE void find_first_ranks(const Columns& columns, const Kept& kept, std::int64_t width,
                                              Shared& shared, Team<kThreads>& team) {
    const auto present = static_cast<int>(shared.num_present);
    const int dropped = present - kept.count;
    if (dropped > 0) {
      select(
          columns,
          [&](int side, int) { return static_cast<std::uint32_t>(side == 0 ? (present - 1) / 2 : present / 2); }, width,
          shared, team);
    }
    team.each([&](int thread, Nothing&) {
      if (thread >= kTileColumns) return;
      for (int side = 0; side < kSides; ++side) shared.middle[side][thread] = shared.prefixes[side][thread];
      shared.first[thread] = 0;
      shared.past[thread] = static_cast<std::uint32_t>(dropped);
    });
    for (int span = dropped; span > 0; span /= 2) {
      // A column that is done asks once more for what it knows.
      const auto tried = [&](int column) {
        const std::uint32_t rank = (shared.first[column] + shared.past[column]) / 2;
        return rank < static_cast<std::uint32_t>(dropped) ? rank : static_cast<std::uint32_t>(dropped - 1);
      };
      select(
          columns,
          [&](int side, int column) {
            return tried(column) + (side == 0 ? 0u : static_cast<std::uint32_t>(kept.count));
          },
          width, shared, team);
      team.each([&](int column, Nothing&) {
        if (column >= width || shared.first[column] == shared.past[column]) return;
        const std::uint32_t rank = tried(column);
        const bool slides = window_slides_at(shared, column);
        if (slides) {
          shared.first[column] = rank + 1;
        } else {
          shared.past[column] = rank;
        }
      });
    }
  }

  static FEDFUSE_DEVICE Accumulator value_of(Unsigned key) {
    return Element<type>::widen(bits_from_key<type>(signed_key(key)));
  }

  static FEDFUSE_DEVICE bool window_slides_at(const Shared& shared, int column) {
    const Accumulator lost = value_of(shared.prefixes[0][column]), gained = value_of(shared.prefixes[1][column]);
    const Accumulator a = value_of(shared.middle[0][column]), b = value_of(shared.middle[1][column]);
    // Where a sum overflows, its halves are exact.
    const bool overflows = !is_finite(lost + gained) || !is_finite(a + b);
    return window_slides<Accumulator>(lost, gained, a, b, overflows ? Accumulator{0.5} : Accumulator{1},
                                      std::numeric_limits<Accumulator>::infinity());
  }

  // Finds the keys of two ranks, rank_of(side, column), of each column, how many keys are equal to them, and their
  // ranks among those.
  template <typename RankOf>
  static FEDFUSE_DEVICE void select(const Columns& columns, RankOf rank_of, std::int64_t width, Shared& shared,
                                    Team<kThreads>& team) {
    team.each([&](int thread, Nothing&) {
      if (thread >= kSides * kTileColumns) return;
      const int side = thread / kTileColumns, column = thread % kTileColumns;
      shared.prefixes[side][column] = 0;
      shared.ranks[side][column] = column < width ? rank_of(side, column) : 0;
    });
    for (int shift = kKeyBits - kBits; shift >= 0; shift -= kBits) {
      team.each([&](int thread, Nothing&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        for (int side = 0; side < kSides; ++side) {
          for (int i = 0; i < kBinsOfGroup; ++i) shared.counts[side][group * kBinsOfGroup + i][column] = 0;
        }
      });
      team.each([&](int thread, Nothing&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        if (column < width) count_bytes(columns, group, column, shift, shared);
      });
      team.each([&](int thread, Nothing&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        for (int side = 0; side < kSides; ++side) {
          std::uint32_t count = 0;
          for (int i = 0; i < kBinsOfGroup; ++i) count += shared.counts[side][group * kBinsOfGroup + i][column];
          shared.group_counts[side][group][column] = count;
        }
      });
      team.each([&](int thread, Nothing&) {
        if (thread < width) choose_bytes(thread, shift, shared);
      });
    }
  }

  static FEDFUSE_DEVICE void count_bytes(const Columns& columns, int group, int column, int shift, Shared& shared) {
    const Unsigned low = shared.prefixes[0][column], high = shared.prefixes[1][column];
    // The bits known so far; none of them in the first pass.
    const auto known =
        shift + kBits < kKeyBits ? static_cast<Unsigned>(~std::uint64_t{0} << (shift + kBits)) : Unsigned{0};
    columns.visit(column, group, kGroups, columns.clients, [&](std::int64_t, Bits bits) {
      const Unsigned key = columns.key(bits);
      const int byte = static_cast<int>(key >> shift) & (kBins - 1);
      if ((key & known) == low) add_to_shared(&shared.counts[0][byte][column], 1);
      if (low != high && (key & known) == high) add_to_shared(&shared.counts[1][byte][column], 1);
    });
  }

  static FEDFUSE_DEVICE void choose_bytes(int column, int shift, Shared& shared) {
    // Until the two sides part, what is counted for the one is true of the other.
    const bool parted = shared.prefixes[0][column] != shared.prefixes[1][column];
    for (int side = 0; side < kSides; ++side) {
      const int counted = parted ? side : 0;
      std::uint32_t rank = shared.ranks[side][column];
      int group = 0;
      while (group < kGroups - 1 && rank >= shared.group_counts[counted][group][column]) {
        rank -= shared.group_counts[counted][group++][column];
      }
      int byte = group * kBinsOfGroup;
      while (byte < (group + 1) * kBinsOfGroup - 1 && rank >= shared.counts[counted][byte][column]) {
        rank -= shared.counts[counted][byte++][column];
      }
      shared.ranks[side][column] = rank;
      shared.equal[side][column] = shared.counts[counted][byte][column];
      shared.prefixes[side][column] =
          static_cast<Unsigned>(shared.prefixes[side][column] | static_cast<Unsigned>(byte) << shift);
    }
  }

  // ---- Means --------------------------------------------------------------------------------------------------------

  static FEDFUSE_DEVICE void store_means(const Parameters& p, const Tile& tile, const Columns& columns,
                                         const Kept& kept, Shared& shared, Team<kThreads>& team) {
    const Accumulator scale = Mean<Accumulator>::scale_for(kept.count);
    if (kept.count > 2) {
      team.each([&](int thread, Nothing&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        if (column >= tile.columns) return;
        const Unsigned low = shared.prefixes[0][column], high = shared.prefixes[1][column];
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
    team.each([&](int column, Nothing&) {
      if (column >= tile.columns) return;
      store_as(p.options.reduced_type, mean_of(kept, scale, column, shared), reduced, tile.begin + column);
    });
  }

  // From the sums of what lies strictly between the two keys, and those who are kept of what is equal to either.
  static FEDFUSE_DEVICE Accumulator mean_of(const Kept& kept, Accumulator scale, int column, const Shared& shared) {
    if (kept.count == 0) return quiet_nan<Accumulator>();
    const Unsigned low_key = shared.prefixes[0][column], high_key = shared.prefixes[1][column];
    const Accumulator low = Element<type>::widen(bits_from_key<type>(signed_key(low_key)));
    const Accumulator high = Element<type>::widen(bits_from_key<type>(signed_key(high_key)));
    // One value, whatever it is; and of two NaNs a sum might give either.
    if (low_key == high_key || high != high) return high;
    Mean<Accumulator> mean;
    for (int group = 0; kept.count > 2 && group < kGroups; ++group) mean.add(shared.means[group][column]);
    const auto low_kept = static_cast<Accumulator>(shared.equal[0][column] - shared.ranks[0][column]);
    const auto high_kept = static_cast<Accumulator>(shared.ranks[1][column] + 1);
    mean.sum = mean.sum + low_kept * low + high_kept * high;
    mean.scaled = mean.scaled + low_kept * (low * scale) + high_kept * (high * scale);
    return mean.of(kept.count, scale);
  }

  // ---- Who is kept --------------------------------------------------------------------------------------------------

  // Each group of threads has clients in a row, and first counts those who tie with either bound.
  static FEDFUSE_DEVICE void consume(const Parameters& p, const Tile& tile, const Columns& columns, const Kept& kept,
                                     Shared& shared, Team<kThreads>& team) {
    const bool spreads = p.options.wanted == Wanted::kSpread;
    const std::byte* const given =
        operand_data(p, tile, 1, spreads ? 1 : p.clients, spreads ? bytes_of(p.options.cotangent_type) : sizeof(Bits));
    Bits* const spread = reinterpret_cast<Bits*>(operand_data(p, tile, 2, p.clients, sizeof(Bits))) + tile.begin;
    const std::int64_t group_clients = (p.clients + kGroups - 1) / kGroups;
    const auto past = [&](int group) {
      const std::int64_t end = (group + 1) * group_clients;
      return end < p.clients ? end : p.clients;
    };
    team.each([&](int thread, Nothing&) {
      const int group = thread / kTileColumns, column = thread % kTileColumns;
      if (kept.count == 0 || column >= tile.columns) return;
      std::uint32_t lows = 0, highs = 0;
      columns.visit(column, group * group_clients, 1, past(group), [&](std::int64_t, Bits bits) {
        const Unsigned key = columns.key(bits);
        lows += key == shared.prefixes[0][column];
        highs += key == shared.prefixes[1][column];
      });
      shared.group_counts[0][group][column] = lows;
      shared.group_counts[1][group][column] = highs;
    });
    team.each([&](int thread, Nothing&) {
      const int group = thread / kTileColumns, column = thread % kTileColumns;
      if (column >= tile.columns) return;
      Bounds<Bits> bounds;
      if (kept.count > 0) bounds = bounds_of(group, column, shared);
      Consumer<type> consumer(p.options, kept, given, tile.begin + column);
      const Bits* const values = reinterpret_cast<const Bits*>(given) + tile.begin + column;
      for (std::int64_t client = group * group_clients; client < past(group); ++client) {
        const std::int64_t offset = client * columns.stride;
        const bool is_kept = kept.count > 0 && columns.has(client) &&
                             bounds.keeps(signed_key(columns.key(columns.updates[offset + column])));
        consumer.take(is_kept, values + offset, spread + offset + column);
      }
      shared.means[group][column] = consumer.mean;
    });
    if (spreads) return;
    const std::int64_t reduced_bytes = bytes_of(p.options.reduced_type);
    std::byte* const reduced = operand_data(p, tile, 2, 1, reduced_bytes);
    team.each([&](int column, Nothing&) {
      if (column >= tile.columns) return;
      Mean<Accumulator> mean;
      for (int group = 0; group < kGroups; ++group) mean.add(shared.means[group][column]);
      store_as(p.options.reduced_type, mean.of(kept.count, Mean<Accumulator>::scale_for(kept.count)), reduced,
               tile.begin + column);
    });
  }

  // What the clients before this group leave to be skipped and taken.
  static FEDFUSE_DEVICE Bounds<Bits> bounds_of(int group, int column, const Shared& shared) {
    Bounds<Bits> bounds{signed_key(shared.prefixes[0][column]), signed_key(shared.prefixes[1][column]),
                        static_cast<int>(shared.ranks[0][column]), static_cast<int>(shared.ranks[1][column]) + 1};
    for (int before = 0; before < group; ++before) {
      bounds.skip -= static_cast<int>(shared.group_counts[0][before][column]);
      bounds.take -= static_cast<int>(shared.group_counts[1][before][column]);
    }
    return bounds;
  }
};

template <Type type>
OrderKernel choose_kernel(std::int64_t clients, std::int64_t trim, bool around_median) {
  const OrderKernel kernel = around_median ? OrderKernel() : network_kernel<type>(clients, trim);
  return kernel.launch != nullptr ? kernel : OrderKernel{launch<RadixBody<type>>, RadixBody<type>::kTileColumns};
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
