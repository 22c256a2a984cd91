#include "cpu/convert.h"

#include <cstring>

#include "math/half.h"
#include "math/rounding.h"

namespace fedfuse {
namespace {

template <typename From, typename To, typename Function>
void map(const void* from, void* to, std::int64_t count, Function function) {
  const From* in = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<To>(function(in[i]));
}

template <typename To>
void widen(Type from_type, const void* from, void* to, std::int64_t count) {
  switch (from_type) {
    case Type::kFloat32:
      return map<float, To>(from, to, count, [](float x) { return x; });
    case Type::kFloat64:
      return map<double, To>(from, to, count, [](double x) { return x; });
    case Type::kBFloat16:
      return map<std::uint16_t, To>(from, to, count, bfloat16_to_float);
    case Type::kFloat16:
      return map<std::uint16_t, To>(from, to, count, float16_to_float);
    default:
      return;
  }
}

template <typename From, typename Narrow>
void narrow(Type to_type, const void* from, void* to, std::int64_t count, Narrow to_float) {
  if (to_type == Type::kBFloat16) {
    map<From, std::uint16_t>(from, to, count, [=](From x) { return float_to_bfloat16(to_float(x)); });
  } else {
    map<From, std::uint16_t>(from, to, count, [=](From x) { return float_to_float16(to_float(x)); });
  }
}

}  // namespace

void convert(Type from_type, const void* from, Type to_type, void* to, std::int64_t count) {
  if (from_type == to_type) {
    std::memcpy(to, from, count * bytes_of(to_type));
  } else if (to_type == Type::kFloat32) {
    widen<float>(from_type, from, to, count);
  } else if (to_type == Type::kFloat64) {
    widen<double>(from_type, from, to, count);
  } else if (from_type == Type::kFloat64) {
    narrow<double>(to_type, from, to, count, round_to_odd);
  } else {
    narrow<float>(to_type, from, to, count, [](float x) { return x; });
  }
}

}  // namespace fedfuse
