// What the host tests of the CUDA kernels have in common: arrays, and running a problem with the threads in either
// order. For one test program each: everything has internal linkage.
#ifndef FEDFUSE_CUDA_TESTS_ARRAYS_H_
#define FEDFUSE_CUDA_TESTS_ARRAYS_H_

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/operations.h"
#include "math/half.h"
#include "math/ordered_keys.h"

namespace fedfuse {
namespace cuda {
namespace {

int passed = 0, failed = 0;
std::mt19937_64 random_bits(1);

[[maybe_unused]] void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// ---- Arrays ---------------------------------------------------------------------------------------------------------

[[maybe_unused]] double get(Type type, const std::byte* data, std::int64_t index) {
  const auto as = [&](auto value) {
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
  };
  switch (type) {
    case Type::kFloat64:
      return as(double{});
    case Type::kBFloat16:
      return bfloat16_to_float(as(std::uint16_t{}));
    case Type::kFloat16:
      return float16_to_float(as(std::uint16_t{}));
    case Type::kInt32:
      return as(std::int32_t{});
    case Type::kUInt32:
      return as(std::uint32_t{});
    case Type::kBool:
      return as(std::uint8_t{});
    default:
      return as(float{});
  }
}

[[maybe_unused]] void put(Type type, double value, std::byte* data, std::int64_t index) {
  const auto as = [&](auto element) { std::memcpy(data + index * sizeof element, &element, sizeof element); };
  switch (type) {
    case Type::kFloat64:
      return as(value);
    case Type::kBFloat16:
      return as(float_to_bfloat16(static_cast<float>(value)));
    case Type::kFloat16:
      return as(float_to_float16(static_cast<float>(value)));
    case Type::kInt32:
      return as(static_cast<std::int32_t>(value));
    case Type::kUInt32:
      return as(static_cast<std::uint32_t>(value));
    case Type::kBool:
      return as(static_cast<std::uint8_t>(value));
    default:
      return as(static_cast<float>(value));
  }
}

// An operand or result: `elements` of it in one element of the batch, shared over the batch axes whose bit is missing.
struct Array {
  Array(Type type, const Batch& batch, std::int64_t elements, unsigned mapped = 0xff) {
    view.type = type;
    view.elements = elements;
    std::int64_t stride = elements * bytes_of(type);
    for (int axis = batch.rank - 1; axis >= 0; --axis) {
      if ((mapped >> axis & 1u) == 0) continue;
      view.strides[axis] = batch.sizes[axis] == 1 ? 0 : stride;
      stride *= batch.sizes[axis];
    }
    bytes = stride;
    memory = std::make_unique<std::byte[]>(bytes);
    std::memset(memory.get(), 0xa5, bytes);
    view.data = memory.get();
  }

  std::int64_t size() const { return bytes / bytes_of(view.type); }

  Array& fill(const std::function<double(std::int64_t)>& value) {
    for (std::int64_t i = 0; i < size(); ++i) put(view.type, value(i), view.data, i);
    return *this;
  }

  View view;
  std::int64_t bytes;
  std::unique_ptr<std::byte[]> memory;
};

[[maybe_unused]] std::vector<View> views_of(const std::vector<Array>& arrays) {
  std::vector<View> views;
  for (const Array& array : arrays) views.push_back(array.view);
  return views;
}

[[maybe_unused]] double normal() { return std::normal_distribution<double>()(random_bits); }

[[maybe_unused]] Type accumulator(Type type) { return accumulator_of(type); }

// Elements of all kinds, ties, infinities and NaNs of both signs among them.
[[maybe_unused]] void fill_wildly(Array* array, int pattern) {
  const Type type = array->view.type;
  const std::int64_t width = bytes_of(type);
  const double greatest = type == Type::kFloat64   ? 1.7976931348623157e308
                          : type == Type::kFloat16 ? 65504
                                                   : 3.3895314e38;
  for (std::int64_t i = 0; i < array->size(); ++i) {
    const double sign = random_bits() % 2 == 0 ? 1 : -1;
    double value = normal();
    switch (pattern % 6) {
      case 1: {
        constexpr double kValues[] = {0.0, -0.0, 1, -1, 2};
        value = kValues[random_bits() % 5];
        break;
      }
      case 2: {
        const double values[] = {0, INFINITY, NAN, greatest, 1, 1e-7};
        value = std::copysign(values[random_bits() % 6], sign);
        break;
      }
      case 3:
        value = sign * greatest;
        break;
      case 4: {
        const std::uint64_t bits = random_bits();
        std::memcpy(array->view.data + i * width, &bits, width);
        continue;
      }
      case 5:
        if (random_bits() % 4 == 0) value = std::copysign(NAN, sign);
        break;
    }
    put(type, value, array->view.data, i);
  }
}

[[maybe_unused]] Shape shape_of(std::vector<std::int64_t> batch, std::int64_t clients,
                                std::vector<std::int64_t> coordinates) {
  Shape shape;
  shape.batch.rank = static_cast<int>(batch.size());
  for (int axis = 0; axis < kMaxBatchDims; ++axis) shape.batch.sizes[axis] = axis < shape.batch.rank ? batch[axis] : 1;
  shape.batch.count = std::accumulate(batch.begin(), batch.end(), std::int64_t{1}, std::multiplies<>());
  shape.clients = clients;
  shape.coordinates = std::move(coordinates);
  return shape;
}

// The same leaves and so many short ones that they fill a table; the last few go into another launch.
[[maybe_unused]] std::vector<std::int64_t> with_many(std::vector<std::int64_t> coordinates) {
  coordinates.resize(coordinates.size() + kMostLeaves, 1);
  return coordinates;
}

// Enqueues the problem with the threads in either order; the results are those of the second time.
template <typename Problem>
void run(const std::string& what, const Problem& problem, const std::vector<Array*>& results) {
  std::vector<std::vector<std::byte>> first, inputs;
  for (const Array* result : results) inputs.emplace_back(result->view.data, result->view.data + result->bytes);
  reversed_threads = false;
  expect(enqueue(problem, nullptr).empty(), what + ": enqueued");
  for (std::size_t i = 0; i < results.size(); ++i) {
    first.emplace_back(results[i]->view.data, results[i]->view.data + results[i]->bytes);
    std::copy(inputs[i].begin(), inputs[i].end(), results[i]->view.data);
  }
  reversed_threads = true;
  expect(enqueue(problem, nullptr).empty(), what + ": enqueued");
  bool same = true;
  for (std::size_t i = 0; i < results.size(); ++i) {
    same &= std::equal(first[i].begin(), first[i].end(), results[i]->view.data);
  }
  expect(same, what + ": the order of the threads does not matter");
}

[[maybe_unused]] std::vector<Array*> pointers(std::vector<Array>& arrays) {
  std::vector<Array*> result;
  for (Array& array : arrays) result.push_back(&array);
  return result;
}

[[maybe_unused]] bool is_close(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::fabs(got - expected) <= tolerance;
}

[[maybe_unused]] double epsilon_of(Type type) {
  return type == Type::kFloat64   ? 0x1p-52
         : type == Type::kFloat32 ? 0x1p-23
         : type == Type::kFloat16 ? 0x1p-10
                                  : 0x1p-7;
}

}  // namespace
}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_TESTS_ARRAYS_H_
