// The element types that kernels know.
#ifndef FEDFUSE_CONTRACT_TYPES_H_
#define FEDFUSE_CONTRACT_TYPES_H_

#include <cstdint>

namespace fedfuse {

// The floating types, which have kernels, come first.
enum class Type : std::uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBool,
  kInt32,
  kUInt8,
  kInt8,
  kUInt32,
  kOther
};
inline constexpr int kNumTypes = 4;

inline constexpr bool is_floating(Type type) { return static_cast<int>(type) < kNumTypes; }

// What sums of values of a floating type are kept in.
inline constexpr Type accumulator_of(Type type) { return type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32; }

inline constexpr std::int64_t bytes_of(Type type) {
  switch (type) {
    case Type::kFloat64:
      return 8;
    case Type::kFloat32:
    case Type::kInt32:
    case Type::kUInt32:
      return 4;
    case Type::kBFloat16:
    case Type::kFloat16:
      return 2;
    default:
      return 1;
  }
}

inline constexpr const char* name_of(Type type) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "bool",
                                    "int32",   "uint8",   "int8",     "uint32",  "other"};
  return kNames[static_cast<int>(type)];
}

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_TYPES_H_
