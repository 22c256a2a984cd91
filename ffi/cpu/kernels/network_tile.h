// Order statistics of up to 128 rows by selection networks, a tile of columns at a time.
// For files compiled once per instruction set; see simd.h.
#ifndef FEDFUSE_CPU_KERNELS_NETWORK_TILE_H_
#define FEDFUSE_CPU_KERNELS_NETWORK_TILE_H_

#include <cstdint>

#include "cpu/kernels/elements.h"
#include "cpu/kernels/simd.h"
#include "generated/networks.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

// A tile is so many bytes of each row. Memory likes a few lines in a row better than one from each of many pages.
constexpr int kTileBytes = 256;
constexpr int kTileVectors = kTileBytes / kVectorBytes;
constexpr int kTileLines = kTileBytes / kCacheLineBytes;
template <typename Lane>
constexpr int kTileColumns = kTileBytes / static_cast<int>(sizeof(Lane));

// More rows than this are faster by radix selection: values of 64 bits take twice the registers. All families must have
// these sizes.
template <typename Lane>
constexpr int kMaxNetworkRows = sizeof(Lane) == 8 ? 96 : 128;

// Fetches a line's worth of bytes; not to L1, which a tile of many rows would fill. If they are of two lines, it is the
// second that is missing: the first came with the bytes before. The address may lie outside the array.
FEDFUSE_INLINE void fetch_to_l2(const void* pointer, std::int64_t bytes) {
  const std::int64_t last = bytes + kCacheLineBytes - 1;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer) + static_cast<std::uintptr_t>(last);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Fewer rows than this are streams that the processor fetches ahead by itself, and better.
constexpr int kFewestFetchedRows = 17;

// Runs a network on one vector of columns of a tile whose rows, pads among them, begin at `rows`, and stores its
// outputs. Meanwhile asks for this vector's share of what lies kTileBytes after `fetched`, the tile in memory: whole
// tile rows of some of the rows, a line every few loads.
template <typename Network, typename Lane>
__attribute__((noinline)) void run_network(const Lane* const* rows, const Lane* const* fetched, int vector,
                                           Lane negative_infinity, Lane* outputs) {
  constexpr bool kFetches = Network::kInputs >= kFewestFetchedRows;
  constexpr int kLoadsPerLine = kCacheLineBytes / kVectorBytes;
  constexpr int kShare = (Network::kInputs + kTileVectors - 1) / kTileVectors;  // in rows
  const int column = vector * kLanes<Lane>;
  const Vector<Lane> lowest = fill<Lane>(negative_infinity);

  fetched += vector * kShare;
  const auto fetch = [&](int line) __attribute__((always_inline)) {
    fetch_to_l2(fetched[line / kTileLines], kTileBytes + line % kTileLines * kCacheLineBytes);
  };
  if constexpr (kFetches) {
    // The lines for which there are not loads enough.
    for (int line = (Network::kInputs + kLoadsPerLine - 1) / kLoadsPerLine; line < kShare * kTileLines; ++line) {
      fetch(line);
    }
  }
  Network::template run<KeyVector<Lane>>(
      [&](int input) __attribute__((always_inline)) {
        if (kFetches && input % kLoadsPerLine == 0) fetch(input / kLoadsPerLine);
        return KeyVector<Lane>{value_keys<Lane>(load<Lane>(rows[input] + column), lowest)};
      },
      [&](int output, KeyVector<Lane> keys)
          __attribute__((always_inline)) { store(outputs + output * kLanes<Lane>, keys.native); });
}

template <typename Lane>
struct NetworkEntry {
  int inputs;
  int first_rank;
  void (*run)(const Lane* const* rows, const Lane* const* fetched, int vector, Lane negative_infinity, Lane* outputs);
};

template <typename Network, typename Lane>
constexpr NetworkEntry<Lane> make_entry() {
  return {Network::kInputs, Network::kFirstRank, run_network<Network, Lane>};
}

// The first network of a family with room for num_rows, at most kMaxNetworkRows.
template <typename Lane, template <int> class Family, int... kSizes>
NetworkEntry<Lane> find_network(NetworkSizes<kSizes...>, std::int64_t num_rows) {
  static constexpr NetworkEntry<Lane> kEntries[] = {[] {
    if constexpr (kSizes <= kMaxNetworkRows<Lane>) {
      return make_entry<Family<kSizes>, Lane>();
    } else {
      return NetworkEntry<Lane>{};
    }
  }()...};
  int index = 0;
  while (kEntries[index].inputs < num_rows) ++index;
  return kEntries[index];
}

template <typename Lane>
NetworkEntry<Lane> sort_network(std::int64_t num_rows) {
  return find_network<Lane, SortNetwork>(SortNetworkSizes{}, num_rows);
}

// The cheapest network among whose outputs are all the kept values, and in place the only two if those are two.
template <typename Lane>
NetworkEntry<Lane> mean_network(std::int64_t num_rows, std::int64_t trim) {
  if (num_rows - 2 * trim <= 2) {
    return find_network<Lane, MedianNetwork>(MedianNetworkSizes{}, num_rows);
  }
  if (num_rows >= kFewestTrimmed && trim == static_cast<std::int64_t>(kTrimFraction * static_cast<double>(num_rows))) {
    return find_network<Lane, TrimmedMeanNetwork>(TrimmedMeanNetworkSizes{}, num_rows);
  }
  return sort_network<Lane>(num_rows);
}

// A network with its input rows, which move over the columns tile by tile.
template <typename Lane>
class NetworkTile {
 public:
  static constexpr int kMaxOutputs = kMaxNetworkRows<Lane>;

  NetworkTile(NetworkEntry<Lane> network, std::int64_t num_rows, Lane negative_infinity)
      : network_(network),
        num_rows_(static_cast<int>(num_rows)),
        low_pads_((network.inputs - static_cast<int>(num_rows)) / 2),
        negative_infinity_(negative_infinity) {
    constexpr Lane kGreatest = kGreatestKey<Lane>;
    const Lane lowest = flip_negative<8 * sizeof(Lane), Lane>(negative_infinity, kGreatest);
    for (int column = 0; column < kTileColumns<Lane>; ++column) {
      low_pad_[column] = lowest;
      high_pad_[column] = kGreatest;
    }
    for (int input = 0; input < kMaxInputs; ++input) {
      inputs_[input] = fetched_[input] = input < low_pads_ ? low_pad_ : high_pad_;
    }
  }
  NetworkTile(const NetworkTile&) = delete;
  NetworkTile& operator=(const NetworkTile&) = delete;

  // Works on the rows from this column on: a whole tile is read there.
  FEDFUSE_INLINE void point_at(const void* const* rows, std::int64_t column) { set_rows(inputs_, rows, column); }

  // Fetches what comes after the tile at this column while working.
  FEDFUSE_INLINE void fetch_after(const void* const* rows, std::int64_t column) { set_rows(fetched_, rows, column); }

  // Of how many rows the next tile has been asked for after this vector.
  int rows_fetched(int vector) const {
    const int rows = (vector + 1) * ((network_.inputs + kTileVectors - 1) / kTileVectors) - low_pads_;
    return rows < 0 ? 0 : rows < num_rows_ ? rows : num_rows_;
  }

  // Which output holds the value of this rank.
  int output_of_rank(std::int64_t rank) const { return static_cast<int>(rank) + low_pads_ - network_.first_rank; }

  // Runs the network on a vector of the tile.
  FEDFUSE_INLINE void run(int vector, Lane* outputs) const {
    network_.run(inputs_, fetched_, vector, negative_infinity_, outputs);
  }

 private:
  static constexpr int kMaxInputs = kMaxNetworkRows<Lane> + kTileVectors;  // shares are rounded up

  FEDFUSE_INLINE void set_rows(const Lane** table, const void* const* rows, std::int64_t column) {
    for (int row = 0; row < num_rows_; ++row) {
      table[low_pads_ + row] = static_cast<const Lane*>(rows[row]) + column;
    }
  }

  NetworkEntry<Lane> network_;
  int num_rows_;
  int low_pads_;
  Lane negative_infinity_;
  const Lane* inputs_[kMaxInputs];
  const Lane* fetched_[kMaxInputs];
  alignas(kCacheLineBytes) Lane low_pad_[kTileColumns<Lane>];
  alignas(kCacheLineBytes) Lane high_pad_[kTileColumns<Lane>];
};

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_NETWORK_TILE_H_
