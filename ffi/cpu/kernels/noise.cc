// Compiled once per instruction set, without contraction; see simd.h and math/normal.h.
#include "cpu/kernels/noise.h"

#include "cpu/kernels/simd.h"
#include "math/normal.h"
#include "math/threefry.h"

namespace fedfuse {
namespace FEDFUSE_ISA {
namespace {

struct Lanes {
  using Float = Vector<float>;
  using Word = Vector<std::uint32_t>;

  static FEDFUSE_INLINE Float to_float(Word integers) {
    return __builtin_convertvector(bits_as<std::int32_t>(integers), Float);
  }

  static FEDFUSE_INLINE Float root(Float x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Float>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Float>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
    return reinterpret_cast<Float>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#elif defined(__aarch64__)
    return reinterpret_cast<Float>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x)));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
  }

  static FEDFUSE_INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Float>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Float>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
    return reinterpret_cast<Float>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                             reinterpret_cast<float32x4_t>(b)));
#else
    return a * b + c;
#endif
  }

  template <typename Mask>
  static FEDFUSE_INLINE bool any(Mask mask) {
    return fedfuse::FEDFUSE_ISA::any(mask);
  }
};

constexpr int kFloats = kLanes<float>;
// Generators in flight hide the latency of each other's rounds.
constexpr int kInFlight = 4;

struct Normals {
  alignas(kVectorBytes) float values[kInFlight * kFloats];
};

// The normals of the counters from `counter` on.
FEDFUSE_INLINE void generate(const ThreefryKey& key, Vector<std::uint32_t> lanes, std::uint64_t counter,
                             Normals* normals) {
  Vector<std::uint32_t> bits[kInFlight];
  for (int i = 0; i < kInFlight; ++i) {
    const std::uint64_t first = counter + i * kFloats;
    const Vector<std::uint32_t> low = lanes + static_cast<std::uint32_t>(first);
    // Lanes whose low word has passed its end count on in the high one.
    const Vector<std::uint32_t> carry = bits_as<std::uint32_t>(low < static_cast<std::uint32_t>(first));
    const Vector<std::uint32_t> high = fill(static_cast<std::uint32_t>(first >> 32)) - carry;
    bits[i] = threefry_bits(key, high, low);
  }
  for (int i = 0; i < kInFlight; ++i) store(normals->values + i * kFloats, normal_from_bits<Lanes>(bits[i]));
}

template <typename Accumulator>
FEDFUSE_INLINE void add(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter, Accumulator stddev,
                        std::int64_t columns, Accumulator* sums) {
  const ThreefryKey key = ThreefryKey::from(key0, key1);
  Vector<std::uint32_t> lanes;
  for (int lane = 0; lane < kFloats; ++lane) lanes[lane] = lane;
  constexpr std::int64_t kStep = kInFlight * kFloats;
  Normals normals;
  for (std::int64_t column = 0; column < columns; column += kStep) {
    generate(key, lanes, counter + column, &normals);
    const std::int64_t count = columns - column < kStep ? columns - column : kStep;
    if (count == kStep) {
      for (int i = 0; i < kStep; ++i) sums[column + i] += stddev * static_cast<Accumulator>(normals.values[i]);
    } else {
      for (int i = 0; i < count; ++i) sums[column + i] += stddev * static_cast<Accumulator>(normals.values[i]);
    }
  }
}

void add_to_floats(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter, float stddev, std::int64_t columns,
                   float* sums) {
  add(key0, key1, counter, stddev, columns, sums);
}

void add_to_doubles(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter, double stddev, std::int64_t columns,
                    double* sums) {
  add(key0, key1, counter, stddev, columns, sums);
}

}  // namespace

extern const NoiseKernels noise = {add_to_floats, add_to_doubles};

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
