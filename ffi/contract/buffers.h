// A custom call's buffers and attributes as plain data, and what a kernel sees of a batch.
#ifndef FEDFUSE_CONTRACT_BUFFERS_H_
#define FEDFUSE_CONTRACT_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "contract/types.h"
#include "math/platform.h"

namespace fedfuse {

struct Buffer {
  void* data = nullptr;
  Type type = Type::kOther;
  std::vector<std::int64_t> dims;
};

// The product of sizes, none of them negative; the greatest number where it is more than that, and so where a buffer
// is asked for that nobody can have.
template <typename Sizes = std::initializer_list<std::int64_t>>
std::int64_t product(const Sizes& sizes) {
  std::int64_t result = 1;
  bool is_zero = false;
  for (const std::int64_t size : sizes) {
    is_zero = is_zero || size == 0;
    if (size != 0 && __builtin_mul_overflow(result, size, &result)) result = std::numeric_limits<std::int64_t>::max();
  }
  return is_zero ? 0 : result;
}

inline std::int64_t bytes_of(const Buffer& buffer) {
  std::int64_t bytes = bytes_of(buffer.type);
  for (std::int64_t dim : buffer.dims) bytes *= dim;
  return bytes;
}

// One custom call as it arrived. Nothing in it has been checked.
struct Call {
  const char* operation = "";
  std::vector<Buffer> operands;
  std::vector<Buffer> results;
  std::function<std::optional<std::int64_t>(const char*)> attribute;
};

// vmap gives every operand as many leading axes as there are maps, each of full size or, where the operand is not
// mapped, of size 1. fedfuse_jax/_core/declaration.py has the same number.
inline constexpr int kMaxBatchDims = 8;

struct Batch {
  int rank = 0;
  std::int64_t sizes[kMaxBatchDims] = {};
  std::int64_t count = 1;
};

// One operand or result. An axis of the batch along which it is shared has stride 0.
struct View {
  std::byte* data = nullptr;
  Type type = Type::kOther;
  std::int64_t elements = 0;                 // in one element of the batch
  std::int64_t strides[kMaxBatchDims] = {};  // in bytes

  bool present() const { return type != Type::kOther; }

  FEDFUSE_HOST_DEVICE std::byte* at(const Batch& batch, std::int64_t index) const {
    std::int64_t offset = 0;
    for (int axis = batch.rank - 1; axis >= 0; --axis) {
      offset += index % batch.sizes[axis] * strides[axis];
      index /= batch.sizes[axis];
    }
    return data + offset;
  }
};

// What every problem over client-stacked leaves has in common.
struct Shape {
  Batch batch;
  std::int64_t clients = 0;
  std::vector<std::int64_t> coordinates;  // of each leaf
};

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_BUFFERS_H_
