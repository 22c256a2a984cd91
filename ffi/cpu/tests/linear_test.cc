// Tests the linear kernels of every instruction set that this processor has, and the conversions, against sums in
// extended precision. Needs nothing but the kernels: also for sanitizers and emulators.
#include "cpu/kernels/linear.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "math/half.h"
#include "math/rounding.h"

namespace fedfuse {
namespace {

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// Elements of one type. Each row has memory of its own, so that a sanitizer sees a step over its end.
struct Rows {
  Type type;
  std::int64_t columns;
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<const void*> pointers;

  Rows(Type the_type, std::int64_t count, std::int64_t the_columns, unsigned seed)
      : type(the_type), columns(the_columns) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (std::int64_t row = 0; row < count; ++row) {
      memory.push_back(std::make_unique<std::byte[]>(columns * bytes_of(type)));
      for (std::int64_t column = 0; column < columns; ++column) set(row, column, normal(random));
      pointers.push_back(memory.back().get());
    }
  }

  void set(std::int64_t row, std::int64_t column, double value) {
    convert(Type::kFloat64, &value, type, memory[row].get() + column * bytes_of(type), 1);
  }

  double get(std::int64_t row, std::int64_t column) const {
    double value;
    convert(type, memory[row].get() + column * bytes_of(type), Type::kFloat64, &value, 1);
    return value;
  }
};

double read(const std::vector<std::byte>& values, Type accumulator, std::int64_t index) {
  double value;
  convert(accumulator, values.data() + index * bytes_of(accumulator), Type::kFloat64, &value, 1);
  return value;
}

// Numbers in the accumulator's type.
std::vector<std::byte> accumulators(Type accumulator, const std::vector<double>& values) {
  std::vector<std::byte> out(values.size() * bytes_of(accumulator));
  for (std::size_t i = 0; i < values.size(); ++i) {
    convert(Type::kFloat64, &values[i], accumulator, out.data() + i * bytes_of(accumulator), 1);
  }
  return out;
}

void test_weighted_sum(Type type, std::int64_t num_rows, std::int64_t columns) {
  const std::string what = std::string(kernels().name) + " weighted_sum " + name_of(type) + " " +
                           std::to_string(num_rows) + "x" + std::to_string(columns);
  const Type accumulator = accumulator_of(type);
  const double epsilon = accumulator == Type::kFloat64 ? 0x1p-52 : 0x1p-23;
  Rows rows(type, num_rows, columns, 1);
  std::vector<double> weights;
  for (std::int64_t row = 0; row < num_rows; ++row) weights.push_back(row % 3 - 0.75);
  const std::vector<std::byte> weight_bytes = accumulators(accumulator, weights);
  const std::vector<std::byte> divisor = accumulators(accumulator, {4.0});
  std::vector<std::byte> out(columns * bytes_of(accumulator)), alone(bytes_of(accumulator));
  linear_kernels(type).weighted_sum(rows.pointers.data(), weight_bytes.data(), num_rows, columns, divisor.data(),
                                    out.data());
  for (std::int64_t column = 0; column < columns; ++column) {
    long double sum = 0, magnitude = 0;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      sum += static_cast<long double>(weights[row]) * rows.get(row, column);
      magnitude += std::fabs(weights[row] * rows.get(row, column));
    }
    // The bound of a sum taken in order: one rounding a term.
    const double bound = static_cast<double>(magnitude) / 4 * epsilon * (num_rows + 1);
    expect(std::fabs(read(out, accumulator, column) - static_cast<double>(sum / 4)) <= bound, what);
    std::vector<const void*> single;
    for (const void* row : rows.pointers) {
      single.push_back(static_cast<const std::byte*>(row) + column * bytes_of(type));
    }
    linear_kernels(type).weighted_sum(single.data(), weight_bytes.data(), num_rows, 1, divisor.data(), alone.data());
    expect(std::memcmp(alone.data(), out.data() + column * bytes_of(accumulator), bytes_of(accumulator)) == 0,
           what + ": a column alone has other bits");
  }
}

void test_one_row(Type type, std::int64_t columns) {
  const std::string what =
      std::string(kernels().name) + " " + name_of(type) + " of " + std::to_string(columns) + " columns";
  const Type accumulator = accumulator_of(type);
  Rows rows(type, 1, columns, 2);
  std::vector<double> others;
  for (std::int64_t column = 0; column < columns; ++column) others.push_back(std::sin(column + 1.0f));
  const std::vector<std::byte> other_bytes = accumulators(accumulator, others);
  long double squares = 0, dot = 0, magnitude = 0;
  for (std::int64_t column = 0; column < columns; ++column) {
    const long double value = rows.get(0, column), other = read(other_bytes, accumulator, column);
    squares += value * value;
    dot += value * other;
    magnitude += std::fabs(value * other);
  }
  const LinearKernels& linear = linear_kernels(type);
  // Products of floats are exact in float64, and of doubles rounded once; each chain of sums is short.
  const double epsilon = 0x1p-52 * (columns + 8);
  // Beside others, and at the end of them, a row has the sum that it has alone.
  const std::vector<const void*> again(7, rows.pointers[0]);
  double sums[8];
  linear.sums_of_squares(rows.pointers.data(), 1, columns, sums);
  linear.sums_of_squares(again.data(), 7, columns, sums + 1);
  expect(std::fabs(sums[0] - squares) <= epsilon * squares, what + ": squares");
  for (int i = 1; i < 8; ++i) expect(sums[i] == sums[0], what + ": squares beside others");
  expect(std::fabs(linear.dot(rows.pointers[0], other_bytes.data(), columns) - dot) <= epsilon * magnitude,
         what + ": dot");

  const std::vector<std::byte> weight = accumulators(accumulator, {0.5});
  std::vector<std::byte> total = other_bytes;
  linear.accumulate(total.data(), rows.pointers[0], weight.data(), columns, total.data());
  for (std::int64_t column = 0; column < columns; ++column) {
    const double exact = read(other_bytes, accumulator, column) + 0.5 * rows.get(0, column);
    const double bound =
        (std::fabs(exact) + std::fabs(rows.get(0, column))) * (accumulator == Type::kFloat64 ? 0x1p-51 : 0x1p-22);
    expect(std::fabs(read(total, accumulator, column) - exact) <= bound, what + ": accumulate in place");
  }

  expect(linear.all_finite(rows.pointers[0], columns), what + ": all are finite");
  const double infinity = std::numeric_limits<double>::infinity();
  for (std::int64_t column = 0; column < columns; ++column) {
    const double before = rows.get(0, column);
    for (double bad : {infinity, -infinity, std::nan(""), -std::nan("")}) {
      rows.set(0, column, bad);
      expect(!linear.all_finite(rows.pointers[0], columns), what + ": one is not finite");
    }
    rows.set(0, column, before);
  }
}

void test_step(Type type, std::int64_t num_rows, std::int64_t columns) {
  const std::string what = std::string(kernels().name) + " step " + name_of(type) + " " + std::to_string(num_rows) +
                           "x" + std::to_string(columns);
  const Type accumulator = accumulator_of(type);
  const double epsilon = accumulator == Type::kFloat64 ? 0x1p-52 : 0x1p-23;
  Rows rows(type, num_rows, columns, 3);
  std::vector<double> weights, center;
  for (std::int64_t row = 0; row < num_rows; ++row) weights.push_back(row % 3 - 0.75);
  for (std::int64_t column = 0; column < columns; ++column) center.push_back(std::sin(column + 1.0f));
  const std::vector<std::byte> weight_bytes = accumulators(accumulator, weights);
  const std::vector<std::byte> center_bytes = accumulators(accumulator, center);
  std::vector<std::byte> out(columns * bytes_of(accumulator));
  const LinearKernels& linear = linear_kernels(type);
  linear.step(rows.pointers.data(), weight_bytes.data(), num_rows, columns, center_bytes.data(), out.data());
  for (std::int64_t column = 0; column < columns; ++column) {
    const double start = read(center_bytes, accumulator, column);
    double end = start, magnitude = std::fabs(start);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      end += weights[row] * (rows.get(row, column) - start);
      magnitude += std::fabs(weights[row] * (rows.get(row, column) - start));
    }
    expect(std::fabs(read(out, accumulator, column) - end) <= magnitude * epsilon * (num_rows + 2), what);
  }
  for (std::int64_t row = 0; row < num_rows; ++row) {
    double square = 0;
    for (std::int64_t column = 0; column < columns; ++column) {
      const double apart = rows.get(row, column) - read(out, accumulator, column);
      square += apart * apart;
    }
    // The differences are rounded, their squares and the sum are float64.
    const double got = linear.squared_distance(rows.pointers[row], out.data(), columns);
    expect(std::fabs(got - square) <= square * (2 * epsilon + 0x1p-52 * (columns + 8)), what + ": distance");
  }
}

void test_pairs(Type type, std::int64_t columns) {
  const std::string what =
      std::string(kernels().name) + " pairs " + name_of(type) + " of " + std::to_string(columns) + " columns";
  Rows a(type, kPairRows, columns, 4), b(type, kPairRows, columns, 5);
  Rows u(type, kPairRows, columns, 6), v(type, kPairRows, columns, 7);
  PairSums squares = {}, products = {};
  const LinearKernels& linear = linear_kernels(type);
  linear.difference_products(a.pointers.data(), b.pointers.data(), nullptr, nullptr, columns, &squares);
  linear.difference_products(a.pointers.data(), b.pointers.data(), u.pointers.data(), v.pointers.data(), columns,
                             &products);
  const double epsilon = accumulator_of(type) == Type::kFloat64 ? 0x1p-52 : 0x1p-23;
  for (int i = 0; i < kPairRows; ++i) {
    for (int j = 0; j < kPairRows; ++j) {
      double square = 0, product = 0, magnitude = 0;
      for (std::int64_t column = 0; column < columns; ++column) {
        const double apart = a.get(i, column) - b.get(j, column), other = u.get(i, column) - v.get(j, column);
        square += apart * apart;
        product += apart * other;
        magnitude += std::fabs(apart * other);
      }
      double got_square = 0, got_product = 0;
      for (double lane : squares.lanes[i][j]) got_square += lane;
      for (double lane : products.lanes[i][j]) got_product += lane;
      expect(std::fabs(got_square - square) <= 36 * epsilon * square, what + ": squares");
      expect(std::fabs(got_product - product) <= 36 * epsilon * magnitude, what + ": products");
    }
  }
}

void test_conversions() {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const std::uint16_t bits = static_cast<std::uint16_t>(half);
    for (Type type : {Type::kBFloat16, Type::kFloat16}) {
      double value;
      convert(type, &bits, Type::kFloat64, &value, 1);
      std::uint16_t back;
      convert(Type::kFloat64, &value, type, &back, 1);
      expect(back == bits || std::isnan(value), std::string(name_of(type)) + " there and back");
    }
  }
  // Just above the middle of two bfloat16 numbers; by way of the nearest float it would be the middle itself.
  const double above_middle = 1.0 + 0x1p-8 + 0x1p-40;
  std::uint16_t rounded;
  convert(Type::kFloat64, &above_middle, Type::kBFloat16, &rounded, 1);
  expect(bfloat16_to_float(rounded) == 1.0f + 0x1p-7f, "a double is rounded once");
  expect(std::isinf(round_to_odd(std::numeric_limits<double>::infinity())), "infinity stays");
  const double greatest = std::numeric_limits<double>::max();
  convert(Type::kFloat64, &greatest, Type::kFloat16, &rounded, 1);
  expect(rounded == 0x7c00, "a double beyond float16 becomes infinity");
}

// Scratch memory is made for kMostColumns: no tile has more, and together they are the leaf.
void test_tiles() {
  for (std::int64_t coordinates : {0, 1, 255, 16384, 24575, 24576, 24577, 40959, 40961, 1000001}) {
    const Shape shape{{}, 3, {coordinates, std::int64_t{1} << 40}};
    const Tiles tiles = Tiles::balanced(shape);
    std::int64_t end = 0;
    for (std::int64_t i = 0; tiles[i].leaf == 0; ++i) {
      const Tile tile = tiles[i];
      expect(tile.begin == end && tile.columns > 0 && tile.columns <= kMostColumns, "a tile that fits");
      end = tile.begin + tile.columns;
    }
    expect(end == coordinates, "tiles are the leaf");
  }
}

// Every client's every coordinate belongs to one piece; and short of a stretch, pieces follow each other in memory.
void test_row_pieces() {
  for (std::int64_t clients : {1, 3, 40}) {
    for (std::int64_t coordinates : {0, 1, 5000, 8192, 16384, 16385, (1 << 20) + 7}) {
      const Shape shape{{1, {2}, 2}, clients, {coordinates, 7}};
      const RowPieces pieces(shape);
      std::vector<std::int64_t> covered(2 * clients * coordinates);
      std::int64_t end = 0;
      for (std::int64_t i = 0; i < pieces.count(); ++i) {
        const RowPiece piece = pieces[i];
        const Tile& tile = piece.tile;
        expect(tile.columns > 0 && tile.columns <= kWantedColumns, "a piece that fits");
        expect(piece.clients > 0 && piece.first_client + piece.clients <= clients, "clients that there are");
        if (tile.leaf == 1) continue;
        expect(tile.begin + tile.columns <= coordinates, "columns that there are");
        std::int64_t at = (tile.batch * clients + piece.first_client) * coordinates + tile.begin;
        if (coordinates <= 1 << 20) expect(at == end, "the next one in memory");
        for (std::int64_t row = 0; row < piece.clients; ++row, at += coordinates) {
          for (std::int64_t column = 0; column < tile.columns; ++column) ++covered[at + column];
          end = at + tile.columns;
        }
      }
      const bool once = std::all_of(covered.begin(), covered.end(), [](std::int64_t count) { return count == 1; });
      expect(once, "every column of every client, once");
    }
  }
}

}  // namespace
}  // namespace fedfuse

int main() {
  using namespace fedfuse;
  test_conversions();
  test_tiles();
  test_row_pieces();
  for (const std::string& isa : supported_isas()) {
    choose_isa(isa);
    for (Type type : {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16}) {
      for (std::int64_t columns : {1, 3, 15, 16, 33, 100, 257}) {
        for (std::int64_t num_rows : {0, 1, 2, 3, 7, 8, 9, 31}) test_weighted_sum(type, num_rows, columns);
        for (std::int64_t num_rows : {0, 1, 9}) test_step(type, num_rows, columns);
        test_one_row(type, columns);
        test_pairs(type, columns);
      }
      test_pairs(type, 2500);
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
