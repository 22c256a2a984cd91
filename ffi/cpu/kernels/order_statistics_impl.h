// The kernels of order_statistics.h for one element type. Up to some number of rows the kept values come from selection
// networks, beyond it from radix selection.
// For files compiled once per instruction set; see simd.h.
#ifndef FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_IMPL_H_
#define FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_IMPL_H_

#include <cstdint>
#include <new>
#include <utility>

#include "cpu/kernels/elements.h"
#include "cpu/kernels/network_tile.h"
#include "cpu/kernels/order_statistics.h"
#include "cpu/kernels/radix_select.h"
#include "cpu/kernels/simd.h"
#include "math/around_median.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

// Memory for a call, aligned to cache lines.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(::operator new(bytes, std::align_val_t{kCacheLineBytes})) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t{kCacheLineBytes}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

template <typename Integer>
FEDFUSE_INLINE Integer least(Integer a, Integer b) {
  return a < b ? a : b;
}

// The least power of two that is not less, inverted.
template <typename Real>
Real inverse_power_of_two_above(std::int64_t count) {
  Real inverse = 1;
  for (std::int64_t power = 1; power < count; power *= 2) inverse *= Real{0.5};
  return inverse;
}

template <typename Real>
struct RealLimits;
template <>
struct RealLimits<float> {
  static constexpr float kGreatest = __FLT_MAX__;
};
template <>
struct RealLimits<double> {
  static constexpr double kGreatest = __DBL_MAX__;
};

template <typename Real>
bool is_finite(Real value) {
  return value - value == 0;
}

// The mean of values whose sum overflows, from their sum after scaling by a power of two. Infinities and NaN remain.
template <typename Real>
Real unscaled_mean(Real scaled_sum, Real scale, std::int64_t count) {
  const Real limit = RealLimits<Real>::kGreatest * scale;
  Real mean = scaled_sum / static_cast<Real>(count);
  // Rounding may have carried it past what the greatest value scales to.
  if (is_finite(mean) && mean > limit) mean = limit;
  if (is_finite(mean) && mean < -limit) mean = -limit;
  return mean / scale;
}

template <Type type>
struct OrderStatistics {
  using Lane = typename Element<type>::Lane;
  using Accumulator = typename Element<type>::Accumulator;
  using Sum = Vector<Accumulator>;
  using Layout = GroupLayout<Lane>;
  static constexpr int kParts = Element<type>::kParts;
  static constexpr int kElements = kLanes<Lane>;  // in a vector
  static constexpr int kColumns = kTileColumns<Lane>;
  static constexpr int kRows = kMaxNetworkRows<Lane>;
  static constexpr int kGroup = kGroupColumns<Lane>;
  static constexpr int kUnrolledMean = 20;  // values, as 32 rows trimmed by a fifth leave
  static constexpr Lane kNegativeInfinity = Keys<type>::kNegativeInfinity;

  // Copies `width` elements, the rest of the `room` as zeros; canonical: NaNs and zeros of one kind each.
  template <bool kCanonical>
  static FEDFUSE_INLINE void copy_row(const Lane* from, int width, int room, Lane* to) {
    const auto convert = [](Vector<Lane> bits) __attribute__((always_inline)) {
      return kCanonical ? canonical<Lane>(bits, fill<Lane>(kNegativeInfinity)) : bits;
    };
    if (width == room) {
      for (int i = 0; i < room; i += kElements) store(to + i, convert(load<Lane>(from + i)));
      return;
    }
    for (int i = 0; i < room; ++i) to[i] = 0;
    __builtin_memcpy(to, from, width * sizeof(Lane));
    for (int i = 0; i < room; i += kElements) store(to + i, convert(load<Lane>(to + i)));
  }

  // ---- Means of sorted keys -----------------------------------------------------------------------------------------

  // Sums the values of `count` vectors of keys, in four interleaved partial sums.
  template <bool kScaled>
  static FEDFUSE_INLINE void sum_keys(const Lane* keys, int count, Accumulator scale, Sum* sums) {
    Sum partial[4][kParts];
    for (auto& sums_of_quarter : partial) {
      for (Sum& sum : sums_of_quarter) sum = -Sum{};  // -0, to which adding -0 leaves -0
    }
    const auto add = [&](int index, Sum* to) __attribute__((always_inline)) {
      Sum values[kParts];
      Element<type>::widen(flipped<Lane>(load<Lane>(keys + index * kElements)), values);
      for (int part = 0; part < kParts; ++part) {
        to[part] += kScaled ? values[part] * scale : values[part];
      }
    };
    int index = 0;
    for (; index + 4 <= count; index += 4) {
      for (int quarter = 0; quarter < 4; ++quarter) add(index + quarter, partial[quarter]);
    }
    for (int quarter = 0; quarter < 3; ++quarter) {
      if (index + quarter < count) add(index + quarter, partial[quarter]);
    }
    for (int part = 0; part < kParts; ++part) {
      sums[part] = (partial[0][part] + partial[1][part]) + (partial[2][part] + partial[3][part]);
    }
  }

  // For columns whose sum is not finite: because of a value, or because the sum overflowed.
  static __attribute__((noinline)) void mend_means(const Lane* keys, int count, Accumulator* out) {
    const Accumulator scale = inverse_power_of_two_above<Accumulator>(count);
    Sum sums[kParts];
    sum_keys<true>(keys, count, scale, sums);
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes<Accumulator>; ++lane) {
        Accumulator* const mean = out + part * kLanes<Accumulator> + lane;
        if (!is_finite(*mean)) *mean = unscaled_mean(sums[part][lane], scale, count);
      }
    }
  }

  // Stores the means of `count` vectors of keys. kCount is count, or 0 for any.
  template <int kCount>
  static void store_mean(const Lane* keys, int count, Accumulator* out) {
    if constexpr (kCount != 0) count = kCount;
    Sum sums[kParts];
    if (count == 1) {
      Element<type>::widen(flipped<Lane>(load<Lane>(keys)), sums);
      for (int part = 0; part < kParts; ++part) store(out + part * kLanes<Accumulator>, sums[part]);
      return;
    }
    sum_keys<false>(keys, count, 1, sums);
    bool finite = true;
    for (int part = 0; part < kParts; ++part) {
      store(out + part * kLanes<Accumulator>, sums[part] / static_cast<Accumulator>(count));
      finite &= !any(sums[part] - sums[part] != Sum{});
    }
    if (!finite) mend_means(keys, count, out);
  }

  using StoreMean = void (*)(const Lane* keys, int count, Accumulator* out);

  template <int... kCounts>
  static StoreMean find_store_mean(int count, std::integer_sequence<int, kCounts...>) {
    static constexpr StoreMean kStoreMean[] = {store_mean<kCounts>...};
    return kStoreMean[count < static_cast<int>(sizeof...(kCounts)) ? count : 0];
  }

  // ---- Around the median --------------------------------------------------------------------------------------------

  static FEDFUSE_INLINE auto slides(Sum lost, Sum gained, Sum a, Sum b) {
    // Where a sum overflows, its halves are exact.
    const Sum left = lost + gained, right = a + b;
    const auto overflows = (left - left != Sum{}) | (right - right != Sum{});
    const Sum half = overflows ? fill<Accumulator>(Accumulator{0.5}) : fill<Accumulator>(1);
    return window_slides<Sum>(lost, gained, a, b, half, fill<Accumulator>(__builtin_inff()));
  }

  // The first kept rank in each column of a vector of sorted keys.
  static FEDFUSE_INLINE Vector<Lane> first_around_median(const Lane* sorted, int num_rows, int dropped) {
    const auto values_of_rank = [&](int rank, Sum* parts) __attribute__((always_inline)) {
      Element<type>::widen(flipped<Lane>(load<Lane>(sorted + rank * kElements)), parts);
    };
    Sum a[kParts], b[kParts];
    values_of_rank((num_rows - 1) / 2, a);
    values_of_rank(num_rows / 2, b);
    decltype(Sum{} < Sum{}) counts[kParts] = {};
    for (int rank = 0; rank < dropped; ++rank) {
      Sum lost[kParts], gained[kParts];
      values_of_rank(rank, lost);
      values_of_rank(rank + num_rows - dropped, gained);
      for (int part = 0; part < kParts; ++part) counts[part] -= slides(lost[part], gained[part], a[part], b[part]);
    }
    alignas(kVectorBytes) Lane first[kElements];
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes<Accumulator>; ++lane) {
        first[part * kLanes<Accumulator> + lane] = static_cast<Lane>(counts[part][lane]);
      }
    }
    return load<Lane>(first);
  }

  // Sums the values of the ranks from `first` on, so many of all.
  template <bool kScaled>
  static FEDFUSE_INLINE void sum_ranks(const Lane* sorted, int num_rows, Vector<Lane> first, int count,
                                       Accumulator scale, Sum* sums) {
    const Vector<Lane> past = first + static_cast<Lane>(count);
    for (int part = 0; part < kParts; ++part) sums[part] = -Sum{};
    for (int rank = 0; rank < num_rows; ++rank) {
      const Vector<Lane> ranks = fill<Lane>(static_cast<Lane>(rank));
      const Vector<Lane> is_kept = bits_as<Lane>((ranks >= first) & (ranks < past));
      Sum values[kParts];
      // Whoever is not kept adds minus zero, which changes nothing, not even a sum of minus zeros.
      const Vector<Lane> minus_zero = fill<Lane>(static_cast<Lane>(~kGreatestKey<Lane>));
      const Vector<Lane> bits = flipped<Lane>(load<Lane>(sorted + rank * kElements));
      Element<type>::widen((bits & is_kept) | (minus_zero & ~is_kept), values);
      for (int part = 0; part < kParts; ++part) sums[part] += kScaled ? values[part] * scale : values[part];
    }
  }

  // Stores the means of the num_rows - dropped values nearest the median, from all keys in order.
  static __attribute__((noinline)) void store_mean_around_median(const Lane* sorted, int num_rows, int dropped,
                                                                 Accumulator* out) {
    const int count = num_rows - dropped;
    const Vector<Lane> first = first_around_median(sorted, num_rows, dropped);
    Sum sums[kParts];
    sum_ranks<false>(sorted, num_rows, first, count, 1, sums);
    bool finite = true;
    for (int part = 0; part < kParts; ++part) {
      store(out + part * kLanes<Accumulator>, sums[part] / static_cast<Accumulator>(count));
      finite &= !any(sums[part] - sums[part] != Sum{});
    }
    if (finite) return;
    const Accumulator scale = inverse_power_of_two_above<Accumulator>(count);
    sum_ranks<true>(sorted, num_rows, first, count, scale, sums);
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes<Accumulator>; ++lane) {
        Accumulator* const mean = out + part * kLanes<Accumulator> + lane;
        if (!is_finite(*mean)) *mean = unscaled_mean(sums[part][lane], scale, count);
        // Of several NaNs a sum may give any, and which may depend on the place.
        if (*mean != *mean) *mean = static_cast<Accumulator>(__builtin_nanf(""));
      }
    }
  }

  // The first kept rank in each column of a group, by bisection.
  static void find_first_ranks(BitPlanes<Lane>* planes, std::int64_t num_rows, KeptRanks kept, std::uint32_t* first) {
    std::uint32_t past[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      first[i] = kept.around_median ? 0 : static_cast<std::uint32_t>(kept.trim);
      past[i] = static_cast<std::uint32_t>(kept.trim);
    }
    if (!kept.around_median || kept.trim == 0) return;
    RankedValues<Lane> ranked;
    alignas(kVectorBytes) Accumulator a[kGroup], b[kGroup], lost[kGroup], gained[kGroup];
    planes->select((num_rows - 1) / 2, &ranked);
    values_of_keys(ranked.key, a);
    planes->select(num_rows / 2, &ranked);
    values_of_keys(ranked.key, b);
    for (std::int64_t span = kept.trim; span > 0; span /= 2) {
      // A column that is done asks once more for what it knows.
      const auto middle = [&](int i) {
        return least<std::int64_t>((std::int64_t{first[i]} + past[i]) / 2, kept.trim - 1);
      };
      planes->select(middle, &ranked);
      values_of_keys(ranked.key, lost);
      planes->select([&](int i) { return middle(i) + kept.count(num_rows); }, &ranked);
      values_of_keys(ranked.key, gained);
      for (int part = 0; part < kGroup; part += kLanes<Accumulator>) {
        const auto slid = slides(load<Accumulator>(lost + part), load<Accumulator>(gained + part),
                                 load<Accumulator>(a + part), load<Accumulator>(b + part));
        for (int lane = 0; lane < kLanes<Accumulator>; ++lane) {
          const int i = part + lane;
          if (first[i] == past[i]) continue;
          if (slid[lane]) {
            first[i] = static_cast<std::uint32_t>(middle(i)) + 1;
          } else {
            past[i] = static_cast<std::uint32_t>(middle(i));
          }
        }
      }
    }
  }

  // ---- Tiles of rows ------------------------------------------------------------------------------------------------

  // A copy of kRoom columns of all rows; those beyond the last are zero.
  template <int kRoom>
  struct ColumnsCopy {
    explicit ColumnsCopy(std::int64_t num_rows)
        : memory(static_cast<std::size_t>(num_rows) * (kRoom * sizeof(Lane) + sizeof(void*))),
          values(memory.template as<Lane>()),
          rows(reinterpret_cast<const void**>(values + num_rows * kRoom)) {
      for (std::int64_t row = 0; row < num_rows; ++row) rows[row] = values + row * kRoom;
    }

    // Takes the rows from `first` to before `last`.
    template <bool kCanonical>
    void take(const void* const* from, std::int64_t first, std::int64_t last, std::int64_t column, int width) {
      for (std::int64_t row = first; row < last; ++row) {
        copy_row<kCanonical>(static_cast<const Lane*>(from[row]) + column, width, kRoom, values + row * kRoom);
      }
    }

    Scratch memory;
    Lane* values;
    const void** rows;
  };

  // Rows that lie a large power of two apart share few places in the caches. Of what is fetched of many such rows for
  // the next tile, most would be lost again before it is used. Both limits are where copying begins to pay: measured.
  static bool rows_collide(const void* const* rows, std::int64_t num_rows) {
    constexpr std::int64_t kPageBytes = 4096, kFewestRows = 56, kPlaces = 2048;
    if (num_rows < kFewestRows) return false;
    const auto address = [&](int row) { return reinterpret_cast<std::intptr_t>(rows[row]); };
    const std::int64_t stride = address(1) - address(0);
    return num_rows * ((stride & -stride) / kPageBytes) > kPlaces;
  }

  // Copies of the tiles, one after the other. Where rows collide, the next one is copied during the work on this one,
  // a few rows at a time, as soon as they have been fetched.
  template <bool kCanonical>
  class CopiedTiles {
   public:
    using Tile = ColumnsCopy<kColumns>;

    CopiedTiles(const void* const* rows, std::int64_t num_rows, std::int64_t columns, bool ahead)
        : rows_(rows),
          num_rows_(num_rows),
          columns_(columns),
          places_(ahead ? 2 : 1),
          tiles_{Tile(num_rows), Tile(ahead ? num_rows : 0)} {}

    // The tile at this column.
    const Tile& at(std::int64_t column) {
      if (column != current_ && column != ahead_) take(column, 0, num_rows_);
      current_ = column;
      return tile(column);
    }

    // Copies some rows of the tile after the one at this column.
    __attribute__((noinline)) void take_after(std::int64_t column, std::int64_t first, std::int64_t last) {
      ahead_ = column + kColumns;
      if (ahead_ < columns_) take(ahead_, first, last);
    }

   private:
    Tile& tile(std::int64_t column) { return tiles_[column / kColumns % places_]; }

    void take(std::int64_t column, std::int64_t first, std::int64_t last) {
      const int width = static_cast<int>(least<std::int64_t>(columns_ - column, kColumns));
      tile(column).template take<kCanonical>(rows_, first, last, column, width);
    }

    const void* const* rows_;
    std::int64_t num_rows_;
    std::int64_t columns_;
    std::int64_t places_;
    std::int64_t current_ = -1, ahead_ = -1;  // the columns of the tiles that are there
    Tile tiles_[2];
  };

  // Fetches the next tile of the rows, a whole row of the tile at a time, and copies it then, if there are copies.
  template <bool kCanonical>
  class TileFetcher {
   public:
    TileFetcher(const void* const* rows, std::int64_t num_rows, std::int64_t column, CopiedTiles<kCanonical>* copies)
        : rows_(rows),
          tile_(column / kColumns * kColumns),
          first_((column / kGroup % kGroupsOfTile) * ((num_rows + kGroupsOfTile - 1) / kGroupsOfTile)),
          last_(least(num_rows, first_ + (num_rows + kGroupsOfTile - 1) / kGroupsOfTile)),
          copied_(first_),
          copies_(copies) {}

    FEDFUSE_INLINE void operator()(std::int64_t row) {
      if (row % kGroupsOfTile != 0) return;
      const std::int64_t next = first_ + row / kGroupsOfTile;
      if (next >= last_) return;
      for (int line = 0; line < kTileLines; ++line) {
        fetch_to_l2(rows_[next], (tile_ + kColumns) * sizeof(Lane) + line * kCacheLineBytes);
      }
      if (next - copied_ == kMostWaiting) copy_before(next - kMostWaiting / 2);
    }

    // Copies what has been fetched and is not yet copied.
    void finish() { copy_before(last_); }

   private:
    static constexpr int kGroupsOfTile = kColumns / kGroup;
    // Of so many rows, the caches hold what has been fetched even where they collide.
    static constexpr int kMostWaiting = 16;

    void copy_before(std::int64_t row) {
      if (copies_ != nullptr && copied_ < row) copies_->take_after(tile_, copied_, row);
      copied_ = row;
    }

    const void* const* rows_;
    std::int64_t tile_;
    std::int64_t first_;
    std::int64_t last_;
    std::int64_t copied_;
    CopiedTiles<kCanonical>* copies_;
  };

  // ---- Means of few rows --------------------------------------------------------------------------------------------

  static void mean_by_network(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks ranks,
                              Accumulator* out) {
    const bool around_median = ranks.around_median;
    const auto network = around_median ? sort_network<Lane>(num_rows) : mean_network<Lane>(num_rows, ranks.trim);
    NetworkTile<Lane> tile(network, num_rows, kNegativeInfinity);
    alignas(kCacheLineBytes) Lane outputs[kRows * kElements];
    const Lane* const kept = outputs + tile.output_of_rank(around_median ? 0 : ranks.trim) * kElements;
    const int count = static_cast<int>(ranks.count(num_rows));
    const StoreMean store_mean = find_store_mean(count, std::make_integer_sequence<int, kUnrolledMean + 1>());

    // The last columns go the same way in a copy with room for a whole tile, and so do all where rows collide.
    const bool collide = rows_collide(rows, num_rows);
    CopiedTiles<false> copies(rows, num_rows, columns, collide);
    alignas(kCacheLineBytes) Accumulator means[kColumns];

    for (std::int64_t column = 0; column < columns; column += kColumns) {
      const int width = static_cast<int>(least<std::int64_t>(columns - column, kColumns));
      const bool whole = width == kColumns;
      if (whole && !collide) {
        tile.point_at(rows, column);
      } else {
        tile.point_at(copies.at(column).rows, 0);
      }
      if (whole) tile.fetch_after(rows, column);
      Accumulator* const to = whole ? out + column : means;
      for (int vector = 0; vector * kElements < width; ++vector) {
        tile.run(vector, outputs);
        if (around_median) {
          store_mean_around_median(kept, static_cast<int>(num_rows), static_cast<int>(ranks.trim),
                                   to + vector * kElements);
        } else {
          store_mean(kept, count, to + vector * kElements);
        }
        if (collide) copies.take_after(column, tile.rows_fetched(vector - 1), tile.rows_fetched(vector));
      }
      if (!whole) __builtin_memcpy(out + column, means, width * sizeof(Accumulator));
    }
  }

  // ---- Means of many rows -------------------------------------------------------------------------------------------

  // Sums the values of the rows of a group that lie strictly between two keys.
  template <bool kScaled>
  static void sum_between(const Lane* values, std::int64_t num_rows, const Lane* low, const Lane* high,
                          Accumulator scale, Accumulator* sums) {
    for (int vector = 0; vector < Layout::kVectors; ++vector) {
      const Vector<Lane> lowest = load<Lane>(low + vector * kElements);
      const Vector<Lane> highest = load<Lane>(high + vector * kElements);
      Sum partial[4][kParts] = {};
      const auto add = [&](std::int64_t row, Sum* to) __attribute__((always_inline)) {
        const Vector<Lane> bits = load<Lane>(values + row * kGroup + vector * kElements);
        const Vector<Lane> keys = value_keys<Lane>(bits, fill<Lane>(kNegativeInfinity));
        const Vector<Lane> between = bits_as<Lane>((keys > lowest) & (keys < highest));
        Sum terms[kParts];
        Element<type>::widen(bits & between, terms);
        for (int part = 0; part < kParts; ++part) {
          to[part] += kScaled ? terms[part] * scale : terms[part];
        }
      };
      std::int64_t row = 0;
      for (; row + 4 <= num_rows; row += 4) {
        for (int quarter = 0; quarter < 4; ++quarter) add(row + quarter, partial[quarter]);
      }
      for (int quarter = 0; quarter < 3; ++quarter) {
        if (row + quarter < num_rows) add(row + quarter, partial[quarter]);
      }
      for (int part = 0; part < kParts; ++part) {
        store(sums + vector * kElements + part * kLanes<Accumulator>,
              (partial[0][part] + partial[1][part]) + (partial[2][part] + partial[3][part]));
      }
    }
  }

  static void values_of_keys(const Lane* keys, Accumulator* values) {
    for (int vector = 0; vector < Layout::kVectors; ++vector) {
      Sum parts[kParts];
      Element<type>::widen(flipped<Lane>(load<Lane>(keys + vector * kElements)), parts);
      for (int part = 0; part < kParts; ++part) {
        store(values + vector * kElements + part * kLanes<Accumulator>, parts[part]);
      }
    }
  }

  static void mean_by_radix(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks ranks,
                            Accumulator* out) {
    const std::int64_t count = ranks.count(num_rows);
    const Scratch memory(BitPlanes<Lane>::scratch_words(num_rows) * sizeof(Words));
    BitPlanes<Lane> planes(num_rows, memory.as<Words>());
    ColumnsCopy<kGroup> copy(num_rows);
    const bool collide = rows_collide(rows, num_rows);
    CopiedTiles<false> copies(rows, collide ? num_rows : 0, columns, collide);
    RankedValues<Lane> low, high;
    std::uint32_t first[kGroup];
    alignas(kVectorBytes) Accumulator low_values[kGroup], high_values[kGroup];
    alignas(kVectorBytes) Accumulator sums[kGroup] = {};

    for (std::int64_t column = 0; column < columns; column += kGroup) {
      const int width = static_cast<int>(least<std::int64_t>(columns - column, kGroup));
      const void* const* from = rows;
      std::int64_t at = column;
      if (collide) {
        at = column % kColumns;
        from = copies.at(column - at).rows;
      }
      if (count > 2 || width < kGroup) {
        copy.template take<false>(from, 0, num_rows, at, width);
        from = copy.rows;
        at = 0;
      }
      TileFetcher<false> fetcher(rows, num_rows, column, collide ? &copies : nullptr);
      planes.fill_from(from, at, kNegativeInfinity, fetcher);
      find_first_ranks(&planes, num_rows, ranks, first);
      planes.select([&](int i) { return first[i]; }, &low);
      fetcher.finish();
      values_of_keys(low.key, low_values);
      if (count == 1) {
        __builtin_memcpy(out + column, low_values, width * sizeof(Accumulator));
        continue;
      }
      planes.select([&](int i) { return first[i] + count - 1; }, &high);
      values_of_keys(high.key, high_values);
      if (count > 2) sum_between<false>(copy.values, num_rows, low.key, high.key, 1, sums);

      const auto total = [&](int i, Accumulator scale) {
        const auto low_kept = static_cast<Accumulator>(low.below[i] + low.equal[i] - first[i]);
        const auto high_kept = static_cast<Accumulator>(first[i] + count - high.below[i]);
        return sums[i] + low_kept * (low_values[i] * scale) + high_kept * (high_values[i] * scale);
      };
      bool finite = true;
      for (int i = 0; i < width; ++i) {
        const Accumulator mean = total(i, 1) / static_cast<Accumulator>(count);
        // Of two NaNs a sum may give either.
        const bool one = low.key[i] == high.key[i], is_nan = high_values[i] != high_values[i];
        out[column + i] = one || is_nan ? high_values[i] : mean;
        finite &= is_finite(out[column + i]);
      }
      if (finite) continue;
      const Accumulator scale = inverse_power_of_two_above<Accumulator>(count);
      if (count > 2) sum_between<true>(copy.values, num_rows, low.key, high.key, scale, sums);
      for (int i = 0; i < width; ++i) {
        const bool one = low.key[i] == high.key[i], is_nan = high_values[i] != high_values[i];
        if (one || is_nan || is_finite(out[column + i])) continue;
        out[column + i] = unscaled_mean(total(i, scale), scale, count);
      }
    }
  }

  // ---- Who is kept --------------------------------------------------------------------------------------------------

  // What decides, in one vector of columns, who is kept: the keys of the least and the greatest kept value; of those
  // who tie with the least, the first `skip` are not kept; of those who tie with the greatest, only the first `take`
  // are.
  struct Bounds {
    Vector<Lane> low, high, skip, take;

    // Takes canonical bits row by row; ones for the kept.
    FEDFUSE_INLINE Vector<Lane> kept_of(Vector<Lane> bits) {
      const Vector<Lane> keys = flipped<Lane>(bits);
      const Vector<Lane> skipped = bits_as<Lane>((keys == low) & (skip > Vector<Lane>{}));
      const Vector<Lane> taken = bits_as<Lane>((keys == high) & (take > Vector<Lane>{}));
      skip += skipped;
      take += taken;
      return bits_as<Lane>((keys >= low) & ((keys < high) | taken)) & ~skipped;
    }

    // The same where all who tie are kept.
    FEDFUSE_INLINE Vector<Lane> kept_without_ties(Vector<Lane> bits) const {
      const Vector<Lane> keys = flipped<Lane>(bits);
      return bits_as<Lane>((keys >= low) & (keys <= high));
    }
  };

  // The rows of some columns of which it is known who is kept, and the place of those columns in the whole.
  struct KeptRows {
    const Lane* values;  // canonical bits, [row][kColumns]
    std::int64_t first_row;
    std::int64_t num_rows;
    std::int64_t column;
    int width;
    Bounds* bounds;  // of each vector
    bool ties;       // whether some who tie with a bound are not kept

    // How many of the columns of so many vectors there are. Only a single vector may have fewer than it has room for.
    template <int kVectors>
    FEDFUSE_INLINE int width_of(int first_vector) const {
      return kVectors > 1 ? kVectors * kElements : least(width - first_vector * kElements, kElements);
    }

    // Calls use(row, index, mask) for all rows and kVectors vectors of each.
    template <int kVectors, typename Use>
    FEDFUSE_INLINE void visit(int first_vector, Use use) const {
      // Local, for the compiler to hold in registers.
      Bounds local[kVectors];
      for (int i = 0; i < kVectors; ++i) local[i] = bounds[first_vector + i];
      const Lane* row_values = values + first_vector * kElements;
      if (ties) {
        for (std::int64_t row = 0; row < num_rows; ++row, row_values += kColumns) {
          for (int i = 0; i < kVectors; ++i) {
            use(first_row + row, i, local[i].kept_of(load<Lane>(row_values + i * kElements)));
          }
        }
        for (int i = 0; i < kVectors; ++i) bounds[first_vector + i] = local[i];
      } else {
        for (std::int64_t row = 0; row < num_rows; ++row, row_values += kColumns) {
          for (int i = 0; i < kVectors; ++i) {
            use(first_row + row, i, local[i].kept_without_ties(load<Lane>(row_values + i * kElements)));
          }
        }
      }
    }

    // Has the consumer use whole tiles in one go, anything else vector by vector.
    template <typename Consumer>
    FEDFUSE_INLINE void give_to(Consumer& consumer) const {
      if (width == kColumns) return consumer.template use<kTileVectors>(*this, 0);
      for (int vector = 0; vector * kElements < width; ++vector) {
        consumer.template use<1>(*this, vector);
      }
    }
  };

  // Adds up the kept tangents.
  struct TangentSum {
    const void* const* tangents;
    std::int64_t count;
    Accumulator* out;
    Sum sums[kTileVectors][kParts];

    void begin(std::int64_t, int) {
      for (auto& parts : sums) {
        for (Sum& sum : parts) sum = Sum{};
      }
    }

    template <int kVectors>
    void use(const KeptRows& kept, int first_vector) {
      const std::int64_t column = kept.column + first_vector * kElements;
      const int width = kept.template width_of<kVectors>(first_vector);
      Sum local[kVectors][kParts];
      for (int i = 0; i < kVectors; ++i) {
        for (int part = 0; part < kParts; ++part) local[i][part] = sums[first_vector + i][part];
      }
      const auto add = [&](std::int64_t row, int i, Vector<Lane> mask) __attribute__((always_inline)) {
        const Lane* const from = static_cast<const Lane*>(tangents[row]) + column + i * kElements;
        Sum terms[kParts];
        Element<type>::widen(load_first(from, width - i * kElements) & mask, terms);
        for (int part = 0; part < kParts; ++part) local[i][part] += terms[part];
      };
      kept.template visit<kVectors>(first_vector, add);
      for (int i = 0; i < kVectors; ++i) {
        for (int part = 0; part < kParts; ++part) sums[first_vector + i][part] = local[i][part];
      }
    }

    void end(std::int64_t column, int width) {
      alignas(kVectorBytes) Accumulator means[kColumns];
      for (int vector = 0; vector < kTileVectors; ++vector) {
        for (int part = 0; part < kParts; ++part) {
          store(means + vector * kElements + part * kLanes<Accumulator>,
                sums[vector][part] / static_cast<Accumulator>(count));
        }
      }
      __builtin_memcpy(out + column, means, width * sizeof(Accumulator));
    }
  };

  // Gives each kept client its share of the cotangent.
  struct CotangentSpread {
    const Accumulator* cotangent;
    std::int64_t count;
    void* const* out;
    bool streams;
    Vector<Lane> shares[kTileVectors];

    void begin(std::int64_t column, int width) {
      alignas(kVectorBytes) Accumulator values[kColumns] = {};
      __builtin_memcpy(values, cotangent + column, width * sizeof(Accumulator));
      for (int vector = 0; vector < kTileVectors; ++vector) {
        Sum parts[kParts];
        for (int part = 0; part < kParts; ++part) {
          parts[part] = load<Accumulator>(values + vector * kElements + part * kLanes<Accumulator>) /
                        static_cast<Accumulator>(count);
        }
        shares[vector] = Element<type>::narrow(parts);
      }
    }

    template <int kVectors>
    void use(const KeptRows& kept, int first_vector) {
      const std::int64_t column = kept.column + first_vector * kElements;
      const int width = kept.template width_of<kVectors>(first_vector);
      Vector<Lane> local[kVectors];
      for (int i = 0; i < kVectors; ++i) local[i] = shares[first_vector + i];
      const auto place = [&](std::int64_t row, int i) __attribute__((always_inline)) {
        return static_cast<Lane*>(out[row]) + column + i * kElements;
      };
      // Streaming stores must fill whole lines one after the other.
      if (streams && kVectors * kVectorBytes % kCacheLineBytes == 0 && width == kVectors * kElements) {
        kept.template visit<kVectors>(first_vector,
                                      [&](std::int64_t row, int i, Vector<Lane> mask)
                                          __attribute__((always_inline)) { stream(place(row, i), local[i] & mask); });
      } else {
        kept.template visit<kVectors>(first_vector,
                                      [&](std::int64_t row, int i, Vector<Lane> mask) __attribute__((always_inline)) {
                                        store_first(place(row, i), local[i] & mask, width - i * kElements);
                                      });
      }
    }

    void end(std::int64_t, int) {}
  };

  // The first `width` elements, or all; the rest zero.
  static FEDFUSE_INLINE Vector<Lane> load_first(const Lane* from, int width) {
    if (width >= kElements) return load<Lane>(from);
    Vector<Lane> vector{};
    __builtin_memcpy(&vector, from, width * sizeof(Lane));
    return vector;
  }

  static FEDFUSE_INLINE void store_first(Lane* to, Vector<Lane> vector, int width) {
    if (width >= kElements) return store(to, vector);
    __builtin_memcpy(to, &vector, width * sizeof(Lane));
  }

  template <typename Consumer>
  static void select_by_network(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks ranks,
                                Consumer& consumer) {
    NetworkTile<Lane> tile(sort_network<Lane>(num_rows), num_rows, kNegativeInfinity);
    alignas(kCacheLineBytes) Lane outputs[kRows * kElements];
    const Lane* const sorted = outputs + tile.output_of_rank(0) * kElements;

    const bool collide = rows_collide(rows, num_rows);
    CopiedTiles<true> copies(rows, num_rows, columns, collide);

    Bounds bounds[kTileVectors];
    for (std::int64_t column = 0; column < columns; column += kColumns) {
      const int width = static_cast<int>(least<std::int64_t>(columns - column, kColumns));
      const ColumnsCopy<kColumns>& copy = copies.at(column);
      tile.point_at(copy.rows, 0);
      tile.fetch_after(rows, column);
      bool ties = false;
      for (int vector = 0; vector * kElements < width; ++vector) {
        tile.run(vector, outputs);
        const auto find = ranks.around_median ? find_bounds_around_median : find_bounds;
        ties |= find(sorted, static_cast<int>(num_rows), static_cast<int>(ranks.trim), &bounds[vector]);
        if (collide) copies.take_after(column, tile.rows_fetched(vector - 1), tile.rows_fetched(vector));
      }
      consumer.begin(column, width);
      KeptRows{copy.values, 0, num_rows, column, width, bounds, ties}.give_to(consumer);
      consumer.end(column, width);
    }
  }

  // From all keys in order. Returns whether some who tie with a bound are not kept.
  static bool find_bounds(const Lane* sorted, int num_rows, int trim, Bounds* bounds) {
    const auto key_of_rank = [&](int rank)
                                 __attribute__((always_inline)) { return load<Lane>(sorted + rank * kElements); };
    const int last = num_rows - 1 - trim;
    const Vector<Lane> low = key_of_rank(trim), high = key_of_rank(last);
    // Without ties all who equal the bounds are kept.
    *bounds = {low, high, Vector<Lane>{}, fill<Lane>(kGreatestKey<Lane>)};
    if (trim == 0 || !any((key_of_rank(trim - 1) == low) | (key_of_rank(last + 1) == high))) {
      return false;
    }
    Vector<Lane> skip{}, take{};
    for (int rank = 0; rank < trim; ++rank) skip -= bits_as<Lane>(key_of_rank(rank) == low);
    for (int rank = 0; rank <= last; ++rank) take -= bits_as<Lane>(key_of_rank(rank) == high);
    bounds->skip = skip;
    bounds->take = take;
    return true;
  }

  static bool find_bounds_around_median(const Lane* sorted, int num_rows, int dropped, Bounds* bounds) {
    const auto key_of_rank = [&](int rank)
                                 __attribute__((always_inline)) { return load<Lane>(sorted + rank * kElements); };
    const Vector<Lane> first = first_around_median(sorted, num_rows, dropped);
    const int count = num_rows - dropped;
    Vector<Lane> low{}, high{}, skip{}, take{};
    for (int rank = 0; rank <= dropped; ++rank) {
      const Vector<Lane> is_first = bits_as<Lane>(first == fill<Lane>(static_cast<Lane>(rank)));
      low |= key_of_rank(rank) & is_first;
      high |= key_of_rank(rank + count - 1) & is_first;
    }
    for (int rank = 0; rank < num_rows; ++rank) {
      const Vector<Lane> ranks = fill<Lane>(static_cast<Lane>(rank)), keys = key_of_rank(rank);
      skip -= bits_as<Lane>((keys == low) & (ranks < first));
      take -= bits_as<Lane>((keys == high) & (ranks < first + static_cast<Lane>(count)));
    }
    *bounds = {low, high, skip, take};
    return true;
  }

  template <typename Consumer>
  static void select_by_radix(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks ranks,
                              Consumer& consumer) {
    const std::int64_t count = ranks.count(num_rows);
    const Scratch memory(BitPlanes<Lane>::scratch_words(num_rows) * sizeof(Words));
    BitPlanes<Lane> planes(num_rows, memory.as<Words>());
    const bool collide = rows_collide(rows, num_rows);
    CopiedTiles<true> copies(rows, num_rows, columns, collide);
    RankedValues<Lane> low, high;
    std::uint32_t first_ranks[kGroup];
    // Of each column: how many are still to be skipped and taken among those who tie with the bounds.
    std::int64_t to_skip[kColumns], to_take[kColumns];
    Bounds bounds[kTileVectors];

    for (std::int64_t column = 0; column < columns; column += kColumns) {
      const int width = static_cast<int>(least<std::int64_t>(columns - column, kColumns));
      const ColumnsCopy<kColumns>& copy = copies.at(column);
      for (int group = 0; group < width; group += kGroup) {
        TileFetcher<true> fetcher(rows, num_rows, column + group, collide ? &copies : nullptr);
        planes.fill_from(copy.rows, group, kNegativeInfinity, fetcher);
        find_first_ranks(&planes, num_rows, ranks, first_ranks);
        planes.select([&](int i) { return first_ranks[i]; }, &low);
        fetcher.finish();
        planes.select([&](int i) { return first_ranks[i] + count - 1; }, &high);
        for (int i = 0; i < kGroup; ++i) {
          to_skip[group + i] = std::int64_t{first_ranks[i]} - low.below[i];
          to_take[group + i] = first_ranks[i] + count - high.below[i];
        }
        for (int i = 0; i < kGroup; i += kElements) {
          bounds[(group + i) / kElements].low = load<Lane>(low.key + i);
          bounds[(group + i) / kElements].high = load<Lane>(high.key + i);
        }
      }

      consumer.begin(column, width);
      // As many rows at a time as 16-bit lanes can count.
      constexpr std::int64_t kAtATime = 16384;
      for (std::int64_t first = 0; first < num_rows; first += kAtATime) {
        const int vectors = (width + kElements - 1) / kElements;
        for (int vector = 0; vector < vectors; ++vector) {
          alignas(kVectorBytes) Lane skip[kElements], take[kElements];
          for (int i = 0; i < kElements; ++i) {
            skip[i] = static_cast<Lane>(least(to_skip[vector * kElements + i], kAtATime));
            take[i] = static_cast<Lane>(least(to_take[vector * kElements + i], kAtATime));
          }
          bounds[vector].skip = load<Lane>(skip);
          bounds[vector].take = load<Lane>(take);
        }
        KeptRows{copy.values + first * kColumns, first, least(num_rows - first, kAtATime), column, width, bounds, true}
            .give_to(consumer);
        if (num_rows - first <= kAtATime) break;
        for (int i = 0; i < vectors * kElements; ++i) {
          const Bounds& left = bounds[i / kElements];
          to_skip[i] -= least(to_skip[i], kAtATime) - left.skip[i % kElements];
          to_take[i] -= least(to_take[i], kAtATime) - left.take[i % kElements];
        }
      }
      consumer.end(column, width);
    }
  }

  // ---- The kernels --------------------------------------------------------------------------------------------------

  static void mean(const void* const* rows, std::int64_t num_rows, std::int64_t columns, KeptRanks kept, void* out) {
    const auto by = num_rows <= kRows ? mean_by_network : mean_by_radix;
    by(rows, num_rows, columns, kept, static_cast<Accumulator*>(out));
  }

  static void selected_mean(const void* const* rows, const void* const* tangents, std::int64_t num_rows,
                            std::int64_t columns, KeptRanks kept, void* out) {
    TangentSum consumer{tangents, kept.count(num_rows), static_cast<Accumulator*>(out), {}};
    const auto by = num_rows <= kRows ? select_by_network<TangentSum> : select_by_radix<TangentSum>;
    by(rows, num_rows, columns, kept, consumer);
  }

  static void spread(const void* const* rows, const void* cotangent, std::int64_t num_rows, std::int64_t columns,
                     KeptRanks kept, void* const* out) {
    CotangentSpread consumer{
        static_cast<const Accumulator*>(cotangent), kept.count(num_rows), out, should_stream(out, num_rows), {}};
    const auto by = num_rows <= kRows ? select_by_network<CotangentSpread> : select_by_radix<CotangentSpread>;
    by(rows, num_rows, columns, kept, consumer);
    if (consumer.streams) stream_fence();
  }

  // Output too large for the caches had better not pass through them, if its alignment allows.
  static bool should_stream(void* const* out, std::int64_t num_rows) {
    constexpr std::uintptr_t kLargeBytes = std::uintptr_t{8} << 20;
    const auto address = [&](std::int64_t row) { return reinterpret_cast<std::uintptr_t>(out[row]); };
    if (address(num_rows - 1) - address(0) < kLargeBytes) return false;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      if (address(row) % kCacheLineBytes != 0) return false;
    }
    return true;
  }

  static constexpr OrderStatisticKernels kKernels = {mean, selected_mean, spread};
};

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_ORDER_STATISTICS_IMPL_H_
