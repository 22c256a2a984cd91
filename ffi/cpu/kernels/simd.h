// Vectors of the widest registers of the instruction set a file is compiled for, on the vector extensions of GCC and
// Clang; intrinsics only where those have no word for it.
//
// For files compiled once per instruction set, with FEDFUSE_ISA naming the set. Everything has internal linkage, so
// that the linker never gives one set's code to another.
#ifndef FEDFUSE_CPU_KERNELS_SIMD_H_
#define FEDFUSE_CPU_KERNELS_SIMD_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "math/platform.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kCacheLineBytes = 64;

template <typename Lane>
struct VectorOf {
  typedef Lane Native __attribute__((vector_size(kVectorBytes)));
};
template <typename Lane>
using Vector = typename VectorOf<Lane>::Native;

template <typename Lane>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Lane));

template <typename Lane>
FEDFUSE_INLINE Vector<Lane> load(const void* from) {
  Vector<Lane> vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Native>
FEDFUSE_INLINE void store(void* to, Native vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// Stores past the caches; `to` must be aligned to a vector. Needs stream_fence() before anyone else may read.
template <typename Native>
FEDFUSE_INLINE void stream(void* to, Native vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(vector));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(vector));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(vector));
#else
  store(to, vector);
#endif
}

FEDFUSE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// (Less zero, since plus zero would be an instruction: it makes +0 of -0.)
template <typename Lane>
FEDFUSE_INLINE Vector<Lane> fill(Lane value) {
  return value - Vector<Lane>{};
}

template <typename Lane, typename Native>
FEDFUSE_INLINE Vector<Lane> bits_as(Native vector) {
  return reinterpret_cast<Vector<Lane>>(vector);
}

// Whether any bit is set.
template <typename Native>
FEDFUSE_INLINE bool any(Native vector) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(vector);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#elif defined(__AVX2__)
  const __m256i bits = reinterpret_cast<__m256i>(vector);
  return !_mm256_testz_si256(bits, bits);
#else
  const Vector<std::uint64_t> bits = bits_as<std::uint64_t>(vector);
  return (bits[0] | bits[1]) != 0;
#endif
}

// Set bits of each lane.
FEDFUSE_INLINE Vector<std::uint32_t> count_bits(Vector<std::uint32_t> x) {
#if defined(__AVX512VPOPCNTDQ__)
  return reinterpret_cast<Vector<std::uint32_t>>(_mm512_popcnt_epi32(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i of_nibble = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                             0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibbles = _mm256_set1_epi8(15);
  const __m256i bits = reinterpret_cast<__m256i>(x);
  const __m256i low = _mm256_shuffle_epi8(of_nibble, _mm256_and_si256(bits, nibbles));
  const __m256i high = _mm256_shuffle_epi8(of_nibble, _mm256_and_si256(_mm256_srli_epi32(bits, 4), nibbles));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1));
  return reinterpret_cast<Vector<std::uint32_t>>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Vector<std::uint32_t>>(vpaddlq_u16(vpaddlq_u8(vcntq_u8(reinterpret_cast<uint8x16_t>(x)))));
#else
  x = x - ((x >> 1) & 0x55555555u);
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  x = x + (x >> 8);
  return (x + (x >> 16)) & 0x3fu;
#endif
}

// (x & ~mask) | (y & mask)
FEDFUSE_INLINE Vector<std::uint32_t> select_bits(Vector<std::uint32_t> mask, Vector<std::uint32_t> x,
                                                 Vector<std::uint32_t> y) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<std::uint32_t>>(_mm512_ternarylogic_epi32(
      reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y), 0xac));
#else
  return x ^ ((x ^ y) & mask);
#endif
}

// The lower or upper half of the lanes.
template <typename Lane>
struct HalfOf {
  typedef Lane Native __attribute__((vector_size(kVectorBytes / 2)));
};

template <typename Lane, int... kIndices>
FEDFUSE_INLINE typename HalfOf<Lane>::Native pick(Vector<Lane> lanes, bool upper,
                                                  std::integer_sequence<int, kIndices...>) {
  constexpr int kHalf = sizeof...(kIndices);
  return upper ? __builtin_shufflevector(lanes, lanes, (kIndices + kHalf)...)
               : __builtin_shufflevector(lanes, lanes, kIndices...);
}

template <typename Lane>
FEDFUSE_INLINE typename HalfOf<Lane>::Native half_of(Vector<Lane> lanes, bool upper) {
  return pick<Lane>(lanes, upper, std::make_integer_sequence<int, kLanes<Lane> / 2>());
}

// As many floats as float64 has lanes. (GCC 12 makes four conversions, of two lanes each and put together again, of
// what an instruction does.)
template <typename HalfVector>
FEDFUSE_INLINE Vector<double> widen_floats(HalfVector half) {
  static_assert(sizeof(half) * 2 == sizeof(Vector<double>));
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(half)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<double>>(_mm256_cvtps_pd(reinterpret_cast<__m128>(half)));
#else
  return __builtin_convertvector(half, Vector<double>);
#endif
}

// A half of the lanes as float64.
FEDFUSE_INLINE Vector<double> widen_half(Vector<float> lanes, bool upper) {
  return widen_floats(half_of<float>(lanes, upper));
}

// The lanes of both halves, added up, as float64.
FEDFUSE_INLINE Vector<double> widen_folded(Vector<float> lanes) {
  return widen_floats(half_of<float>(lanes, false) + half_of<float>(lanes, true));
}

// A half of the lanes as unsigned integers in lanes twice as wide.
FEDFUSE_INLINE Vector<std::uint32_t> widen_half(Vector<std::int16_t> lanes, bool upper) {
  return __builtin_convertvector(half_of<std::uint16_t>(bits_as<std::uint16_t>(lanes), upper), Vector<std::uint32_t>);
}

}  // namespace
}  // namespace FEDFUSE_ISA
}  // namespace fedfuse

#endif  // FEDFUSE_CPU_KERNELS_SIMD_H_
