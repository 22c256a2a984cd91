// Runs the CUDA kernels for sparse and quantised updates on the host, as kernels_test.cc does the others.
#include "cuda/tests/arrays.h"

namespace fedfuse {
namespace cuda {
namespace {

double element(const Array& array, const Batch& batch, std::int64_t index, std::int64_t i) {
  return get(array.view.type, array.view.at(batch, index), i);
}

// Relative to the sum of magnitudes.
double tolerance_of(Type accumulator) { return accumulator == Type::kFloat64 ? 1e-14 : 1e-5; }

enum class Order { kAny, kSorted, kOnePlace };

struct SparseCase {
  Type type;
  std::int64_t clients;
  std::int64_t entries;
  std::int64_t coordinates;
  Order order;
  bool masked = false;
  std::vector<std::int64_t> batch = {};
};

void check_sparse(const SparseCase& c) {
  const Shape batches = shape_of(c.batch, c.clients, {});
  const Batch& batch = batches.batch;
  const SparseShape shape{batch, c.clients, c.entries, c.coordinates};
  const std::string what = std::string("sparse ") + name_of(c.type) + " n=" + std::to_string(c.clients) +
                           " k=" + std::to_string(c.entries) + " d=" + std::to_string(c.coordinates) +
                           " order=" + std::to_string(static_cast<int>(c.order));
  const Type wide = accumulator(c.type);
  // What is shared over the batch differs between operands.
  Array values(c.type, batch, c.clients * c.entries, 0x5), indices(Type::kInt32, batch, c.clients * c.entries, 0x3);
  Array weights(wide, batch, c.clients, 0x2), vector(wide, batch, c.coordinates, 0x1),
      where(Type::kBool, batch, c.clients, 0x1);
  values.fill([](std::int64_t) { return normal(); });
  weights.fill([](std::int64_t) { return normal(); });
  vector.fill([](std::int64_t) { return normal(); });
  where.fill([](std::int64_t) { return random_bits() % 3 != 0; });
  auto* const all = reinterpret_cast<std::int32_t*>(indices.view.data);
  for (std::int64_t i = 0; i < indices.size(); ++i) {
    const auto span = static_cast<std::uint64_t>(c.coordinates + 6);
    all[i] = c.order == Order::kOnePlace ? static_cast<std::int32_t>(c.coordinates / 2)
                                         : static_cast<std::int32_t>(random_bits() % span) - 3;
  }
  for (std::int64_t row = 0; c.order == Order::kSorted && c.entries > 0 && row < indices.size() / c.entries; row += 2) {
    std::sort(all + row * c.entries, all + (row + 1) * c.entries);
  }
  Array total(wide, batch, c.coordinates), spread(c.type, batch, c.clients * c.entries), dots(wide, batch, c.clients);
  std::vector<std::uint8_t> sorted(batch.count * c.clients);
  const View mask = c.masked ? where.view : View();
  run(what, SparseSumProblem{shape, values.view, indices.view, weights.view, mask, total.view, sorted.data()},
      {&total});
  run(what, SparseSpreadProblem{shape, indices.view, weights.view, vector.view, mask, spread.view}, {&spread});
  run(what, SparseDotsProblem{shape, values.view, indices.view, vector.view, mask, dots.view}, {&dots});

  int wrong_sums = 0, wrong_spreads = 0, wrong_dots = 0;
  for (std::int64_t index = 0; index < batch.count; ++index) {
    std::vector<double> sums(c.coordinates), magnitudes(c.coordinates);
    for (std::int64_t client = 0; client < c.clients; ++client) {
      const bool present = !c.masked || element(where, batch, index, client) != 0;
      double dot = 0, dot_magnitude = 0;
      for (std::int64_t i = 0; i < c.entries; ++i) {
        const std::int64_t at = client * c.entries + i;
        const auto target = static_cast<std::int64_t>(element(indices, batch, index, at));
        const double got = element(spread, batch, index, at);
        if (!present || target < 0 || target >= c.coordinates) {
          wrong_spreads += got != 0;
          continue;
        }
        const double value = element(values, batch, index, at), weight = element(weights, batch, index, client);
        const double other = element(vector, batch, index, target);
        sums[target] += weight * value;
        magnitudes[target] += std::fabs(weight * value);
        dot += value * other;
        dot_magnitude += std::fabs(value * other);
        wrong_spreads += !is_close(got, weight * other, 0.005 * std::fabs(weight * other) + 1e-4);
      }
      wrong_dots += !is_close(element(dots, batch, index, client), dot, tolerance_of(wide) * dot_magnitude);
    }
    for (std::int64_t column = 0; column < c.coordinates; ++column) {
      wrong_sums +=
          !is_close(element(total, batch, index, column), sums[column], tolerance_of(wide) * magnitudes[column]);
    }
  }
  expect(wrong_sums == 0, what + " sums: " + std::to_string(wrong_sums));
  expect(wrong_spreads == 0, what + " spreads: " + std::to_string(wrong_spreads));
  expect(wrong_dots == 0, what + " dots: " + std::to_string(wrong_dots));
}

void check_all_sparse(Type type) {
  for (const Order order : {Order::kAny, Order::kSorted, Order::kOnePlace}) {
    check_sparse({type, 1, 1, 1, order});
    check_sparse({type, 3, 0, 5, order});
    check_sparse({type, 5, 300, 700, order, true});
    check_sparse({type, 300, 9, 50, order, true});
    check_sparse({type, 2, 3000, 2'300'000, order});
    check_sparse({type, 4, 20, 300, order, true, {2, 3, 2}});
  }
}

// To the bit what a loop gives: products are exact here.
void check_order_of_addition() {
  const std::int64_t clients = 7, entries = 500, coordinates = 40;
  const Shape batches = shape_of({}, clients, {});
  Array values(Type::kFloat32, batches.batch, clients * entries), weights(Type::kFloat32, batches.batch, clients);
  Array indices(Type::kInt32, batches.batch, clients * entries), total(Type::kFloat32, batches.batch, coordinates);
  values.fill([](std::int64_t) { return normal(); });
  weights.fill([](std::int64_t i) { return i % 2 == 0 ? 2 : -0.5; });
  indices.fill([](std::int64_t) { return static_cast<double>(random_bits() % coordinates); });
  std::vector<std::uint8_t> sorted(clients);
  const SparseShape shape{batches.batch, clients, entries, coordinates};
  run("order", SparseSumProblem{shape, values.view, indices.view, weights.view, View(), total.view, sorted.data()},
      {&total});
  std::vector<float> sums(coordinates);
  for (std::int64_t i = 0; i < clients * entries; ++i) {
    const auto weight = static_cast<float>(get(Type::kFloat32, weights.view.data, i / entries));
    const auto value = static_cast<float>(get(Type::kFloat32, values.view.data, i));
    sums[static_cast<std::int64_t>(get(Type::kInt32, indices.view.data, i))] += weight * value;
  }
  expect(std::memcmp(sums.data(), total.view.data, coordinates * sizeof(float)) == 0,
         "client after client, by position");
}

struct QuantizedCase {
  Codes codes;
  Type accumulator;
  std::int64_t clients;
  std::int64_t coordinates;
  std::int64_t block_size;
  bool masked = false;
  std::vector<std::int64_t> batch = {};
};

int code(const QuantizedCase& c, const std::byte* row, std::int64_t coordinate) {
  const std::int64_t per_byte = codes_per_byte(c.codes);
  const int byte = static_cast<int>(row[coordinate / per_byte]);
  switch (c.codes) {
    case Codes::kUInt8:
      return byte;
    case Codes::kInt8:
      return byte > 127 ? byte - 256 : byte;
    default: {
      const int half = coordinate % 2 == 0 ? byte % 16 : byte / 16;
      return c.codes == Codes::kInt4 && half > 7 ? half - 16 : half;
    }
  }
}

void check_quantized(const QuantizedCase& c) {
  const Shape batches = shape_of(c.batch, c.clients, {});
  const Batch& batch = batches.batch;
  QuantizedShape shape;
  shape.batch = batch;
  shape.clients = c.clients;
  shape.coordinates = c.coordinates;
  shape.bytes = (c.coordinates + codes_per_byte(c.codes) - 1) / codes_per_byte(c.codes);
  shape.blocks = (c.coordinates + c.block_size - 1) / c.block_size;
  shape.block_size = c.block_size;
  shape.codes = c.codes;
  const std::string what = "quantized " + std::to_string(static_cast<int>(c.codes)) + " " + name_of(c.accumulator) +
                           " n=" + std::to_string(c.clients) + " d=" + std::to_string(c.coordinates) +
                           " block=" + std::to_string(c.block_size);
  Array codes(Type::kUInt8, batch, c.clients * shape.bytes, 0x5);
  for (std::int64_t i = 0; i < codes.bytes; ++i) codes.view.data[i] = static_cast<std::byte>(random_bits());
  Array scales(c.accumulator, batch, c.clients * shape.blocks, 0x3),
      zeros(c.accumulator, batch, c.clients * shape.blocks, 0x6);
  Array weights(c.accumulator, batch, c.clients, 0x2), vector(c.accumulator, batch, c.coordinates, 0x1);
  Array where(Type::kBool, batch, c.clients, 0x1);
  for (Array* array : {&scales, &zeros, &weights, &vector}) array->fill([](std::int64_t) { return normal(); });
  where.fill([](std::int64_t) { return random_bits() % 3 != 0; });
  Array total(c.accumulator, batch, c.coordinates), dots(c.accumulator, batch, c.clients * shape.blocks);
  const View mask = c.masked ? where.view : View();
  run(what, QuantizedSumProblem{shape, codes.view, scales.view, zeros.view, weights.view, mask, total.view}, {&total});
  run(what, QuantizedDotsProblem{shape, codes.view, zeros.view, vector.view, mask, dots.view}, {&dots});

  int wrong_sums = 0, wrong_dots = 0;
  for (std::int64_t index = 0; index < batch.count; ++index) {
    std::vector<double> sums(c.coordinates), magnitudes(c.coordinates);
    for (std::int64_t client = 0; client < c.clients; ++client) {
      const bool present = !c.masked || element(where, batch, index, client) != 0;
      const std::byte* const row = codes.view.at(batch, index) + client * shape.bytes;
      for (std::int64_t block = 0; block < shape.blocks; ++block) {
        const std::int64_t at = client * shape.blocks + block;
        const double slope = element(weights, batch, index, client) * element(scales, batch, index, at);
        double dot = 0, magnitude = 0;
        for (std::int64_t i = block * c.block_size; present && i < std::min(c.coordinates, (block + 1) * c.block_size);
             ++i) {
          const double offset = code(c, row, i) - element(zeros, batch, index, at);
          sums[i] += slope * offset;
          magnitudes[i] += std::fabs(slope * offset);
          dot += offset * element(vector, batch, index, i);
          magnitude += std::fabs(offset * element(vector, batch, index, i));
        }
        wrong_dots += !is_close(element(dots, batch, index, at), dot, tolerance_of(c.accumulator) * magnitude + 1e-12);
      }
    }
    for (std::int64_t i = 0; i < c.coordinates; ++i) {
      wrong_sums +=
          !is_close(element(total, batch, index, i), sums[i], tolerance_of(c.accumulator) * magnitudes[i] + 1e-12);
    }
  }
  expect(wrong_sums == 0, what + " sums: " + std::to_string(wrong_sums));
  expect(wrong_dots == 0, what + " dots: " + std::to_string(wrong_dots));
}

int main_of_test() {
  for (const Type type : {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16}) check_all_sparse(type);
  check_order_of_addition();
  for (const Codes codes : {Codes::kUInt8, Codes::kInt8, Codes::kUInt4, Codes::kInt4}) {
    for (const Type type : {Type::kFloat32, Type::kFloat64}) {
      for (const std::int64_t coordinates : {1, 7, 8, 64, 2049, 5001}) {
        for (const std::int64_t block_size : {1, 3, 8, 64, 2000, 6000}) {
          check_quantized({codes, type, 3, coordinates, std::min(block_size, coordinates)});
        }
      }
      check_quantized({codes, type, 40, 33, 10, true});
      check_quantized({codes, type, 3, 33, 5, true, {2, 3, 2}});
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace cuda
}  // namespace fedfuse

int main() { return fedfuse::cuda::main_of_test(); }
