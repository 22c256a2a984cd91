// Searches of columns for keys by their ranks, for more clients than a selection network has room for. A block has some
// columns; each thread has one of them (of 16-bit types, it may have two) and some of the clients.
#ifndef FEDFUSE_CUDA_SEARCHES_H_
#define FEDFUSE_CUDA_SEARCHES_H_

#include <cstdint>
#include <type_traits>

#include "cuda/clients.h"
#include "cuda/order_statistics.h"
#include "math/bit_planes.h"

namespace fedfuse {
namespace cuda {

inline constexpr int kSides = 2;  // the least and the greatest kept rank

// The columns of a tile.
template <Type type>
struct Columns {
  using Bits = typename Element<type>::Bits;
  using Unsigned = std::make_unsigned_t<Bits>;
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Bits));
  static constexpr int kRowsInFlight = 4;

  const Bits* updates;
  std::int64_t stride;
  std::int64_t clients;
  const std::uint8_t* where;
  bool merges_zeros;

  FEDFUSE_DEVICE bool has(std::int64_t client) const {
    return client < clients && (where == nullptr || where[client] != 0);
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

  static FEDFUSE_DEVICE Bits signed_key(Unsigned key) {
    return static_cast<Bits>(static_cast<Unsigned>(key ^ (Unsigned{1} << (kKeyBits - 1))));
  }
};

// For each column and side: the key of the wanted rank, without a sign, in the same order; the rank that is wanted, and
// after the search the rank among the keys that are equal; how many those are. `group_counts` is scratch.
template <Type type, int kTileColumns, int kGroups>
struct RankedKeys {
  typename Columns<type>::Unsigned prefixes[kSides][kTileColumns];
  std::uint32_t ranks[kSides][kTileColumns];
  std::uint32_t equal[kSides][kTileColumns];
  std::uint32_t group_counts[kSides][kGroups][kTileColumns];
};

// ---- By bytes -------------------------------------------------------------------------------------------------------

// Any number of clients: counts how often each value of the keys' topmost byte occurs, which tells the byte of the
// wanted ranks; then, among the keys that begin so, the next byte. Counts are integers in shared memory, so nothing
// depends on the order of the threads. Until a key is known, its prefix has the bits known so far, the others 0.
template <Type kKeyType>
struct RadixSearch {
  static constexpr Type type = kKeyType;
  using Bits = typename Columns<type>::Bits;
  using Unsigned = typename Columns<type>::Unsigned;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kTileColumns = 16;
  static constexpr int kGroups = kThreads / kTileColumns;  // of threads, each with a row
  static constexpr int kBits = 8;
  static constexpr int kBins = 1 << kBits;
  static constexpr int kBinsOfGroup = kBins / kGroups;
  static constexpr int kKeyBits = Columns<type>::kKeyBits;

  using Threads = Team<kThreads>;
  using Ranked = RankedKeys<type, kTileColumns, kGroups>;

  struct Shared {
    std::uint32_t counts[kSides][kBins][kTileColumns];
  };

  // Reads the columns anew for every byte, so there is nothing to prepare.
  static FEDFUSE_DEVICE void prepare(const Columns<type>&, std::int64_t, Shared&, Threads&) {}

  static FEDFUSE_DEVICE void select(const Columns<type>& columns, std::int64_t width, Ranked& ranked, Shared& shared,
                                    Threads& team) {
    team.each([&](int thread, Nothing&) {
      if (thread < kSides * kTileColumns) ranked.prefixes[thread / kTileColumns][thread % kTileColumns] = 0;
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
        if (column < width) count_bytes(columns, group, column, shift, ranked, shared);
      });
      team.each([&](int thread, Nothing&) {
        const int group = thread / kTileColumns, column = thread % kTileColumns;
        for (int side = 0; side < kSides; ++side) {
          std::uint32_t count = 0;
          for (int i = 0; i < kBinsOfGroup; ++i) count += shared.counts[side][group * kBinsOfGroup + i][column];
          ranked.group_counts[side][group][column] = count;
        }
      });
      team.each([&](int thread, Nothing&) {
        if (thread < width) choose_bytes(thread, shift, ranked, shared);
      });
    }
  }

  static FEDFUSE_DEVICE void count_bytes(const Columns<type>& columns, int group, int column, int shift,
                                         const Ranked& ranked, Shared& shared) {
    const Unsigned low = ranked.prefixes[0][column], high = ranked.prefixes[1][column];
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

  static FEDFUSE_DEVICE void choose_bytes(int column, int shift, Ranked& ranked, const Shared& shared) {
    // Until the two sides part, what is counted for the one is true of the other.
    const bool parted = ranked.prefixes[0][column] != ranked.prefixes[1][column];
    for (int side = 0; side < kSides; ++side) {
      const int counted = parted ? side : 0;
      std::uint32_t rank = ranked.ranks[side][column];
      int group = 0;
      while (group < kGroups - 1 && rank >= ranked.group_counts[counted][group][column]) {
        rank -= ranked.group_counts[counted][group++][column];
      }
      int byte = group * kBinsOfGroup;
      while (byte < (group + 1) * kBinsOfGroup - 1 && rank >= shared.counts[counted][byte][column]) {
        rank -= shared.counts[counted][byte++][column];
      }
      ranked.ranks[side][column] = rank;
      ranked.equal[side][column] = shared.counts[counted][byte][column];
      ranked.prefixes[side][column] =
          static_cast<Unsigned>(ranked.prefixes[side][column] | static_cast<Unsigned>(byte) << shift);
    }
  }
};

// ---- By bits --------------------------------------------------------------------------------------------------------

// Up to 32 clients a warp, whose keys are transposed to bit planes in registers: the updates are read once, however
// many ranks are asked for. From the top plane down, counting the candidates with a zero bit, in a thread and then over
// the warps, tells on which side of them the wanted rank lies, which decides this bit of its key and who remains a
// candidate.
template <Type kKeyType, int kWarps>
struct BitPlaneSearch {
  static constexpr Type type = kKeyType;
  using Bits = typename Columns<type>::Bits;
  using Unsigned = typename Columns<type>::Unsigned;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kClients = 32 * kWarps;  // the most
  static constexpr int kPlanes = Columns<type>::kKeyBits;
  static constexpr int kColumns = kPlanes == 16 ? 2 : 1;  // a thread's
  static constexpr int kTileColumns = 32 * kColumns;
  static constexpr int kGroups = kThreads / kTileColumns;
  static constexpr int kWords = kColumns * kPlanes;
  // Keys, as many to a word as find room.
  using KeyWord = std::conditional_t<kPlanes == 64, std::uint64_t, std::uint32_t>;
  static constexpr int kKeysOfWord = 8 * static_cast<int>(sizeof(KeyWord)) / kPlanes;
  static constexpr int kKeyWords = kColumns * kSides / kKeysOfWord;
  // Registers for the planes, the search, and what else is going on.
  static constexpr int kBlocks = 65536 / ((kWords <= 32 ? 64 : 128) * kThreads);
  static_assert(kClients < 1 << 16, "ranks and counts have half a word");

  // What a thread holds in registers: the planes of its first column, then those of its second.
  struct State {
    std::uint32_t planes[kWords];
    std::uint32_t present;
    std::uint32_t candidates[kColumns][kSides];
    std::uint32_t ranks[kColumns];  // of the first side in the lower half, of the second in the upper
    KeyWord keys[kKeyWords];
  };
  using Threads = Team<kThreads, State>;
  using Ranked = RankedKeys<type, kTileColumns, kGroups>;

  struct Shared {
    PresentClients<kThreads> present;
    // Of three planes in turn: one is counted while the one before is read and the one after is cleared. As ranks are,
    // two to a word.
    std::uint32_t counts[3][kColumns][32];
  };

  static FEDFUSE_DEVICE void prepare(const Columns<type>& columns, std::int64_t width, Shared& shared, Threads& team) {
    shared.present.find(columns.where, 0, columns.clients, team);
    team.each([&](int thread, State& state) {
      state.present = shared.present.words[thread / 32];
      const int column = thread % 32 * kColumns;
      if (column < width) {
        load(columns, thread / 32 * 32, column, width - column, state);
      } else {
        for (int word = 0; word < kWords; ++word) state.planes[word] = 0;
      }
    });
  }

  static FEDFUSE_DEVICE void select(const Columns<type>&, std::int64_t, Ranked& ranked, Shared& shared, Threads& team) {
    team.each([&](int thread, State& state) {
      for (int i = 0; i < kColumns; ++i) {
        const int column = thread % 32 * kColumns + i;
        state.candidates[i][0] = state.candidates[i][1] = state.present;
        state.ranks[i] = ranked.ranks[0][column] | ranked.ranks[1][column] << 16;
        if (thread < 32) shared.counts[0][i][thread] = 0;
      }
      for (int word = 0; word < kKeyWords; ++word) state.keys[word] = 0;
    });
#pragma unroll
    for (int pass = 0; pass <= kPlanes; ++pass) {
      team.each([&](int thread, State& state) {
        const int plane = kPlanes - 1 - pass;
        for (int i = 0; i < kColumns; ++i) {
          if (pass > 0) narrow(shared.counts[(pass - 1) % 3][i][thread % 32], i, plane + 1, state);
          // After the last plane the candidates are the keys that are equal.
          const std::uint32_t ones = plane < 0 ? 0 : state.planes[i * kPlanes + plane];
          const int first = count_bits(state.candidates[i][0] & ~ones);
          const int second = count_bits(state.candidates[i][1] & ~ones);
          add_to_shared(&shared.counts[pass % 3][i][thread % 32], static_cast<std::uint32_t>(first | second << 16));
          if (thread < 32) shared.counts[(pass + 1) % 3][i][thread] = 0;
        }
      });
    }
    team.each([&](int thread, State& state) {
      if (thread >= 32) return;
      for (int i = 0; i < kColumns; ++i) {
        const std::uint32_t equal = shared.counts[kPlanes % 3][i][thread];
        for (int side = 0; side < kSides; ++side) {
          const int key = i * kSides + side;
          ranked.prefixes[side][thread * kColumns + i] =
              static_cast<Unsigned>(state.keys[key / kKeysOfWord] >> key % kKeysOfWord * kPlanes);
          ranked.ranks[side][thread * kColumns + i] = state.ranks[i] >> 16 * side & 0xffffu;
          ranked.equal[side][thread * kColumns + i] = equal >> 16 * side & 0xffffu;
        }
      }
    });
  }

 private:
  // The keys of a thread's 32 clients, transposed. Whoever is not present is no candidate: any key will do.
  static FEDFUSE_DEVICE void load(const Columns<type>& columns, int client, int column, std::int64_t width,
                                  State& state) {
    const Bits* row = columns.updates + client * columns.stride + column;
    const bool aligned = is_aligned(row, kColumns * sizeof(Bits)) && columns.stride % kColumns == 0;
    // All loads are on their way before the first is waited for.
    std::conditional_t<kColumns == 2, std::uint32_t, Bits> bits[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      bits[i] = 0;
      if ((state.present >> i & 1u) != 0) {
        if constexpr (kColumns == 2) {
          bits[i] = load_halves(row, aligned, width);
        } else {
          bits[i] = *row;
        }
      }
      row = next_row(row, columns.stride);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if constexpr (kColumns == 2) {
        const std::uint32_t first = columns.key(static_cast<Bits>(bits[i] & 0xffffu));
        state.planes[i] = first | static_cast<std::uint32_t>(columns.key(static_cast<Bits>(bits[i] >> 16))) << 16;
      } else {
        const Unsigned key = columns.key(bits[i]);
        state.planes[i] = static_cast<std::uint32_t>(key);
        if constexpr (kPlanes == 64) state.planes[32 + i] = static_cast<std::uint32_t>(key >> 32);
      }
    }
    transpose_bits(state.planes);
    if constexpr (kPlanes == 64) transpose_bits(state.planes + 32);
  }

  // From how many candidates of each side have a zero in this plane.
  static FEDFUSE_DEVICE void narrow(std::uint32_t counts, int i, int plane, State& state) {
    const std::uint32_t ones = state.planes[i * kPlanes + plane];
    for (int side = 0; side < kSides; ++side) {
      const std::uint32_t zeros = counts >> 16 * side & 0xffffu;
      const bool is_one = (state.ranks[i] >> 16 * side & 0xffffu) >= zeros;
      if (is_one) state.ranks[i] -= zeros << 16 * side;
      state.candidates[i][side] &= is_one ? ones : ~ones;
      const int key = i * kSides + side;
      state.keys[key / kKeysOfWord] |= KeyWord{is_one} << (key % kKeysOfWord * kPlanes + plane);
    }
  }
};

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_SEARCHES_H_
