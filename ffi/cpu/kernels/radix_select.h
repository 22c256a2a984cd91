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

// Transposes kSize x kSize bits, in every kSize bits of the lanes: row(i) gives what has row i of all the matrices,
// put(i, words) takes their column i. In two steps for the registers, and by selects, unlike math/bit_planes.h.
template <int kSize, typename Row, typename Put>
FEDFUSE_INLINE void transpose_bits(Row row, Put put) {
  Words words[kSize];
  for (int i = 0; i < 8; ++i) {
    Words a = row(i), b = row(i + 8);
    if constexpr (kSize == 32) {
      Words c = row(i + 16), d = row(i + 24);
      exchange<16>(a, c, 0x0000ffffu);
      exchange<16>(b, d, 0x0000ffffu);
      exchange<8>(c, d, 0x00ff00ffu);
      words[i + 16] = c, words[i + 24] = d;
    }
    exchange<8>(a, b, 0x00ff00ffu);
    words[i] = a, words[i + 8] = b;
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
    put(i, a), put(i + 1, b), put(i + 2, c), put(i + 3, d);
    put(i + 4, e), put(i + 5, f), put(i + 6, g), put(i + 7, h);
  }
}

// How the keys of a group of columns lie in 32-bit words. A group has kBatches * kWordLanes columns; the words of one
// batch are searched together. make_planes(keys, put) transposes 32 rows: keys(row, vector) gives their unsigned keys,
// put(batch * kPlanes + plane, words) takes the planes.
template <typename Lane>
struct GroupLayout;

template <>
struct GroupLayout<std::int32_t> {
  static constexpr int kVectors = 1;  // vectors of elements in a row of the group
  static constexpr int kBatches = 1;
  static constexpr int kPlanes = 32;

  static constexpr int column(int, int lane) { return lane; }

  template <typename KeysOf, typename Put>
  static FEDFUSE_INLINE void make_planes(KeysOf keys, Put put) {
    transpose_bits<32>([&](int row) __attribute__((always_inline)) { return keys(row, 0); }, put);
  }
};

// Even columns make one batch, odd columns the other; rows r and r + 16 share words, one in each half.
template <>
struct GroupLayout<std::int16_t> {
  static constexpr int kVectors = 1;
  static constexpr int kBatches = 2;
  static constexpr int kPlanes = 16;

  static constexpr int column(int batch, int lane) { return 2 * lane + batch; }

  template <typename KeysOf, typename Put>
  static FEDFUSE_INLINE void make_planes(KeysOf keys, Put put) {
    Words odd[16];
    transpose_bits<16>(
        [&](int row) __attribute__((always_inline)) {
          const Words a = keys(row, 0), b = keys(row + 16, 0);
          odd[row] = select_bits(fill(0xffff0000u), a >> 16, b);
          return select_bits(fill(0xffff0000u), a, b << 16);
        },
        put);
    transpose_bits<16>([&](int row) __attribute__((always_inline)) { return odd[row]; },
                       [&](int plane, Words words) __attribute__((always_inline)) { put(kPlanes + plane, words); });
  }
};

// Upper words make the upper 32 planes, lower words the others; column c shares a 64-bit lane with column
// c + kWordLanes / 2.
template <>
struct GroupLayout<std::int64_t> {
  static constexpr int kVectors = 2;
  static constexpr int kBatches = 1;
  static constexpr int kPlanes = 64;

  static constexpr int column(int, int lane) { return lane / 2 + lane % 2 * (kWordLanes / 2); }

  template <typename KeysOf, typename Put>
  static FEDFUSE_INLINE void make_planes(KeysOf keys, Put put) {
    using Wide = Vector<std::uint64_t>;
    const Wide lower = fill(std::uint64_t{0xffffffffu});
    Words upper_words[32];
    transpose_bits<32>(
        [&](int row) __attribute__((always_inline)) {
          const Wide a = bits_as<std::uint64_t>(keys(row, 0));
          const Wide b = bits_as<std::uint64_t>(keys(row, 1));
          upper_words[row] = bits_as<std::uint32_t>((a >> 32) | (b & ~lower));
          return bits_as<std::uint32_t>((a & lower) | (b << 32));
        },
        put);
    transpose_bits<32>([&](int row) __attribute__((always_inline)) { return upper_words[row]; },
                       [&](int plane, Words words) __attribute__((always_inline)) { put(32 + plane, words); });
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

  // Vectors of scratch needed.
  static std::int64_t scratch_words(std::int64_t num_rows) { return stride_of(num_rows) * (kBatchPlanes + 1); }

  BitPlanes(std::int64_t num_rows, Words* scratch)
      : num_rows_(num_rows),
        blocks_(blocks_of(num_rows)),
        stride_(stride_of(num_rows)),
        candidates_(scratch),
        planes_(scratch + stride_) {}

  // Transposes the group of columns that begins at `column`. before_row(row) is called on the way.
  template <typename BeforeRow>
  void fill_from(const void* const* rows, std::int64_t column, Lane negative_infinity, BeforeRow& before_row) {
    const Vector<Lane> lowest = fill<Lane>(negative_infinity);
    const Vector<Lane> sign = fill<Lane>(static_cast<Lane>(~kGreatestKey<Lane>));
    const std::int64_t stride = stride_, num_rows = num_rows_;
    for (std::int64_t block = 0; block < blocks_; ++block) {
      Words* const planes = planes_ + block;
      Layout::make_planes(
          [&](int row, int vector) __attribute__((always_inline)) {
            std::int64_t index = block * kBlockRows + row;
            // In the last block the last row stands for those that are not there; they will be no candidates.
            if (index >= num_rows) index = num_rows - 1;
            if (vector == 0) before_row(index);
            const Lane* const values = static_cast<const Lane*>(rows[index]) + column + vector * kLanes<Lane>;
            // From signed to unsigned order by the sign bit.
            return bits_as<std::uint32_t>(value_keys<Lane>(load<Lane>(values), lowest) ^ sign);
          },
          [&](int plane, Words words) __attribute__((always_inline)) { planes[plane * stride] = words; });
    }
  }

  // Finds the value of this rank in each column.
  void select(std::int64_t rank, RankedValues<Lane>* result) {
    select([rank](int) { return rank; }, result);
  }

  // The same for rank_of(column).
  template <typename RankOf>
  void select(RankOf rank_of, RankedValues<Lane>* result) {
    for (int batch = 0; batch < Layout::kBatches; ++batch) {
      Words key[kKeyWords], below, equal, ranks;
      for (int lane = 0; lane < kWordLanes; ++lane) {
        ranks[lane] = static_cast<std::uint32_t>(rank_of(Layout::column(batch, lane)));
      }
      search(planes_ + batch * Layout::kPlanes * stride_, ranks, key, &below, &equal);
      for (int lane = 0; lane < kWordLanes; ++lane) {
        const int column = Layout::column(batch, lane);
        std::uint64_t bits = key[0][lane];
        if constexpr (Layout::kPlanes == 64) bits |= std::uint64_t{key[1][lane]} << 32;
        result->key[column] = static_cast<Lane>(static_cast<Lane>(bits) ^ ~kGreatestKey<Lane>);
        result->below[column] = below[lane];
        result->equal[column] = equal[lane];
      }
    }
  }

 private:
  static constexpr int kKeyWords = (Layout::kPlanes + 31) / 32;
  static constexpr int kBatchPlanes = Layout::kBatches * Layout::kPlanes;

  static std::int64_t blocks_of(std::int64_t num_rows) { return (num_rows + kBlockRows - 1) / kBlockRows; }
  // Odd: planes a power of two apart would compete for the same places in the cache.
  static std::int64_t stride_of(std::int64_t num_rows) { return blocks_of(num_rows) | 1; }

  // Finds the keys of these ranks, 32 bits a word, and how many are below and equal.
  void search(const Words* planes, Words ranks, Words* key, Words* below, Words* equal) {
    Words* const candidates = candidates_;
    const std::int64_t blocks = blocks_;
    const int rest = static_cast<int>(num_rows_ % kBlockRows);
    for (std::int64_t block = 0; block < blocks; ++block) candidates[block] = ~Words{};
    if (rest != 0) candidates[blocks - 1] = fill((std::uint32_t{1} << rest) - 1);

    // Each pass first narrows the candidates to those whose bit in the plane before differs from `flip`.
    Words remaining = ranks, flip{};
    const Words* previous = nullptr;
    const auto decide = [&](int plane, Words zeros) {
      const Words is_one = bits_as<std::uint32_t>(remaining >= zeros);
      remaining -= zeros & is_one;
      Words* const word = key + plane / 32;
      *word = (*word << 1) - is_one;
      flip = ~is_one;
      previous = planes + plane * stride_;
    };
    for (int word = 0; word < kKeyWords; ++word) key[word] = Words{};
    {
      const Words* const top = planes + (Layout::kPlanes - 1) * stride_;
      Words zeros{};
      for (std::int64_t block = 0; block < blocks; ++block) {
        zeros += count_bits(candidates[block] & ~top[block]);
      }
      decide(Layout::kPlanes - 1, zeros);
    }
    for (int plane = Layout::kPlanes - 2; plane >= 0; --plane) {
      const Words* const current = planes + plane * stride_;
      Words zeros{};
      for (std::int64_t block = 0; block < blocks; ++block) {
        const Words narrowed = candidates[block] & (previous[block] ^ flip);
        candidates[block] = narrowed;
        zeros += count_bits(narrowed & ~current[block]);
      }
      decide(plane, zeros);
    }
    Words left{};
    for (std::int64_t block = 0; block < blocks; ++block) {
      left += count_bits(candidates[block] & (previous[block] ^ flip));
    }
    *equal = left;
    *below = ranks - remaining;
  }

  std::int64_t num_rows_;
  std::int64_t blocks_;
  std::int64_t stride_;
  Words* candidates_;
  Words* planes_;  // [batch][plane][block], planes stride_ apart
};

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_RADIX_SELECT_H_
