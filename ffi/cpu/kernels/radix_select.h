// Order statistics of any number of rows by radix selection on bit planes.
//
// The keys of 32 rows are transposed as a matrix of bits: plane p then holds bit p of all 32 in one word. From the top
// plane down, counting the candidates with a zero bit tells on which side of them the wanted rank lies, which decides
// this bit of its key and who remains a candidate. Exact, and linear in the number of rows.
//
// For files compiled once per instruction set; see simd.h.
#ifndef FEDFUSE_CPU_KERNELS_RADIX_SELECT_H_
#define FEDFUSE_CPU_KERNELS_RADIX_SELECT_H_

#include <cstdint>

#include "cpu/kernels/elements.h"
#include "cpu/kernels/simd.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

using Words = Vector<std::uint32_t>;
constexpr int kWordLanes = kLanes<std::uint32_t>;
constexpr int kBlockRows = 32;

// Exchanges the upper half of each group of 2 * kDistance bits of a with the lower half of that of b.
template <int kDistance>
FEDFUSE_INLINE void exchange(Words& a, Words& b, std::uint32_t lower_half) {
  const Words lower = fill(lower_half);
  const Words swapped = select_bits(lower, b, a >> kDistance);
  a = select_bits(lower, b << kDistance, a);
  // `swapped` has the new lower halves of b; its upper halves are b's own.
  b = swapped;
}

// Transposes kSize x kSize bits, in every kSize bits of the lanes of kSize vectors.
template <int kSize>
FEDFUSE_INLINE void transpose_bits(Words* words) {
  for (int i = 0; i < 8; ++i) {
    if constexpr (kSize == 32) {
      Words a = words[i], b = words[i + 8], c = words[i + 16], d = words[i + 24];
      exchange<16>(a, c, 0x0000ffffu);
      exchange<16>(b, d, 0x0000ffffu);
      exchange<8>(a, b, 0x00ff00ffu);
      exchange<8>(c, d, 0x00ff00ffu);
      words[i] = a, words[i + 8] = b, words[i + 16] = c, words[i + 24] = d;
    } else {
      exchange<8>(words[i], words[i + 8], 0x00ff00ffu);
    }
  }
  for (int i = 0; i < kSize; i += 8) {
    Words a = words[i], b = words[i + 1], c = words[i + 2], d = words[i + 3];
    Words e = words[i + 4], f = words[i + 5], g = words[i + 6], h = words[i + 7];
    exchange<4>(a, e, 0x0f0f0f0fu);
    exchange<4>(b, f, 0x0f0f0f0fu);
    exchange<4>(c, g, 0x0f0f0f0fu);
    exchange<4>(d, h, 0x0f0f0f0fu);
    exchange<2>(a, c, 0x33333333u);
    exchange<2>(b, d, 0x33333333u);
    exchange<2>(e, g, 0x33333333u);
    exchange<2>(f, h, 0x33333333u);
    exchange<1>(a, b, 0x55555555u);
    exchange<1>(c, d, 0x55555555u);
    exchange<1>(e, f, 0x55555555u);
    exchange<1>(g, h, 0x55555555u);
    words[i] = a, words[i + 1] = b, words[i + 2] = c, words[i + 3] = d;
    words[i + 4] = e, words[i + 5] = f, words[i + 6] = g, words[i + 7] = h;
  }
}

// How the keys of a group of columns lie in 32-bit words. A group has kBatches * kWordLanes columns; the words of one
// batch are selected in together.
template <typename Lane>
struct GroupLayout;

template <>
struct GroupLayout<std::int32_t> {
  static constexpr int kVectors = 1;  // vectors of elements in a row of the group
  static constexpr int kBatches = 1;
  static constexpr int kPlanes = 32;

  static constexpr int batch(int) { return 0; }
  static constexpr int lane(int column) { return column; }

  // Turns the unsigned keys of 32 rows into planes: words[batch * kPlanes + plane].
  static FEDFUSE_INLINE void make_planes(Words* words) { transpose_bits<32>(words); }

  // Puts row `row` of 32 where make_planes wants it.
  static FEDFUSE_INLINE void place(const Vector<std::int32_t> keys[kVectors], int row,
                                   Words* words) {
    words[row] = bits_as<std::uint32_t>(keys[0]);
  }
};

// Even columns make one batch, odd columns the other; rows r and r + 16 share words, one in each half.
template <>
struct GroupLayout<std::int16_t> {
  static constexpr int kVectors = 1;
  static constexpr int kBatches = 2;
  static constexpr int kPlanes = 16;

  static constexpr int batch(int column) { return column % 2; }
  static constexpr int lane(int column) { return column / 2; }

  static FEDFUSE_INLINE void make_planes(Words* words) {
    for (int row = 0; row < 16; ++row) {
      const Words a = words[row], b = words[row + 16];
      words[row] = select_bits(fill(0xffff0000u), a, b << 16);
      words[row + 16] = select_bits(fill(0xffff0000u), a >> 16, b);
    }
    transpose_bits<16>(words);
    transpose_bits<16>(words + 16);
  }

  static FEDFUSE_INLINE void place(const Vector<std::int16_t> keys[kVectors], int row,
                                   Words* words) {
    words[row] = bits_as<std::uint32_t>(keys[0]);
  }
};

// Upper words make the upper 32 planes, lower words the others; column c shares a 64-bit lane with column
// c + kWordLanes / 2.
template <>
struct GroupLayout<std::int64_t> {
  static constexpr int kVectors = 2;
  static constexpr int kBatches = 1;
  static constexpr int kPlanes = 64;

  static constexpr int batch(int) { return 0; }
  static constexpr int lane(int column) {
    return 2 * (column % (kWordLanes / 2)) + column / (kWordLanes / 2);
  }

  static FEDFUSE_INLINE void make_planes(Words* words) {
    transpose_bits<32>(words);
    transpose_bits<32>(words + 32);
  }

  static FEDFUSE_INLINE void place(const Vector<std::int64_t> keys[kVectors], int row,
                                   Words* words) {
    const Vector<std::uint64_t> a = bits_as<std::uint64_t>(keys[0]);
    const Vector<std::uint64_t> b = bits_as<std::uint64_t>(keys[1]);
    words[row] = bits_as<std::uint32_t>((a & 0xffffffffu) | (b << 32));
    words[row + 32] = bits_as<std::uint32_t>((a >> 32) | (b & ~std::uint64_t{0xffffffffu}));
  }
};

template <typename Lane>
constexpr int kGroupColumns = kWordLanes * GroupLayout<Lane>::kBatches;

// What is known of the value of some rank in each column of a group.
template <typename Lane>
struct RankedValues {
  alignas(kVectorBytes) Lane key[kGroupColumns<Lane>];
  std::uint32_t below[kGroupColumns<Lane>];  // how many values are smaller
  std::uint32_t equal[kGroupColumns<Lane>];  // how many are equal
};

// The bit planes of one group of columns.
template <typename Lane>
class BitPlanes {
 public:
  using Layout = GroupLayout<Lane>;

  static std::int64_t blocks_of(std::int64_t num_rows) {
    return (num_rows + kBlockRows - 1) / kBlockRows;
  }

  // Vectors of scratch needed.
  static std::int64_t scratch_words(std::int64_t num_rows) {
    return blocks_of(num_rows) * (Layout::kBatches * Layout::kPlanes + 1);
  }

  BitPlanes(std::int64_t num_rows, Words* scratch)
      : num_rows_(num_rows),
        blocks_(blocks_of(num_rows)),
        candidates_(scratch),
        planes_(scratch + blocks_) {}

  // Transposes the group of columns that begins at `column`. before_row(row) is called on the way.
  template <typename BeforeRow>
  void fill_from(const void* const* rows, std::int64_t column, Lane negative_infinity,
                 BeforeRow before_row) {
    const Vector<Lane> lowest = fill<Lane>(negative_infinity);
    // Signed to unsigned order.
    const Vector<Lane> sign = fill<Lane>(static_cast<Lane>(~kGreatestKey<Lane>));
    for (std::int64_t block = 0; block < blocks_; ++block) {
      Words words[kBatchPlanes] = {};
      const std::int64_t first = block * kBlockRows;
      const int count = static_cast<int>(num_rows_ - first < kBlockRows ? num_rows_ - first : kBlockRows);
      for (int row = 0; row < count; ++row) {
        before_row(first + row);
        const Lane* const values = static_cast<const Lane*>(rows[first + row]) + column;
        Vector<Lane> keys[Layout::kVectors];
        for (int vector = 0; vector < Layout::kVectors; ++vector) {
          keys[vector] =
              value_keys<Lane>(load<Lane>(values + vector * kLanes<Lane>), lowest) ^ sign;
        }
        Layout::place(keys, row, words);
      }
      Layout::make_planes(words);
      for (int plane = 0; plane < kBatchPlanes; ++plane) {
        planes_[plane * blocks_ + block] = words[plane];
      }
    }
  }

  // Finds the value of this rank in each column.
  void select(std::int64_t rank, RankedValues<Lane>* result) {
    for (int batch = 0; batch < Layout::kBatches; ++batch) {
      Words key[(Layout::kPlanes + 31) / 32], below, equal;
      select_in(planes_ + batch * Layout::kPlanes * blocks_, static_cast<std::uint32_t>(rank), key,
                &below, &equal);
      for (int column = 0; column < kGroupColumns<Lane>; ++column) {
        if (Layout::batch(column) != batch) continue;
        const int lane = Layout::lane(column);
        std::uint64_t bits = key[0][lane];
        if constexpr (Layout::kPlanes == 64) bits |= std::uint64_t{key[1][lane]} << 32;
        result->key[column] = static_cast<Lane>(static_cast<Lane>(bits) ^ ~kGreatestKey<Lane>);
        result->below[column] = below[lane];
        result->equal[column] = equal[lane];
      }
    }
  }

 private:
  static constexpr int kBatchPlanes = Layout::kBatches * Layout::kPlanes;

  void select_in(const Words* planes, std::uint32_t rank, Words* key, Words* below, Words* equal) {
    for (std::int64_t block = 0; block < blocks_; ++block) candidates_[block] = ~Words{};
    const int rest = static_cast<int>(num_rows_ % kBlockRows);
    if (rest != 0) candidates_[blocks_ - 1] = fill((std::uint32_t{1} << rest) - 1);

    // Each pass narrows the candidates by the plane before it, of which `flip` says which bits stay: those that
    // differ from it.
    Words remaining = fill(rank);
    const Words* previous = nullptr;
    Words flip{};
    for (int plane = Layout::kPlanes - 1; plane >= 0; --plane) {
      const Words* const current = planes + plane * blocks_;
      Words zeros{};
      for (std::int64_t block = 0; block < blocks_; ++block) {
        if (previous != nullptr) candidates_[block] &= previous[block] ^ flip;
        zeros += count_bits(candidates_[block] & ~current[block]);
      }
      const Words is_one = bits_as<std::uint32_t>(remaining >= zeros);
      remaining -= zeros & is_one;
      key[plane / 32] = (plane % 32 == 31 || plane == Layout::kPlanes - 1 ? Words{} : key[plane / 32] << 1) - is_one;
      flip = ~is_one;
      previous = current;
    }
    *equal = Words{};
    for (std::int64_t block = 0; block < blocks_; ++block) {
      *equal += count_bits(candidates_[block] & (previous[block] ^ flip));
    }
    *below = rank - remaining;
  }

  std::int64_t num_rows_;
  std::int64_t blocks_;
  Words* candidates_;
  Words* planes_;  // [batch][plane][block]
};

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_RADIX_SELECT_H_
