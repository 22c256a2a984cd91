// Tests every kernel for order statistics, of every instruction set that this processor has, against a stable sort.
// Needs nothing but the kernels: also for sanitizers and emulators. An argument other than 0 makes it brief.
#include "cpu/kernels/order_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "contract/types.h"
#include "math/half.h"
#include "math/ordered_keys.h"

namespace fedfuse {
namespace {

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// ---- Element types, from their definitions --------------------------------------------------------------------------

// The value of a binary format with the given number of exponent and fraction bits.
double decode(std::uint64_t bits, int exponent_bits, int fraction_bits) {
  const std::uint64_t fraction = bits & ((std::uint64_t{1} << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double sign = (bits >> (exponent_bits + fraction_bits)) & 1 ? -1 : 1;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == 2 * bias + 1) {
    return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<double>(fraction), 1 - bias - fraction_bits);
  return sign *
         std::ldexp(static_cast<double>(fraction | std::uint64_t{1} << fraction_bits), exponent - bias - fraction_bits);
}

template <Type type>
struct Format;
template <>
struct Format<Type::kFloat32> {
  using Bits = std::uint32_t;
  using Accumulator = float;
  static constexpr const char* kName = "float32";
  static constexpr int kExponent = 8, kFraction = 23;
  static Bits encode(float value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};
template <>
struct Format<Type::kFloat64> {
  using Bits = std::uint64_t;
  using Accumulator = double;
  static constexpr const char* kName = "float64";
  static constexpr int kExponent = 11, kFraction = 52;
  static Bits encode(double value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};
template <>
struct Format<Type::kBFloat16> {
  using Bits = std::uint16_t;
  using Accumulator = float;
  static constexpr const char* kName = "bfloat16";
  static constexpr int kExponent = 8, kFraction = 7;
  static Bits encode(float value) { return float_to_bfloat16(value); }
};
template <>
struct Format<Type::kFloat16> {
  using Bits = std::uint16_t;
  using Accumulator = float;
  static constexpr const char* kName = "float16";
  static constexpr int kExponent = 5, kFraction = 10;
  static Bits encode(float value) { return float_to_float16(value); }
};

template <Type type>
double value_of(typename Format<type>::Bits bits) {
  return decode(bits, Format<type>::kExponent, Format<type>::kFraction);
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// ---- Inputs ---------------------------------------------------------------------------------------------------------

// Rows in buffers of exactly their size, so that a sanitizer sees any step beyond.
template <typename T>
struct Rows {
  Rows(std::int64_t num_rows, std::int64_t columns) : width(columns) {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      buffers.push_back(std::make_unique<T[]>(columns));
      std::memset(buffers.back().get(), 0xa5, columns * sizeof(T));
      pointers.push_back(buffers.back().get());
    }
  }
  T* operator[](std::int64_t row) { return buffers[row].get(); }
  const T* operator[](std::int64_t row) const { return buffers[row].get(); }
  const void* const* inputs() const { return pointers.data(); }
  void* const* outputs() const { return const_cast<void* const*>(pointers.data()); }

  std::int64_t width;
  std::vector<std::unique_ptr<T[]>> buffers;
  std::vector<const void*> pointers;
};

template <Type type>
typename Format<type>::Bits random_element(std::mt19937_64& random, int pattern) {
  using Bits = typename Format<type>::Bits;
  constexpr int kFraction = Format<type>::kFraction;
  constexpr int kSign = kFraction + Format<type>::kExponent;
  constexpr Bits kInfinity = static_cast<Bits>(((std::uint64_t{1} << Format<type>::kExponent) - 1) << kFraction);
  const auto sign = static_cast<Bits>((random() & 1) << kSign);
  const double normal = std::normal_distribution<double>()(random);
  switch (pattern % 8) {
    case 0:
      return Format<type>::encode(static_cast<typename Format<type>::Accumulator>(normal));
    case 1: {  // ties, zeros of both signs among them
      constexpr float kValues[] = {0.0f, -0.0f, 1.0f, -1.0f, 2.0f};
      return Format<type>::encode(kValues[random() % 5]);
    }
    case 2: {  // all kinds
      const Bits kinds[] = {0,
                            1,
                            static_cast<Bits>(random() % (1u << 7)),
                            kInfinity,
                            static_cast<Bits>(kInfinity + 1 + random() % 3),
                            static_cast<Bits>(kInfinity - 1),
                            Format<type>::encode(1)};
      return sign | kinds[random() % 7];
    }
    case 3:  // the greatest finite value
      return kInfinity - 1;
    case 4:  // any bits
      return static_cast<Bits>(random());
    case 5:
      return Format<type>::encode(3);
    case 6:  // large values whose sum may overflow
      return sign | static_cast<Bits>(kInfinity - 1 - random() % 4);
    default:  // NaNs here and there
      return random() % 4 == 0 ? static_cast<Bits>(sign | kInfinity | 1)
                               : Format<type>::encode(static_cast<typename Format<type>::Accumulator>(normal));
  }
}

// ---- The oracle -----------------------------------------------------------------------------------------------------

// Client indices in rank order.
std::vector<int> ranked(const std::vector<double>& values) {
  std::vector<int> order(values.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (std::isnan(values[a])) return false;
    return std::isnan(values[b]) || values[a] < values[b];
  });
  return order;
}

// Whether `got` is the mean of the values; to rounding if there are more than two.
template <typename Accumulator>
bool is_mean(Accumulator got, const std::vector<double>& values) {
  long double sum = 0, magnitude = 0;
  for (const double value : values) {
    sum += value;
    magnitude += std::fabs(value);
  }
  const auto count = static_cast<long double>(values.size());
  if (std::isnan(sum)) return std::isnan(got);
  if (std::isinf(sum)) return got == static_cast<Accumulator>(sum);
  if (values.size() == 1) return static_cast<double>(got) == values[0];
  if (values.size() == 2) {
    const auto a = static_cast<Accumulator>(values[0]), b = static_cast<Accumulator>(values[1]);
    const Accumulator plain = (a + b) * Accumulator{0.5};
    return got == (std::isinf(plain) ? a * Accumulator{0.5} + b * Accumulator{0.5} : plain);
  }
  using Limits = std::numeric_limits<Accumulator>;
  const long double tolerance = Limits::epsilon() * (2 + count / 4) * magnitude / count + Limits::denorm_min();
  return std::isfinite(got) && std::fabs(got - sum / count) <= tolerance;
}

// ---- Checks ---------------------------------------------------------------------------------------------------------

struct InstructionSet {
  const char* name;
  const OrderStatisticKernels* kernels[kNumTypes];
};

std::vector<InstructionSet> instruction_sets() {
#define FEDFUSE_KERNELS(isa)                                                                           \
  {                                                                                                    \
    #isa, {                                                                                            \
      &isa::order_statistics_float32, &isa::order_statistics_float64, &isa::order_statistics_bfloat16, \
          &isa::order_statistics_float16                                                               \
    }                                                                                                  \
  }
  std::vector<InstructionSet> sets = {FEDFUSE_KERNELS(baseline)};
#if defined(__x86_64__)
  const auto with_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (with_avx2) sets.push_back(FEDFUSE_KERNELS(avx2));
  if (with_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vpopcntdq")) {
    sets.push_back(FEDFUSE_KERNELS(avx512));
  }
#endif
#undef FEDFUSE_KERNELS
  return sets;
}

// The first kept rank of values in order. Around the median, a window slides up while what it would gain is nearer.
std::int64_t first_kept(const std::vector<double>& sorted, std::int64_t trim, bool around_median) {
  const auto size = static_cast<std::int64_t>(sorted.size());
  if (!around_median) return trim;
  const long double a = sorted[(size - 1) / 2], b = sorted[size / 2], median = (a + b) / 2;
  const auto distance = [&](long double value) { return value == median ? 0 : std::fabs(value - median); };
  std::int64_t first = 0;
  while (first < trim) {
    const long double lost = sorted[first], gained = sorted[first + size - trim];
    // Added from the greatest down, numbers far apart cancel before the small ones go lost.
    long double terms[] = {lost, gained, -a, -b};
    std::sort(terms, terms + 4, [](long double x, long double y) { return std::fabs(x) > std::fabs(y); });
    const long double sum = terms[0] + terms[1] + terms[2] + terms[3];
    const bool nearer = std::isfinite(sum) ? sum < 0 : gained < median || distance(gained) < distance(lost);
    if (!nearer) break;
    ++first;
  }
  return first;
}

template <Type type>
void check_case(const std::vector<InstructionSet>& sets, std::int64_t num_rows, std::int64_t columns, KeptRanks ranks,
                unsigned seed) {
  using Bits = typename Format<type>::Bits;
  using Accumulator = typename Format<type>::Accumulator;
  std::mt19937_64 random(seed);
  const std::int64_t count = ranks.count(num_rows);

  Rows<Bits> rows(num_rows, columns), tangents(num_rows, columns);
  std::vector<Accumulator> cotangent(columns);
  std::vector<std::vector<int>> order(columns);
  std::vector<std::vector<bool>> is_kept(columns, std::vector<bool>(num_rows));
  std::vector<std::vector<double>> kept_values(columns), kept_tangents(columns);
  for (std::int64_t column = 0; column < columns; ++column) {
    std::vector<double> values(num_rows);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      rows[row][column] = random_element<type>(random, static_cast<int>(seed + column));
      values[row] = value_of<type>(rows[row][column]);
      tangents[row][column] = Format<type>::encode(std::nanf(""));  // no influence unless kept
    }
    order[column] = ranked(values);
    std::vector<double> sorted;
    for (const int row : order[column]) sorted.push_back(values[row]);
    const std::int64_t first = first_kept(sorted, ranks.trim, ranks.around_median);
    for (std::int64_t rank = first; rank < first + count; ++rank) {
      const int row = order[column][rank];
      is_kept[column][row] = true;
      kept_values[column].push_back(values[row]);
      tangents[row][column] = random_element<type>(random, 0);
      kept_tangents[column].push_back(value_of<type>(tangents[row][column]));
    }
    cotangent[column] = static_cast<Accumulator>(std::normal_distribution<double>()(random));
  }

  std::vector<Accumulator> first_means;
  for (const InstructionSet& set : sets) {
    const OrderStatisticKernels& kernels = *set.kernels[static_cast<int>(type)];
    const std::string where = std::string(set.name) + " " + Format<type>::kName + " n=" + std::to_string(num_rows) +
                              " d=" + std::to_string(columns) + " trim=" + std::to_string(ranks.trim) +
                              (ranks.around_median ? " around the median" : "") + " seed=" + std::to_string(seed);

    std::vector<Accumulator> means(columns), tangent_means(columns);
    kernels.mean(rows.inputs(), num_rows, columns, ranks, means.data());
    kernels.selected_mean(rows.inputs(), tangents.inputs(), num_rows, columns, ranks, tangent_means.data());
    Rows<Bits> spread(num_rows, columns);
    kernels.spread(rows.inputs(), cotangent.data(), num_rows, columns, ranks, spread.outputs());

    std::int64_t wrong_means = 0, wrong_tangents = 0, wrong_spreads = 0;
    for (std::int64_t column = 0; column < columns; ++column) {
      wrong_means += !is_mean(means[column], kept_values[column]);
      // Tangents are summed in another order than the oracle's: no exact case but one value.
      std::vector<double>& terms = kept_tangents[column];
      wrong_tangents += !is_mean(tangent_means[column], terms);
      const Bits share = Format<type>::encode(cotangent[column] / static_cast<Accumulator>(count));
      for (std::int64_t row = 0; row < num_rows; ++row) {
        wrong_spreads += spread[row][column] != (is_kept[column][row] ? share : Bits{0});
      }
    }
    expect(wrong_means == 0, "mean " + where + " wrong: " + std::to_string(wrong_means));
    expect(wrong_tangents == 0, "selected_mean " + where + " wrong: " + std::to_string(wrong_tangents));
    expect(wrong_spreads == 0, "spread " + where + " wrong: " + std::to_string(wrong_spreads));

    // Pure selections have the same bits on all sets.
    if (first_means.empty()) first_means = means;
    if (count <= 2) expect(same_bits(means, first_means), "same bits everywhere " + where);

    // A column's result does not depend on its place.
    const std::int64_t begin = columns / 3, part = (columns - begin + 1) / 2;
    std::vector<const void*> shifted(num_rows);
    for (std::int64_t row = 0; row < num_rows; ++row) shifted[row] = rows[row] + begin;
    std::vector<Accumulator> part_means(part);
    kernels.mean(shifted.data(), num_rows, part, ranks, part_means.data());
    expect(same_bits(part_means, {means.begin() + begin, means.begin() + begin + part}),
           "same bits in any place " + where);
  }
}

// Rows of one allocation, a power of two apart, with outputs large and aligned enough for streaming stores.
template <Type type>
void check_large_spread(const std::vector<InstructionSet>& sets, std::int64_t num_rows, std::int64_t columns,
                        std::int64_t trim) {
  using Bits = typename Format<type>::Bits;
  using Accumulator = typename Format<type>::Accumulator;
  std::mt19937_64 random(1);
  const std::size_t bytes = num_rows * columns * sizeof(Bits);
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, bytes), std::free),
      output(std::aligned_alloc(64, bytes), std::free);
  auto* const values = static_cast<Bits*>(memory.get());
  auto* const result = static_cast<Bits*>(output.get());
  std::vector<const void*> rows(num_rows);
  std::vector<void*> out(num_rows);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    rows[row] = values + row * columns;
    out[row] = result + row * columns;
  }
  for (std::int64_t i = 0; i < num_rows * columns; ++i) values[i] = static_cast<Bits>(random());
  const std::vector<Accumulator> cotangent(columns, 1);
  std::vector<Bits> expected;
  for (const InstructionSet& set : sets) {
    set.kernels[static_cast<int>(type)]->spread(rows.data(), cotangent.data(), num_rows, columns, {trim, false},
                                                out.data());
    const std::vector<Bits> got(result, result + num_rows * columns);
    if (expected.empty()) {
      expected = got;
      const Bits share = Format<type>::encode(Accumulator{1} / static_cast<Accumulator>(num_rows - 2 * trim));
      expect(std::count(got.begin(), got.end(), share) == columns * (num_rows - 2 * trim),
             "large spread keeps as many as it should");
    }
    expect(same_bits(got, expected), std::string("large spread ") + set.name);
  }
}

// Rows a large power of two apart are copied tile by tile, ahead of the work, and give the bits that others give.
template <Type type>
void check_colliding_rows(const std::vector<InstructionSet>& sets, std::int64_t num_rows, std::int64_t columns,
                          KeptRanks ranks) {
  using Bits = typename Format<type>::Bits;
  using Accumulator = typename Format<type>::Accumulator;
  std::mt19937_64 random(3);
  const std::int64_t stride = std::int64_t{1} << 18;
  // Of this only the pages of the columns are ever touched.
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(4096, num_rows * stride), std::free);
  Rows<Bits> together(num_rows, columns);
  std::vector<const void*> apart(num_rows);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    apart[row] = static_cast<std::byte*>(memory.get()) + row * stride;
    for (std::int64_t column = 0; column < columns; ++column) {
      together[row][column] = random_element<type>(random, 0);
    }
    std::memcpy(const_cast<void*>(apart[row]), together[row], columns * sizeof(Bits));
  }
  const std::vector<Accumulator> cotangent(columns, 1);
  for (const InstructionSet& set : sets) {
    const OrderStatisticKernels& kernels = *set.kernels[static_cast<int>(type)];
    std::vector<Accumulator> means[2], tangent_means[2];
    std::vector<Bits> spreads[2];
    for (int i = 0; i < 2; ++i) {
      const void* const* const rows = i == 0 ? together.inputs() : apart.data();
      means[i].resize(columns);
      kernels.mean(rows, num_rows, columns, ranks, means[i].data());
      tangent_means[i].resize(columns);
      kernels.selected_mean(rows, together.inputs(), num_rows, columns, ranks, tangent_means[i].data());
      Rows<Bits> spread(num_rows, columns);
      kernels.spread(rows, cotangent.data(), num_rows, columns, ranks, spread.outputs());
      for (std::int64_t row = 0; row < num_rows; ++row) {
        spreads[i].insert(spreads[i].end(), spread[row], spread[row] + columns);
      }
    }
    const std::string where = std::string(" of colliding rows ") + set.name + " " + Format<type>::kName +
                              " n=" + std::to_string(num_rows) + " d=" + std::to_string(columns) +
                              " trim=" + std::to_string(ranks.trim);
    expect(same_bits(means[0], means[1]), "mean" + where);
    expect(same_bits(tangent_means[0], tangent_means[1]), "selected_mean" + where);
    expect(same_bits(spreads[0], spreads[1]), "spread" + where);
  }
}

template <Type type>
void check_type(const std::vector<InstructionSet>& sets, bool brief) {
  constexpr std::int64_t kColumns[] = {1, 3, 17, 100, 513};
  unsigned seed = 0;
  for (std::int64_t num_rows = 1; num_rows <= 40; ++num_rows) {
    for (std::int64_t trim = 0; trim < num_rows; ++trim) {
      for (const std::int64_t columns : kColumns) {
        if (brief && columns > 100) continue;
        if (2 * trim < num_rows) check_case<type>(sets, num_rows, columns, {trim, false}, ++seed);
        if (columns <= 17) check_case<type>(sets, num_rows, columns, {trim, true}, ++seed);
      }
    }
  }
  for (const std::int64_t num_rows : {41, 48, 63, 64, 65, 80, 96, 97, 100, 127, 128, 129, 160, 200, 257, 1000, 3000}) {
    const std::int64_t median = (num_rows - 1) / 2, fifth = num_rows / 5;
    for (const std::int64_t trim : {std::int64_t{0}, std::int64_t{1}, fifth, fifth + 1, median - 1, median}) {
      for (const std::int64_t columns : {1, 17, 100}) {
        if (brief && (columns > 17 || num_rows > 1000)) continue;
        check_case<type>(sets, num_rows, columns, {trim, false}, ++seed);
        if (columns == 17) check_case<type>(sets, num_rows, columns, {trim, true}, ++seed);
      }
    }
  }
  // More rows than 16-bit lanes can count; nearly all values tie.
  if (!brief) check_case<type>(sets, 40000, 5, {15000, false}, 1);
  for (const std::int64_t num_rows : {64, 96, 128, 300}) {
    for (const std::int64_t columns : {63, 64, 130, 700}) {
      if (brief && (columns > 130 || num_rows == 128)) continue;
      for (const std::int64_t trim : {num_rows / 10, (num_rows - 1) / 2}) {
        check_colliding_rows<type>(sets, num_rows, columns, {trim, false});
      }
    }
  }
  check_large_spread<type>(sets, 16, brief ? 1 << 14 : 1 << 19, 3);
}

void check_half_conversions() {
  int wrong = 0;
  for (int i = 0; i < 1 << 16; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const double brain = value_of<Type::kBFloat16>(bits), half = value_of<Type::kFloat16>(bits);
    if (std::isnan(brain)) {
      wrong += !std::isnan(bfloat16_to_float(bits));
      wrong += !std::isnan(value_of<Type::kBFloat16>(float_to_bfloat16(bfloat16_to_float(bits))));
    } else {
      wrong += static_cast<double>(bfloat16_to_float(bits)) != brain;
      wrong += float_to_bfloat16(bfloat16_to_float(bits)) != bits;
    }
    if (std::isnan(half)) {
      wrong += !std::isnan(float16_to_float(bits));
      wrong += !std::isnan(value_of<Type::kFloat16>(float_to_float16(float16_to_float(bits))));
    } else {
      wrong += static_cast<double>(float16_to_float(bits)) != half;
      wrong += float_to_float16(float16_to_float(bits)) != bits;
    }
    // Half way to the next magnitude: to the even one; a little to either side: to the nearer one.
    const auto next = static_cast<std::uint16_t>(bits + 1);
    const auto even = bits % 2 == 0 ? bits : next;
    const double after = value_of<Type::kFloat16>(next), brain_after = value_of<Type::kBFloat16>(next);
    if (std::isfinite(half) && std::isfinite(after)) {
      const auto middle = static_cast<float>((half + after) / 2);
      wrong += float_to_float16(middle) != even;
      wrong += float_to_float16(std::nextafter(middle, static_cast<float>(half))) != bits;
      wrong += float_to_float16(std::nextafter(middle, static_cast<float>(after))) != next;
    }
    if (std::isfinite(brain) && std::isfinite(brain_after)) {
      const auto middle = static_cast<float>((brain + brain_after) / 2);
      wrong += float_to_bfloat16(middle) != even;
      wrong += float_to_bfloat16(std::nextafter(middle, static_cast<float>(brain))) != bits;
      wrong += float_to_bfloat16(std::nextafter(middle, static_cast<float>(brain_after))) != next;
    }
  }
  wrong += float_to_float16(65519.996f) != 0x7bff;
  wrong += float_to_float16(65520.0f) != 0x7c00;
  wrong += float_to_float16(-3e38f) != 0xfc00;
  wrong += float_to_bfloat16(3.4e38f) != 0x7f80;
  expect(wrong == 0, "half conversions: " + std::to_string(wrong));
}

template <Type type>
void check_keys() {
  using Bits = typename Format<type>::Bits;
  using Integer = typename Keys<type>::Integer;
  std::mt19937_64 random(2);
  int wrong = 0;
  for (int i = 0; i < 20000; ++i) {
    const Bits a = random_element<type>(random, i), b = random_element<type>(random, i);
    const Integer key_a = key_from_bits<type>(static_cast<Integer>(a));
    const Integer key_b = key_from_bits<type>(static_cast<Integer>(b));
    const double x = value_of<type>(a), y = value_of<type>(b);
    if (std::isnan(x)) {
      wrong += key_a != Keys<type>::kGreatest;
      wrong += !std::isnan(value_of<type>(static_cast<Bits>(bits_from_key<type>(key_a))));
    } else {
      wrong += static_cast<Bits>(bits_from_key<type>(key_a)) != a;
      wrong += std::isnan(y) && !(key_a < key_b);
      wrong += x < y && !(key_a < key_b);
      wrong += x > y && !(key_a > key_b);
    }
  }
  expect(wrong == 0, std::string("keys of ") + Format<type>::kName + ": " + std::to_string(wrong));
}

int main_of_test(bool brief) {
  const std::vector<InstructionSet> sets = instruction_sets();
  for (const InstructionSet& set : sets) std::printf("testing %s\n", set.name);
  check_half_conversions();
  check_keys<Type::kFloat32>();
  check_keys<Type::kFloat64>();
  check_keys<Type::kBFloat16>();
  check_keys<Type::kFloat16>();
  check_type<Type::kFloat32>(sets, brief);
  check_type<Type::kFloat64>(sets, brief);
  check_type<Type::kBFloat16>(sets, brief);
  check_type<Type::kFloat16>(sets, brief);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fedfuse

int main(int argc, char** argv) { return fedfuse::main_of_test(argc > 1 && std::strcmp(argv[1], "0") != 0); }
