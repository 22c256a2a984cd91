// What kernels know of an element type, one element at a time, and how threads load several.
#ifndef FEDFUSE_CUDA_ELEMENTS_H_
#define FEDFUSE_CUDA_ELEMENTS_H_

#include <cstdint>
#include <cstring>

#include "contract/types.h"
#include "cuda/team.h"
#include "math/half.h"
#include "math/ordered_keys.h"
#include "math/rounding.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fedfuse {
namespace cuda {

// Bits: the integer that holds an element. Accumulator: what elements are summed in.
template <Type type>
struct Element;

template <>
struct Element<Type::kFloat32> {
  using Bits = std::int32_t;
  using Accumulator = float;
  static FEDFUSE_DEVICE float widen(Bits bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static FEDFUSE_DEVICE Bits narrow(float value) {
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

template <>
struct Element<Type::kFloat64> {
  using Bits = std::int64_t;
  using Accumulator = double;
  static FEDFUSE_DEVICE double widen(Bits bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static FEDFUSE_DEVICE Bits narrow(double value) {
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

template <>
struct Element<Type::kBFloat16> {
  using Bits = std::int16_t;
  using Accumulator = float;
  static FEDFUSE_DEVICE float widen(Bits bits) { return bfloat16_to_float(static_cast<std::uint16_t>(bits)); }
  static FEDFUSE_DEVICE Bits narrow(float value) { return static_cast<Bits>(float_to_bfloat16(value)); }
};

template <>
struct Element<Type::kFloat16> {
  using Bits = std::int16_t;
  using Accumulator = float;
  static FEDFUSE_DEVICE float widen(Bits bits) {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
    return float16_to_float(static_cast<std::uint16_t>(bits));
#endif
  }
  static FEDFUSE_DEVICE Bits narrow(float value) { return static_cast<Bits>(float_to_float16(value)); }
};

// ---- Types known at run time ----------------------------------------------------------------------------------------

template <typename Accumulator>
FEDFUSE_DEVICE Accumulator load_as(Type type, const std::byte* from, std::int64_t index) {
  switch (type) {
    case Type::kFloat64:
      return static_cast<Accumulator>(reinterpret_cast<const double*>(from)[index]);
    case Type::kBFloat16:
      return Element<Type::kBFloat16>::widen(reinterpret_cast<const std::int16_t*>(from)[index]);
    case Type::kFloat16:
      return Element<Type::kFloat16>::widen(reinterpret_cast<const std::int16_t*>(from)[index]);
    default:
      return reinterpret_cast<const float*>(from)[index];
  }
}

FEDFUSE_DEVICE float to_narrow(float value) { return value; }
FEDFUSE_DEVICE float to_narrow(double value) { return round_to_odd(value); }

// Rounds once.
template <typename Accumulator>
FEDFUSE_DEVICE void store_as(Type type, Accumulator value, std::byte* to, std::int64_t index) {
  switch (type) {
    case Type::kFloat64:
      reinterpret_cast<double*>(to)[index] = value;
      break;
    case Type::kBFloat16:
      reinterpret_cast<std::uint16_t*>(to)[index] = float_to_bfloat16(to_narrow(value));
      break;
    case Type::kFloat16:
      reinterpret_cast<std::uint16_t*>(to)[index] = float_to_float16(to_narrow(value));
      break;
    default:
      reinterpret_cast<float*>(to)[index] = static_cast<float>(value);
  }
}

// ---- Several elements at a time -------------------------------------------------------------------------------------

inline constexpr int kPackBytes = 16;

struct alignas(kPackBytes) PackBits {
  std::uint32_t words[4];
};

FEDFUSE_DEVICE bool is_aligned(const void* pointer, std::int64_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(alignment) == 0;
}

// Adjacent elements: as many as one load brings.
template <typename T>
struct Pack {
  static constexpr int kSize = kPackBytes / static_cast<int>(sizeof(T));
  T elements[kSize];

  // The first `count` of them; the others are 0. Whoever says that the address is aligned gets one load of all.
  static FEDFUSE_DEVICE Pack load(const T* from, bool aligned, std::int64_t count) {
    Pack pack;
    if (aligned && count >= kSize) {
      const PackBits bits = *reinterpret_cast<const PackBits*>(from);
      memcpy(&pack, &bits, sizeof pack);
    } else {
      for (int i = 0; i < kSize; ++i) pack.elements[i] = i < count ? from[i] : T{};
    }
    return pack;
  }

  FEDFUSE_DEVICE void store(T* to, bool aligned, std::int64_t count) const {
    if (aligned && count >= kSize) {
      PackBits bits;
      memcpy(&bits, this, sizeof bits);
      *reinterpret_cast<PackBits*>(to) = bits;
    } else {
      for (int i = 0; i < kSize; ++i) {
        if (i < count) to[i] = elements[i];
      }
    }
  }
};

// Two adjacent 16-bit elements in a word, or one, where `columns` says that there are no more.
FEDFUSE_DEVICE std::uint32_t load_halves(const std::int16_t* from, bool aligned, std::int64_t columns) {
  if (aligned && columns > 1) return *reinterpret_cast<const std::uint32_t*>(from);
  const std::uint32_t low = static_cast<std::uint16_t>(from[0]);
  return columns > 1 ? low | static_cast<std::uint32_t>(static_cast<std::uint16_t>(from[1])) << 16 : low;
}

// row + stride, in a way that keeps a compiler from working out all addresses beforehand and holding them in registers.
template <typename Bits>
FEDFUSE_DEVICE const Bits* next_row(const Bits* row, std::int64_t stride) {
#if defined(__CUDACC__)
  // What is in global memory remains known to be there.
  std::size_t address = __cvta_generic_to_global(row);
  asm("add.s64 %0, %0, %1;" : "+l"(address) : "l"(stride * static_cast<std::int64_t>(sizeof(Bits))));
  return static_cast<const Bits*>(__cvta_global_to_generic(address));
#else
  // An address that is not read may lie anywhere.
  return reinterpret_cast<const Bits*>(reinterpret_cast<std::uintptr_t>(row) + stride * sizeof(Bits));
#endif
}

// The same number, but nothing that was made of it: a compiler makes it anew rather than keep it in a register.
FEDFUSE_DEVICE std::int64_t forgotten(std::int64_t number) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(number));
#endif
  return number;
}

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_ELEMENTS_H_
