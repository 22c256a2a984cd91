// Compiled once per instruction set; see simd.h.
#include "cpu/kernels/linear.h"

#include "cpu/kernels/elements.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/sweeps.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

template <Type type>
struct Linear {
  using Lane = typename Element<type>::Lane;
  using Accumulator = typename Element<type>::Accumulator;
  static constexpr int kParts = Element<type>::kParts;
  static constexpr int kColumns = kLanes<Lane>;  // in one vector of elements

  // A vector of elements and what it is widened to.
  struct Wide {
    Vector<Accumulator> parts[kParts];
  };

  static FEDFUSE_INLINE Wide widened(const void* elements) {
    Wide wide;
    Element<type>::widen(load<Lane>(elements), wide.parts);
    return wide;
  }

  static FEDFUSE_INLINE Wide load_accumulators(const Accumulator* from) {
    Wide wide;
    for (int part = 0; part < kParts; ++part) {
      wide.parts[part] = load<Accumulator>(from + part * kLanes<Accumulator>);
    }
    return wide;
  }

  static FEDFUSE_INLINE void store_accumulators(Accumulator* to, const Wide& wide) {
    for (int part = 0; part < kParts; ++part) store(to + part * kLanes<Accumulator>, wide.parts[part]);
  }

  static FEDFUSE_INLINE void add_product(Wide* sum, Vector<Accumulator> weight, const Wide& values) {
    for (int part = 0; part < kParts; ++part) sum->parts[part] += weight * values.parts[part];
  }

  // A vector's worth of elements of which only the first `count` are there; the others read as zero.
  struct Tail {
    alignas(kVectorBytes) Lane elements[kColumns] = {};

    FEDFUSE_INLINE Tail(const void* from, std::int64_t count) {
      __builtin_memcpy(elements, from, count * sizeof(Lane));
    }
  };

  struct AccumulatorTail {
    alignas(kVectorBytes) Accumulator values[kColumns] = {};

    FEDFUSE_INLINE AccumulatorTail(const void* from, std::int64_t count) {
      __builtin_memcpy(values, from, count * sizeof(Accumulator));
    }
  };

  template <int kRows>
  static void sweep(const Lane* const* row_pointers, const Accumulator* weight_numbers, std::int64_t columns,
                    bool is_first, Accumulator* out) {
    // Copies that no store to `out` can change: they stay in registers.
    const Lane* rows[kRows];
    Vector<Accumulator> weights[kRows];
    for (int row = 0; row < kRows; ++row) {
      rows[row] = row_pointers[row];
      weights[row] = fill<Accumulator>(weight_numbers[row]);
    }
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) {
      Wide sum = {};
      if (!is_first) sum = load_accumulators(out + column);
      for (int row = 0; row < kRows; ++row) add_product(&sum, weights[row], widened(rows[row] + column));
      store_accumulators(out + column, sum);
    }
    if (const std::int64_t rest = columns - column; rest > 0) {
      AccumulatorTail sums(out + column, is_first ? 0 : rest);
      Wide sum = load_accumulators(sums.values);
      for (int row = 0; row < kRows; ++row) {
        add_product(&sum, weights[row], widened(Tail(rows[row] + column, rest).elements));
      }
      store_accumulators(sums.values, sum);
      __builtin_memcpy(out + column, sums.values, rest * sizeof(Accumulator));
    }
  }

  static void weighted_sum(const void* const* row_pointers, const void* weight_pointer, std::int64_t num_rows,
                           std::int64_t columns, const void* divisor, void* out_pointer) {
    const Accumulator* weights = static_cast<const Accumulator*>(weight_pointer);
    Accumulator* out = static_cast<Accumulator*>(out_pointer);
    const Lane* const* rows = reinterpret_cast<const Lane* const*>(row_pointers);
    sweep_rows<kSweepRows>(num_rows, [&](auto count, std::int64_t row) {
      sweep<decltype(count)::value>(rows + row, weights + row, columns, row == 0, out);
    });
    if (num_rows == 0) {
      for (std::int64_t column = 0; column < columns; ++column) out[column] = 0;
    }
    if (divisor != nullptr) {
      const Accumulator by = *static_cast<const Accumulator*>(divisor);
      for (std::int64_t column = 0; column < columns; ++column) out[column] /= by;
    }
  }

  static void accumulate(const void* total_pointer, const void* update_pointer, const void* weight_pointer,
                         std::int64_t columns, void* out_pointer) {
    const Accumulator* total = static_cast<const Accumulator*>(total_pointer);
    const Lane* update = static_cast<const Lane*>(update_pointer);
    const Vector<Accumulator> weight = fill<Accumulator>(*static_cast<const Accumulator*>(weight_pointer));
    Accumulator* out = static_cast<Accumulator*>(out_pointer);
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) {
      Wide sum = load_accumulators(total + column);
      add_product(&sum, weight, widened(update + column));
      store_accumulators(out + column, sum);
    }
    if (const std::int64_t rest = columns - column; rest > 0) {
      AccumulatorTail sums(total + column, rest);
      Wide sum = load_accumulators(sums.values);
      add_product(&sum, weight, widened(Tail(update + column, rest).elements));
      store_accumulators(sums.values, sum);
      __builtin_memcpy(out + column, sums.values, rest * sizeof(Accumulator));
    }
  }

  static void scale(const void* values_pointer, const void* weight_pointer, std::int64_t columns, void* out_pointer) {
    const Accumulator* values = static_cast<const Accumulator*>(values_pointer);
    const Accumulator weight = *static_cast<const Accumulator*>(weight_pointer);
    Lane* out = static_cast<Lane*>(out_pointer);
    const auto scaled = [weight](const Accumulator* from) __attribute__((always_inline)) {
      Wide wide = load_accumulators(from);
      for (int part = 0; part < kParts; ++part) wide.parts[part] *= fill<Accumulator>(weight);
      return Element<type>::narrow(wide.parts);
    };
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) store(out + column, scaled(values + column));
    if (const std::int64_t rest = columns - column; rest > 0) {
      const Vector<Lane> narrow = scaled(AccumulatorTail(values + column, rest).values);
      __builtin_memcpy(out + column, &narrow, rest * sizeof(Lane));
    }
  }

  // A vector of running sums for each half of each part.
  struct DoubleSums {
    static constexpr int kHalves = sizeof(double) / sizeof(Accumulator);
    Vector<double> sums[kParts][kHalves] = {};

    FEDFUSE_INLINE void add(const Wide& a, const Wide& b) {
      for (int part = 0; part < kParts; ++part) {
        if constexpr (kHalves == 1) {
          sums[part][0] += a.parts[part] * b.parts[part];
        } else {
          for (int half = 0; half < kHalves; ++half) {
            sums[part][half] += doubles(a.parts[part], half) * doubles(b.parts[part], half);
          }
        }
      }
    }

    FEDFUSE_INLINE void add(const DoubleSums& others) {
      for (int part = 0; part < kParts; ++part) {
        for (int half = 0; half < kHalves; ++half) sums[part][half] += others.sums[part][half];
      }
    }

    static FEDFUSE_INLINE Vector<double> doubles(Vector<Accumulator> floats, int half) {
      return widen_half(floats, half != 0);
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

  // Calls whole(sums, column) for every vector and rest(sums, column, count) for what is left, and adds up the sums:
  // four of them in turn, which hides the latency of an addition.
  template <typename Whole, typename Rest>
  static FEDFUSE_INLINE double sum_products(std::int64_t columns, Whole whole, Rest rest) {
    constexpr int kChains = 4;
    DoubleSums chains[kChains];
    std::int64_t column = 0;
    for (; column + kChains * kColumns <= columns; column += kChains * kColumns) {
      for (int chain = 0; chain < kChains; ++chain) whole(&chains[chain], column + chain * kColumns);
    }
    for (; column + kColumns <= columns; column += kColumns) whole(&chains[0], column);
    if (column < columns) rest(&chains[0], column, columns - column);
    for (int chain = 1; chain < kChains; ++chain) chains[0].add(chains[chain]);
    return chains[0].total();
  }

  // Rows whose squares are summed side by side: streams that memory serves at once, and sums that hide each other's
  // latency. A row is summed in the same way whoever goes beside it.
  static constexpr int kSquareRows = kParts == 1 ? 4 : 2;

  template <int kRows>
  static void square(const Lane* const* rows, std::int64_t columns, double* totals) {
    DoubleSums sums[kRows];
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) {
      for (int row = 0; row < kRows; ++row) {
        const Wide values = widened(rows[row] + column);
        sums[row].add(values, values);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      if (column < columns) {
        const Wide values = widened(Tail(rows[row] + column, columns - column).elements);
        sums[row].add(values, values);
      }
      totals[row] = sums[row].total();
    }
  }

  static void sums_of_squares(const void* const* row_pointers, std::int64_t num_rows, std::int64_t columns,
                              double* totals) {
    const Lane* const* rows = reinterpret_cast<const Lane* const*>(row_pointers);
    sweep_rows<kSquareRows>(num_rows, [&](auto count, std::int64_t row) {
      square<decltype(count)::value>(rows + row, columns, totals + row);
    });
  }

  static double dot(const void* row_pointer, const void* others_pointer, std::int64_t columns) {
    const Lane* row = static_cast<const Lane*>(row_pointer);
    const Accumulator* others = static_cast<const Accumulator*>(others_pointer);
    return sum_products(
        columns,
        [=](DoubleSums* sums, std::int64_t column)
            __attribute__((always_inline)) { sums->add(widened(row + column), load_accumulators(others + column)); },
        [=](DoubleSums* sums, std::int64_t column, std::int64_t count) __attribute__((always_inline)) {
          sums->add(widened(Tail(row + column, count).elements),
                    load_accumulators(AccumulatorTail(others + column, count).values));
        });
  }

  static bool all_finite(const void* row_pointer, std::int64_t columns) {
    const Lane* row = static_cast<const Lane*>(row_pointer);
    // Infinities and NaNs are what has every bit of the exponent set.
    const Vector<Lane> exponent = fill<Lane>(static_cast<Lane>(~Keys<type>::kNegativeInfinity));
    Vector<Lane> found = {};
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) {
      const Vector<Lane> bits = load<Lane>(row + column);
      found |= (bits & exponent) == exponent;
    }
    if (column < columns) {
      const Vector<Lane> bits = load<Lane>(Tail(row + column, columns - column).elements);
      found |= (bits & exponent) == exponent;
    }
    return !any(found);
  }

  static FEDFUSE_INLINE Wide difference(const Wide& a, const Wide& b) {
    Wide result;
    for (int part = 0; part < kParts; ++part) result.parts[part] = a.parts[part] - b.parts[part];
    return result;
  }

  static void step(const void* const* row_pointers, const void* weight_pointer, std::int64_t num_rows,
                   std::int64_t columns, const void* center_pointer, void* out_pointer) {
    const Lane* const* rows = reinterpret_cast<const Lane* const*>(row_pointers);
    const Accumulator* weights = static_cast<const Accumulator*>(weight_pointer);
    const Accumulator* center = static_cast<const Accumulator*>(center_pointer);
    Accumulator* out = static_cast<Accumulator*>(out_pointer);
    const auto moved = [=](const Wide& from, auto wide_row) __attribute__((always_inline)) {
      Wide sum = {};
      for (std::int64_t row = 0; row < num_rows; ++row) {
        add_product(&sum, fill<Accumulator>(weights[row]), difference(wide_row(rows[row]), from));
      }
      for (int part = 0; part < kParts; ++part) sum.parts[part] += from.parts[part];
      return sum;
    };
    std::int64_t column = 0;
    for (; column + kColumns <= columns; column += kColumns) {
      store_accumulators(out + column,
                         moved(load_accumulators(center + column),
                               [=](const Lane* row) __attribute__((always_inline)) { return widened(row + column); }));
    }
    if (const std::int64_t rest = columns - column; rest > 0) {
      AccumulatorTail sums(center + column, rest);
      store_accumulators(sums.values,
                         moved(load_accumulators(sums.values), [=](const Lane* row) __attribute__((always_inline)) {
                           return widened(Tail(row + column, rest).elements);
                         }));
      __builtin_memcpy(out + column, sums.values, rest * sizeof(Accumulator));
    }
  }

  static double squared_distance(const void* row_pointer, const void* others_pointer, std::int64_t columns) {
    const Lane* row = static_cast<const Lane*>(row_pointer);
    const Accumulator* others = static_cast<const Accumulator*>(others_pointer);
    return sum_products(
        columns,
        [=](DoubleSums* sums, std::int64_t column) __attribute__((always_inline)) {
          const Wide values = difference(widened(row + column), load_accumulators(others + column));
          sums->add(values, values);
        },
        [=](DoubleSums* sums, std::int64_t column, std::int64_t count) __attribute__((always_inline)) {
          const Wide values = difference(widened(Tail(row + column, count).elements),
                                         load_accumulators(AccumulatorTail(others + column, count).values));
          sums->add(values, values);
        });
  }

  // As many rows of b as there are registers for sums next to kPairRows of a.
  static constexpr int kPairSide = kVectorBytes == 64 ? kPairRows : kPairRows / 2;
  static constexpr int kShortBlock = 64;  // vectors whose products are added in the accumulator type

  // Rows at one column, widened.
  template <int kRows>
  static FEDFUSE_INLINE void widen_rows(const void* const* rows, std::int64_t column, std::int64_t count, Wide* wide) {
    for (int row = 0; row < kRows; ++row) {
      const Lane* const from = static_cast<const Lane*>(rows[row]) + column;
      wide[row] = count >= kColumns ? widened(from) : widened(Tail(from, count).elements);
    }
  }

  template <bool kSquares>
  static void multiply_differences(const void* const* a, const void* const* b, const void* const* a_factors,
                                   const void* const* b_factors, std::int64_t columns, int side, PairSums* sums) {
    static_assert(kLanes<double> <= kPairLanes, "a vector of float64 fits the lanes of a pair");
    for (std::int64_t column = 0; column < columns;) {
      Vector<Accumulator> block[kPairRows][kPairSide] = {};
      const std::int64_t end = column + kShortBlock * kColumns < columns ? column + kShortBlock * kColumns : columns;
      const auto add = [&](std::int64_t count) __attribute__((always_inline)) {
        Wide wide_a[kPairRows], wide_b[kPairSide], factors_a[kPairRows], factors_b[kPairSide];
        widen_rows<kPairRows>(a, column, count, wide_a);
        widen_rows<kPairSide>(b, column, count, wide_b);
        if constexpr (!kSquares) {
          widen_rows<kPairRows>(a_factors, column, count, factors_a);
          widen_rows<kPairSide>(b_factors, column, count, factors_b);
        }
        for (int part = 0; part < kParts; ++part) {
          for (int i = 0; i < kPairRows; ++i) {
            for (int j = 0; j < kPairSide; ++j) {
              const Vector<Accumulator> apart = wide_a[i].parts[part] - wide_b[j].parts[part];
              if constexpr (kSquares) {
                block[i][j] += apart * apart;
              } else {
                block[i][j] += apart * (factors_a[i].parts[part] - factors_b[j].parts[part]);
              }
            }
          }
        }
      };
      for (; column + kColumns <= end; column += kColumns) add(kColumns);
      if (column < end) {
        add(end - column);
        column = end;
      }
      for (int i = 0; i < kPairRows; ++i) {
        for (int j = 0; j < kPairSide; ++j) {
          double* const lanes = sums->lanes[i][side + j];
          if constexpr (sizeof(Accumulator) == sizeof(double)) {
            store(lanes, load<double>(lanes) + block[i][j]);
          } else {
            store(lanes, load<double>(lanes) + widen_folded(block[i][j]));
          }
        }
      }
    }
  }

  static void difference_products(const void* const* a, const void* const* b, const void* const* a_factors,
                                  const void* const* b_factors, std::int64_t columns, PairSums* sums) {
    for (int side = 0; side < kPairRows; side += kPairSide) {
      if (a_factors == nullptr) {
        multiply_differences<true>(a, b + side, nullptr, nullptr, columns, side, sums);
      } else {
        multiply_differences<false>(a, b + side, a_factors, b_factors + side, columns, side, sums);
      }
    }
  }

  static constexpr LinearKernels kernels() {
    return {weighted_sum,     accumulate,         scale, sums_of_squares, dot, all_finite, step,
            squared_distance, difference_products};
  }
};

}  // namespace

extern const LinearKernels linear_float32 = Linear<Type::kFloat32>::kernels();
extern const LinearKernels linear_float64 = Linear<Type::kFloat64>::kernels();
extern const LinearKernels linear_bfloat16 = Linear<Type::kBFloat16>::kernels();
extern const LinearKernels linear_float16 = Linear<Type::kFloat16>::kernels();

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
