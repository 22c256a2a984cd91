// Compiled once per instruction set; see simd.h.
#include "cpu/kernels/quantized.h"

#include "cpu/kernels/simd.h"
#include "cpu/kernels/sweeps.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

// Coordinates that are worked on at a time: what 16 or 8 bytes hold.
constexpr int kColumns = 16;

typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));
typedef std::uint64_t Words2 __attribute__((vector_size(16)));

// As many bytes as a vector has lanes, from the given group of them on, as integers. (What GCC 12 makes of a conversion
// of vectors from bytes takes several times as long.)
template <bool kSigned>
FEDFUSE_INLINE Vector<std::int32_t> integers(Bytes16 bytes, int group) {
#if defined(__AVX512F__)
  static_cast<void>(group);  // there is one
  const auto all = reinterpret_cast<__m128i>(bytes);
  return reinterpret_cast<Vector<std::int32_t>>(kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, all)
                                                        : _mm512_maskz_cvtepu8_epi32(0xffff, all));
#elif defined(__AVX2__)
  const auto all = reinterpret_cast<__m128i>(bytes);
  const __m128i half = group == 0 ? all : _mm_unpackhi_epi64(all, all);
  return reinterpret_cast<Vector<std::int32_t>>(kSigned ? _mm256_cvtepi8_epi32(half) : _mm256_cvtepu8_epi32(half));
#else
  Vector<std::int32_t> lanes;
  for (int lane = 0; lane < kLanes<std::int32_t>; ++lane) {
    const std::uint8_t byte = bytes[group * kLanes<std::int32_t> + lane];
    lanes[lane] = kSigned ? static_cast<std::int8_t>(byte) : byte;
  }
  return lanes;
#endif
}

template <typename Accumulator, Codes codes>
struct Quantized {
  static constexpr bool kPacked = codes_per_byte(codes) == 2;
  static constexpr bool kSigned = codes == Codes::kInt8 || codes == Codes::kInt4;
  static constexpr int kParts = kColumns / kLanes<Accumulator>;

  struct Wide {
    Vector<Accumulator> parts[kParts];
  };

  // Sixteen codes, one a byte.
  static FEDFUSE_INLINE Wide widened(Bytes16 bytes) {
    Wide wide;
    for (int part = 0; part < kParts; ++part) {
      if constexpr (sizeof(Accumulator) == sizeof(std::int32_t)) {
        wide.parts[part] = __builtin_convertvector(integers<kSigned>(bytes, part), Vector<Accumulator>);
      } else {
        const Vector<std::int32_t> both = integers<kSigned>(bytes, part / 2);
        wide.parts[part] = __builtin_convertvector(half_of<std::int32_t>(both, part % 2 != 0), Vector<Accumulator>);
      }
    }
    return wide;
  }

  // Halves of bytes, given in the low half of a byte each.
  static FEDFUSE_INLINE Bytes16 with_sign(Bytes16 halves) { return kSigned ? (halves ^ 8) - 8 : halves; }

  // The sixteen codes from a coordinate on, which has to begin a byte.
  static FEDFUSE_INLINE Wide load_codes(const std::uint8_t* row, std::int64_t coordinate) {
    if constexpr (!kPacked) {
      Bytes16 bytes;
      __builtin_memcpy(&bytes, row + coordinate, sizeof bytes);
      return widened(bytes);
    } else {
      std::uint64_t word;
      __builtin_memcpy(&word, row + coordinate / 2, sizeof word);
      const Bytes16 bytes = reinterpret_cast<Bytes16>(Words2{word, 0});
      const Bytes16 low = bytes & 15, high = bytes >> 4;
      return widened(
          with_sign(__builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)));
    }
  }

  // The first `count` of them, wherever they begin.
  static FEDFUSE_INLINE Wide load_codes(const std::uint8_t* row, std::int64_t coordinate, std::int64_t count) {
    Bytes16 bytes = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = coordinate + i;
      bytes[i] = kPacked ? (row[at / 2] >> (at % 2 * 4)) & 15 : row[at];
    }
    return widened(kPacked ? with_sign(bytes) : bytes);
  }

  static FEDFUSE_INLINE Wide load_accumulators(const Accumulator* from) {
    Wide wide;
    for (int part = 0; part < kParts; ++part) wide.parts[part] = load<Accumulator>(from + part * kLanes<Accumulator>);
    return wide;
  }

  static FEDFUSE_INLINE void store_accumulators(Accumulator* to, const Wide& wide) {
    for (int part = 0; part < kParts; ++part) store(to + part * kLanes<Accumulator>, wide.parts[part]);
  }

  // Some accumulators of a vector's worth; the others read as zero.
  struct AccumulatorTail {
    alignas(kVectorBytes) Accumulator values[kColumns] = {};

    FEDFUSE_INLINE AccumulatorTail(const Accumulator* from, std::int64_t count) {
      __builtin_memcpy(values, from, count * sizeof(Accumulator));
    }
  };

  // The rows of a sweep and their levels: copies that no store of sums can change, so that they stay in registers.
  template <int kRows>
  struct Rows {
    const std::uint8_t* first[kRows];
    Vector<Accumulator> slopes[kRows], zeros[kRows];

    FEDFUSE_INLINE Rows(const std::uint8_t* const* rows, const Accumulator* row_slopes, const Accumulator* row_zeros) {
      for (int row = 0; row < kRows; ++row) {
        first[row] = rows[row];
        slopes[row] = fill<Accumulator>(row_slopes[row]);
        zeros[row] = fill<Accumulator>(row_zeros[row]);
      }
    }

    template <typename Load>
    FEDFUSE_INLINE void add_to(Wide* sum, Load load_row) const {
      for (int row = 0; row < kRows; ++row) {
        const Wide levels = load_row(first[row]);
        for (int part = 0; part < kParts; ++part) {
          sum->parts[part] += slopes[row] * (levels.parts[part] - zeros[row]);
        }
      }
    }
  };

  template <int kRows>
  static FEDFUSE_INLINE void sweep_some(const Rows<kRows>& rows, std::int64_t begin, std::int64_t count, bool is_first,
                                        Accumulator* out) {
    AccumulatorTail sums(out, is_first ? 0 : count);
    Wide sum = load_accumulators(sums.values);
    rows.add_to(&sum,
                [=](const std::uint8_t* row) __attribute__((always_inline)) { return load_codes(row, begin, count); });
    store_accumulators(sums.values, sum);
    __builtin_memcpy(out, sums.values, count * sizeof(Accumulator));
  }

  template <int kRows>
  static void sweep(const Rows<kRows> rows, std::int64_t begin, std::int64_t columns, bool is_first, Accumulator* out) {
    std::int64_t column = 0;
    if (kPacked && begin % 2 != 0 && columns > 0) {
      sweep_some(rows, begin, 1, is_first, out);
      column = 1;
    }
    for (; column + kColumns <= columns; column += kColumns) {
      Wide sum = {};
      if (!is_first) sum = load_accumulators(out + column);
      rows.add_to(&sum, [=](const std::uint8_t* row)
                            __attribute__((always_inline)) { return load_codes(row, begin + column); });
      store_accumulators(out + column, sum);
    }
    if (column < columns) sweep_some(rows, begin + column, columns - column, is_first, out + column);
  }

  static void sum(const std::uint8_t* const* rows, const void* slope_pointer, const void* zero_pointer,
                  std::int64_t num_rows, std::int64_t begin, std::int64_t columns, void* out_pointer) {
    const Accumulator* slopes = static_cast<const Accumulator*>(slope_pointer);
    const Accumulator* zeros = static_cast<const Accumulator*>(zero_pointer);
    Accumulator* out = static_cast<Accumulator*>(out_pointer);
    if (num_rows == 0) {
      for (std::int64_t column = 0; column < columns; ++column) out[column] = 0;
    }
    sweep_rows<kSweepRows>(num_rows, [&](auto count, std::int64_t row) {
      using SweepRows = Rows<decltype(count)::value>;
      sweep(SweepRows(rows + row, slopes + row, zeros + row), begin, columns, row == 0, out);
    });
  }

  struct DoubleSums {
    static constexpr int kHalves = sizeof(double) / sizeof(Accumulator);
    Vector<double> sums[kParts][kHalves] = {};

    FEDFUSE_INLINE void add(const Wide& levels, Accumulator zero, const Wide& others) {
      for (int part = 0; part < kParts; ++part) {
        const Vector<Accumulator> offsets = levels.parts[part] - fill<Accumulator>(zero);
        for (int half = 0; half < kHalves; ++half) {
          sums[part][half] += doubles(offsets, half) * doubles(others.parts[part], half);
        }
      }
    }

    static FEDFUSE_INLINE Vector<double> doubles(Vector<Accumulator> numbers, int half) {
      if constexpr (kHalves == 1) {
        return numbers;
      } else {
        return widen_half(numbers, half != 0);
      }
    }

    FEDFUSE_INLINE double total() const {
      Vector<double> sum = {};
      for (int part = 0; part < kParts; ++part) {
        for (int half = 0; half < kHalves; ++half) sum += sums[part][half];
      }
      double result = 0;
      for (int lane = 0; lane < kLanes<double>; ++lane) result += sum[lane];
      return result;
    }
  };

  static double dot(const std::uint8_t* row, const void* zero_pointer, std::int64_t begin, const void* vector_pointer,
                    std::int64_t columns) {
    const Accumulator zero = *static_cast<const Accumulator*>(zero_pointer);
    const Accumulator* vector = static_cast<const Accumulator*>(vector_pointer);
    DoubleSums sums;
    const auto add_some = [&](std::int64_t column, std::int64_t count) __attribute__((always_inline)) {
      // Beyond the count there is no code: 0 - zero times 0 is not 0 where zero is infinite.
      Wide levels = load_codes(row, begin + column, count);
      const AccumulatorTail others(vector + column, count);
      alignas(kVectorBytes) Accumulator values[kColumns];
      store_accumulators(values, levels);
      for (std::int64_t i = count; i < kColumns; ++i) values[i] = zero;
      levels = load_accumulators(values);
      sums.add(levels, zero, load_accumulators(others.values));
    };
    std::int64_t column = 0;
    if (kPacked && begin % 2 != 0 && columns > 0) add_some(column++, 1);
    for (; column + kColumns <= columns; column += kColumns) {
      sums.add(load_codes(row, begin + column), zero, load_accumulators(vector + column));
    }
    if (column < columns) add_some(column, columns - column);
    return sums.total();
  }

  static constexpr QuantizedKernels kernels() { return {sum, dot}; }
};

template <typename Accumulator>
struct Table {
  static constexpr QuantizedKernels of(Codes codes) {
    return codes == Codes::kUInt8   ? Quantized<Accumulator, Codes::kUInt8>::kernels()
           : codes == Codes::kInt8  ? Quantized<Accumulator, Codes::kInt8>::kernels()
           : codes == Codes::kUInt4 ? Quantized<Accumulator, Codes::kUInt4>::kernels()
                                    : Quantized<Accumulator, Codes::kInt4>::kernels();
  }
};

}  // namespace

extern const QuantizedKernels quantized_float32[kNumCodes] = {
    Table<float>::of(Codes::kUInt8), Table<float>::of(Codes::kInt8), Table<float>::of(Codes::kUInt4),
    Table<float>::of(Codes::kInt4)};
extern const QuantizedKernels quantized_float64[kNumCodes] = {
    Table<double>::of(Codes::kUInt8), Table<double>::of(Codes::kInt8), Table<double>::of(Codes::kUInt4),
    Table<double>::of(Codes::kInt4)};

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
