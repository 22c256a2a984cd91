// What the kernels for order statistics know of an element type: its keys and its accumulators, a vector at a time.
// For files compiled once per instruction set; see simd.h.
#ifndef FEDFUSE_CPU_KERNELS_ELEMENTS_H_
#define FEDFUSE_CPU_KERNELS_ELEMENTS_H_

#include <cstdint>

#include "contract/types.h"
#include "cpu/kernels/simd.h"
#include "math/half.h"
#include "math/ordered_keys.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

// A vector of keys, as a class so that the networks find minimum and maximum.
template <typename Lane>
struct KeyVector {
  Vector<Lane> native;
};

template <typename Lane>
FEDFUSE_INLINE KeyVector<Lane> minimum(KeyVector<Lane> a, KeyVector<Lane> b) {
  return {a.native < b.native ? a.native : b.native};
}

template <typename Lane>
FEDFUSE_INLINE KeyVector<Lane> maximum(KeyVector<Lane> a, KeyVector<Lane> b) {
  return {a.native < b.native ? b.native : a.native};
}

template <typename Lane>
constexpr Lane kGreatestKey = static_cast<Lane>((std::uint64_t{1} << (8 * sizeof(Lane) - 1)) - 1);

// Bits to keys, or back for keys that come from bits.
template <typename Lane>
FEDFUSE_INLINE Vector<Lane> flipped(Vector<Lane> bits) {
  return flip_negative<8 * sizeof(Lane)>(bits, fill<Lane>(kGreatestKey<Lane>));
}

// Bits to keys good for finding values. `negative_infinity` is what tells one 16-bit type from the other.
template <typename Lane>
FEDFUSE_INLINE Vector<Lane> value_keys(Vector<Lane> bits, Vector<Lane> negative_infinity) {
  return raise_negative_nans(flipped<Lane>(bits), negative_infinity, fill<Lane>(kGreatestKey<Lane>));
}

// Bits to bits of the same standing that are equal where their order is: one NaN, one zero.
template <typename Lane>
FEDFUSE_INLINE Vector<Lane> canonical(Vector<Lane> bits, Vector<Lane> negative_infinity) {
  const Vector<Lane> greatest = fill<Lane>(kGreatestKey<Lane>);
  const Vector<Lane> infinity = ~negative_infinity;
  bits = (bits & greatest) > infinity ? greatest : bits;
  return bits == ~greatest ? Vector<Lane>{} : bits;
}

// Accumulator: what elements are summed in. kParts vectors of accumulators hold one vector of elements, in order.
template <Type type>
struct Element;

template <>
struct Element<Type::kFloat32> {
  using Lane = Keys<Type::kFloat32>::Integer;
  using Accumulator = float;
  static constexpr int kParts = 1;

  static FEDFUSE_INLINE void widen(Vector<Lane> bits, Vector<float> parts[kParts]) { parts[0] = bits_as<float>(bits); }
  static FEDFUSE_INLINE Vector<Lane> narrow(const Vector<float> parts[kParts]) { return bits_as<Lane>(parts[0]); }
};

template <>
struct Element<Type::kFloat64> {
  using Lane = Keys<Type::kFloat64>::Integer;
  using Accumulator = double;
  static constexpr int kParts = 1;

  static FEDFUSE_INLINE void widen(Vector<Lane> bits, Vector<double> parts[kParts]) {
    parts[0] = bits_as<double>(bits);
  }
  static FEDFUSE_INLINE Vector<Lane> narrow(const Vector<double> parts[kParts]) { return bits_as<Lane>(parts[0]); }
};

template <>
struct Element<Type::kBFloat16> {
  using Lane = Keys<Type::kBFloat16>::Integer;
  using Accumulator = float;
  static constexpr int kParts = 2;

  static FEDFUSE_INLINE void widen(Vector<Lane> bits, Vector<float> parts[kParts]) {
    parts[0] = bits_as<float>(widen_half(bits, false) << 16);
    parts[1] = bits_as<float>(widen_half(bits, true) << 16);
  }
  static FEDFUSE_INLINE Vector<Lane> narrow(const Vector<float> parts[kParts]) {
    alignas(kVectorBytes) float values[kLanes<Lane>];
    alignas(kVectorBytes) std::uint16_t halves[kLanes<Lane>];
    for (int part = 0; part < kParts; ++part) store(values + part * kLanes<float>, parts[part]);
    for (int lane = 0; lane < kLanes<Lane>; ++lane) halves[lane] = float_to_bfloat16(values[lane]);
    return load<Lane>(halves);
  }
};

template <>
struct Element<Type::kFloat16> {
  using Lane = Keys<Type::kFloat16>::Integer;
  using Accumulator = float;
  static constexpr int kParts = 2;

  static FEDFUSE_INLINE void widen(Vector<Lane> bits, Vector<float> parts[kParts]) {
#if defined(__AVX512F__)
    for (int part = 0; part < kParts; ++part) {
      const auto halves = reinterpret_cast<__m256i>(half_of<Lane>(bits, part != 0));
      // With a mask, though of all ones: GCC 12 warns about the intrinsic without.
      parts[part] = _mm512_maskz_cvtph_ps(0xffff, halves);
    }
#elif defined(__AVX2__)
    for (int part = 0; part < kParts; ++part) {
      parts[part] = _mm256_cvtph_ps(reinterpret_cast<__m128i>(half_of<Lane>(bits, part != 0)));
    }
#else
    for (int part = 0; part < kParts; ++part) {
      parts[part] =
          bits_as<float>(float32_bits_from_float16<Vector<std::uint32_t>, Vector<float> >(widen_half(bits, part != 0)));
    }
#endif
  }
  static FEDFUSE_INLINE Vector<Lane> narrow(const Vector<float> parts[kParts]) {
    alignas(kVectorBytes) float values[kLanes<Lane>];
    alignas(kVectorBytes) std::uint16_t halves[kLanes<Lane>];
    for (int part = 0; part < kParts; ++part) store(values + part * kLanes<float>, parts[part]);
    for (int lane = 0; lane < kLanes<Lane>; ++lane) halves[lane] = float_to_float16(values[lane]);
    return load<Lane>(halves);
  }
};

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_ELEMENTS_H_
