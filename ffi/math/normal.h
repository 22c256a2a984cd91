// Random bits to standard normals, as jax.random.normal does it in float32: sqrt(2) erfinv(u), u uniform in (-1, 1).
//
// Written over Lanes: one float in a CUDA thread, a vector of them on a CPU. It has the types Float and Word (of
// unsigned integers), to_float(Word) for integers below 2^9, root(Float), multiply_add(a, b, c), rounded once where the
// hardware can, and any(mask) of a comparison's result. No other product may be contracted with a sum here: in the
// tails the value hangs on how u * u was rounded.
#ifndef FEDFUSE_MATH_NORMAL_H_
#define FEDFUSE_MATH_NORMAL_H_

#include <cstdint>
#include <cstring>

#include "math/platform.h"

namespace fedfuse {

template <typename To, typename From>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Float>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Float rounded_product(Float a, Float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // in files compiled without contraction
#endif
}

// The polynomial with these coefficients, that of the highest power first. (A number less Float{} is that number in
// every lane.)
template <typename Lanes, int kSize>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE typename Lanes::Float polynomial(typename Lanes::Float x,
                                                                    const float (&coefficients)[kSize]) {
  using Float = typename Lanes::Float;
  Float sum = coefficients[0] - Float{};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 1; i < kSize; ++i) sum = Lanes::multiply_add(sum, x, coefficients[i] - Float{});
  return sum;
}

// The logarithm of a number from 2^-24 to 1, to an ulp or so (Cephes' logf).
template <typename Lanes>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE typename Lanes::Float log_of_fraction(typename Lanes::Float x) {
  using Float = typename Lanes::Float;
  using Word = typename Lanes::Word;
  // x = mantissa * 2^exponent with the mantissa from sqrt(1/2) to sqrt(2).
  constexpr std::uint32_t kRootOfHalf = 0x3f3504f3u;
  const Word offset = same_bits<Word>(x) - kRootOfHalf;
  const Float exponent = Lanes::to_float(((offset >> 23) + 32u) & 511u) - 32.0f;
  const Float r = same_bits<Float>((offset & 0x007fffffu) + kRootOfHalf) - 1.0f;
  const Float square = r * r;
  const Float p =
      polynomial<Lanes>(r, {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                            -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f});
  Float low = Lanes::multiply_add(exponent, -2.12194440e-4f - Float{}, p * r * square);
  low = Lanes::multiply_add(square, -0.5f - Float{}, low);
  return Lanes::multiply_add(exponent, 0.693359375f - Float{}, low + r);
}

// The polynomials are those of Giles 2012 (Approximating the erfinv function), and of XLA.
template <typename Lanes>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE typename Lanes::Float normal_from_bits(typename Lanes::Word bits) {
  using Float = typename Lanes::Float;
  constexpr float kLeast = -0x1.fffffep-1f;  // the number after -1
  // In [kLeast, 1): the sum is kLeast at least, since the product is not negative.
  const Float u =
      Lanes::multiply_add(same_bits<Float>((bits >> 9) | 0x3f800000u) - 1.0f, 2.0f - Float{}, kLeast - Float{});
  const Float w = -log_of_fraction<Lanes>(1.0f - rounded_product<Float>(u, u));
  Float p = polynomial<Lanes>(w - 2.5f, {2.81022636e-08f, 3.43273939e-07f, -3.5233877e-06f, -4.39150654e-06f,
                                         0.00021858087f, -0.00125372503f, -0.00417768164f, 0.246640727f, 1.50140941f});
  const auto is_tail = w >= 5.0f;
  if (Lanes::any(is_tail)) {
    const Float q = polynomial<Lanes>(
        Lanes::root(w) - 3.0f, {-0.000200214257f, 0.000100950558f, 0.00134934322f, -0.00367342844f, 0.00573950773f,
                                -0.0076224613f, 0.00943887047f, 1.00167406f, 2.83297682f});
    p = is_tail ? q : p;
  }
  return p * u * 1.41421356237f;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_NORMAL_H_
