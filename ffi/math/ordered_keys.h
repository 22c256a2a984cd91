// Floating-point numbers as signed integers in the same order.
//
// The order is total: -inf < finite < +inf < NaN, with -0 just below +0. Every NaN, of either sign, is the one greatest
// key. The two steps are templates over a plain integer or a vector of them.
#ifndef FEDFUSE_MATH_ORDERED_KEYS_H_
#define FEDFUSE_MATH_ORDERED_KEYS_H_

#include <cstdint>
#include <cstring>

#include "contract/types.h"
#include "math/platform.h"

namespace fedfuse {

// The integers that hold the bits of a type, and some keys.
template <Type type>
struct Keys;

template <>
struct Keys<Type::kFloat32> {
  using Integer = std::int32_t;
  static constexpr Integer kNegativeInfinity = -0x7f800001;
  static constexpr Integer kGreatest = 0x7fffffff;
};

template <>
struct Keys<Type::kFloat64> {
  using Integer = std::int64_t;
  static constexpr Integer kNegativeInfinity = -0x7ff0000000000001;
  static constexpr Integer kGreatest = 0x7fffffffffffffff;
};

template <>
struct Keys<Type::kBFloat16> {
  using Integer = std::int16_t;
  static constexpr Integer kNegativeInfinity = -0x7f81;
  static constexpr Integer kGreatest = 0x7fff;
};

template <>
struct Keys<Type::kFloat16> {
  using Integer = std::int16_t;
  static constexpr Integer kNegativeInfinity = -0x7c01;
  static constexpr Integer kGreatest = 0x7fff;
};

// Bits to keys and back, but for NaN: inverts all bits of negative numbers save the sign. `greatest` has all bits but
// the sign set.
template <int kBits, typename Key>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Key flip_negative(Key bits, Key greatest) {
  return static_cast<Key>(bits ^ ((bits >> (kBits - 1)) & greatest));
}

// Puts the NaNs whose sign bit is set, which come out of flip_negative below -inf, at the top: every NaN is then above
// +inf, which is all that values need. Masks need merge_nans, which makes all of them one key.
template <typename Key>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Key raise_negative_nans(Key key, Key negative_infinity, Key greatest) {
  return key < negative_infinity ? greatest : key;
}

template <typename Key>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Key merge_nans(Key key, Key negative_infinity, Key greatest) {
  const Key positive_infinity = static_cast<Key>(~negative_infinity);
  key = raise_negative_nans<Key>(key, negative_infinity, greatest);
  return key > positive_infinity ? greatest : key;
}

// Makes -0 the same key as +0.
template <typename Key>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE Key merge_zeros(Key key, Key zero) {
  return key == static_cast<Key>(~zero) ? zero : key;
}

template <Type type>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE typename Keys<type>::Integer key_from_bits(typename Keys<type>::Integer bits) {
  using Integer = typename Keys<type>::Integer;
  return merge_nans<Integer>(flip_negative<8 * sizeof(Integer), Integer>(bits, Keys<type>::kGreatest),
                             Keys<type>::kNegativeInfinity, Keys<type>::kGreatest);
}

template <Type type>
FEDFUSE_HOST_DEVICE FEDFUSE_INLINE typename Keys<type>::Integer bits_from_key(typename Keys<type>::Integer key) {
  using Integer = typename Keys<type>::Integer;
  return flip_negative<8 * sizeof(Integer), Integer>(key, Keys<type>::kGreatest);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::int32_t key_from_float32(float value) {
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return key_from_bits<Type::kFloat32>(bits);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE float float32_from_key(std::int32_t key) {
  const std::int32_t bits = bits_from_key<Type::kFloat32>(key);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE std::int64_t key_from_float64(double value) {
  std::int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return key_from_bits<Type::kFloat64>(bits);
}

FEDFUSE_HOST_DEVICE FEDFUSE_INLINE double float64_from_key(std::int64_t key) {
  const std::int64_t bits = bits_from_key<Type::kFloat64>(key);
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fedfuse

#endif  // FEDFUSE_MATH_ORDERED_KEYS_H_
