// Tests the kernels for quantised codes of every instruction set that this processor has, and the sparse sum, against
// plain loops. Buffers have exactly their size: also for sanitizers and emulators.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operations.h"

namespace fedfuse {
namespace {

int passed = 0, failed = 0;
std::mt19937 random_bits(1);

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

double normal() { return std::normal_distribution<double>()(random_bits); }

int code_at(Codes codes, const std::uint8_t* row, std::int64_t coordinate) {
  const int byte = row[coordinate / codes_per_byte(codes)];
  if (codes == Codes::kUInt8) return byte;
  if (codes == Codes::kInt8) return byte > 127 ? byte - 256 : byte;
  const int half = coordinate % 2 == 0 ? byte % 16 : byte / 16;
  return codes == Codes::kInt4 && half > 7 ? half - 16 : half;
}

// Coordinates from `begin` on, up to the very end of each row.
template <typename Accumulator>
void check_quantized(Codes codes, std::int64_t num_rows, std::int64_t begin, std::int64_t columns) {
  const Type type = sizeof(Accumulator) == 8 ? Type::kFloat64 : Type::kFloat32;
  const std::string what = std::string(kernels().name) + " codes " + std::to_string(static_cast<int>(codes)) + " " +
                           name_of(type) + " rows=" + std::to_string(num_rows) + " begin=" + std::to_string(begin) +
                           " columns=" + std::to_string(columns);
  const std::int64_t bytes = (begin + columns + codes_per_byte(codes) - 1) / codes_per_byte(codes);
  std::vector<std::unique_ptr<std::uint8_t[]>> memory;
  std::vector<const std::uint8_t*> rows;
  std::vector<Accumulator> slopes, zeros, vector(columns), out(columns, 1);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    memory.push_back(std::make_unique<std::uint8_t[]>(bytes));
    for (std::int64_t i = 0; i < bytes; ++i) memory.back()[i] = static_cast<std::uint8_t>(random_bits());
    rows.push_back(memory.back().get());
    slopes.push_back(static_cast<Accumulator>(normal()));
    zeros.push_back(static_cast<Accumulator>(normal()));
  }
  for (Accumulator& number : vector) number = static_cast<Accumulator>(normal());
  const QuantizedKernels& quantized = quantized_kernels(type, codes);
  quantized.sum(rows.data(), slopes.data(), zeros.data(), num_rows, begin, columns, out.data());
  const double epsilon = type == Type::kFloat64 ? 1e-15 : 2e-7;
  bool sums_agree = true, alone_agree = true;
  for (std::int64_t column = 0; column < columns; ++column) {
    double sum = 0, magnitude = 0;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const double term = static_cast<double>(slopes[row]) *
                          (code_at(codes, rows[row], begin + column) - static_cast<double>(zeros[row]));
      sum += term;
      magnitude += std::fabs(term);
    }
    sums_agree &=
        std::fabs(static_cast<double>(out[column]) - sum) <= epsilon * static_cast<double>(num_rows + 3) * magnitude;
    Accumulator alone = 1;
    quantized.sum(rows.data(), slopes.data(), zeros.data(), num_rows, begin + column, 1, &alone);
    alone_agree &= std::memcmp(&alone, &out[column], sizeof alone) == 0;
  }
  expect(sums_agree, what);
  expect(alone_agree, what + ": a column alone has other bits");
  if (num_rows == 0) return;
  long double dot = 0, magnitude = 0;
  for (std::int64_t column = 0; column < columns; ++column) {
    const Accumulator offset = static_cast<Accumulator>(code_at(codes, rows[0], begin + column)) - zeros[0];
    dot += static_cast<long double>(offset) * vector[column];
    magnitude += std::fabs(static_cast<long double>(offset) * vector[column]);
  }
  const double got = quantized.dot(rows[0], zeros.data(), begin, vector.data(), columns);
  expect(std::fabs(got - static_cast<double>(dot)) <= 1e-13 * static_cast<double>(magnitude) + 1e-300, what + ": dot");
}

// All stages, on this thread.
void run(const Work& work) {
  for (std::int64_t task = 0; task < work.tasks; ++task) work.run(task);
  if (work.finish) work.finish();
  if (work.next) run(*work.next);
}

// Sorted rows and others, in the order that the contract promises, to the bit; `strays` are out of order in sorted
// rows, wherever an int32 can point.
void check_sparse(std::int64_t clients, std::int64_t entries, std::int64_t coordinates, bool sorted, int strays = 0) {
  const std::int64_t size = clients * entries;
  const auto values = std::make_unique<float[]>(size);
  const auto indices = std::make_unique<std::int32_t[]>(size);
  const auto weights = std::make_unique<float[]>(clients);
  const auto total = std::make_unique<float[]>(coordinates);
  const auto flags = std::make_unique<std::uint8_t[]>(clients);
  for (std::int64_t i = 0; i < size; ++i) {
    values[i] = static_cast<float>(normal());
    indices[i] = static_cast<std::int32_t>(random_bits() % static_cast<std::uint32_t>(coordinates + 6)) - 3;
  }
  for (std::int64_t row = 0; sorted && row < clients; ++row) {
    std::sort(indices.get() + row * entries, indices.get() + (row + 1) * entries);
  }
  for (int i = 0; i < strays; ++i) {
    const auto stray = static_cast<std::int32_t>(random_bits());
    indices[random_bits() % size] = i % 2 == 0 ? stray : stray % static_cast<std::int32_t>(coordinates);
  }
  for (std::int64_t i = 0; i < clients; ++i) weights[i] = i % 2 == 0 ? 2.0f : -0.5f;  // products are exact
  const auto view = [](auto* data, Type type, std::int64_t elements) {
    View view;
    view.data = reinterpret_cast<std::byte*>(data);
    view.type = type;
    view.elements = elements;
    return view;
  };
  auto problem = std::make_shared<SparseSumProblem>();
  problem->shape = {Batch(), clients, entries, coordinates};
  problem->values = view(values.get(), Type::kFloat32, size);
  problem->indices = view(indices.get(), Type::kInt32, size);
  problem->weights = view(weights.get(), Type::kFloat32, clients);
  problem->total = view(total.get(), Type::kFloat32, coordinates);
  problem->sorted = flags.get();
  run(cut(std::shared_ptr<const SparseSumProblem>(problem)));
  std::vector<float> wanted(coordinates);
  for (std::int64_t i = 0; i < size; ++i) {
    if (indices[i] >= 0 && indices[i] < coordinates) wanted[indices[i]] += weights[i / entries] * values[i];
  }
  expect(std::memcmp(wanted.data(), total.get(), coordinates * sizeof(float)) == 0,
         "sparse " + std::to_string(clients) + "x" + std::to_string(entries) + " of " + std::to_string(coordinates) +
             " strays=" + std::to_string(strays));
}

int main_of_test() {
  for (const std::string& isa : supported_isas()) {
    choose_isa(isa);
    for (const Codes codes : {Codes::kUInt8, Codes::kInt8, Codes::kUInt4, Codes::kInt4}) {
      for (const std::int64_t num_rows : {0, 1, 7, 8, 9, 17}) {
        for (const std::int64_t begin : {0, 1, 2, 5}) {
          for (const std::int64_t columns : {0, 1, 2, 15, 16, 17, 33, 100}) {
            check_quantized<float>(codes, num_rows, begin, columns);
            check_quantized<double>(codes, num_rows, begin, columns);
          }
        }
      }
    }
  }
  for (const bool sorted : {false, true}) {
    check_sparse(1, 1, 1, sorted);
    check_sparse(3, 0, 5, sorted);
    check_sparse(5, 2000, 1025, sorted);
    check_sparse(4, 3000, 3'000'000, sorted);
    check_sparse(100'000, 2, 3'000'000, sorted);  // more clients than starts are kept for in tiles of the usual width
  }
  for (int trial = 0; trial < 50; ++trial) {
    check_sparse(2, 5, 7, true, 1);
    check_sparse(3, 500, 50'000, true, 1 + trial % 3);
  }
  check_sparse(3, 3000, 3'000'000, true, 1);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fedfuse

int main() { return fedfuse::main_of_test(); }
