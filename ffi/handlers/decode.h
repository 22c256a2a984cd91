// From an XLA FFI call to plain data, for the handlers of every platform.
#ifndef FEDFUSE_HANDLERS_DECODE_H_
#define FEDFUSE_HANDLERS_DECODE_H_

#include <optional>
#include <string>

#include "contract/buffers.h"
#include "xla/ffi/api/ffi.h"

// A module loads under the FFI API it was built for and every newer one, so wheels are built for the oldest supported.
#ifdef FEDFUSE_REQUIRE_OLDEST_FFI_API
static_assert(XLA_FFI_API_MAJOR == 0 && XLA_FFI_API_MINOR == 1,
              "wheels need the FFI headers of the oldest supported jaxlib");
#endif

namespace fedfuse {

inline Type decode_type(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return Type::kFloat32;
    case xla::ffi::DataType::F64:
      return Type::kFloat64;
    case xla::ffi::DataType::BF16:
      return Type::kBFloat16;
    case xla::ffi::DataType::F16:
      return Type::kFloat16;
    case xla::ffi::DataType::PRED:
      return Type::kBool;
    case xla::ffi::DataType::S32:
      return Type::kInt32;
    case xla::ffi::DataType::U8:
      return Type::kUInt8;
    case xla::ffi::DataType::U32:
      return Type::kUInt32;
    case xla::ffi::DataType::S8:
      return Type::kInt8;
    default:
      return Type::kOther;
  }
}

inline Buffer decode_buffer(const xla::ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return {buffer.untyped_data(), decode_type(buffer.element_type()), {dims.begin(), dims.end()}};
}

// The call refers to `attributes`, which have to outlive it.
inline Call decode_call(const char* operation, const xla::ffi::RemainingArgs& operands,
                        const xla::ffi::RemainingRets& results, const xla::ffi::Dictionary& attributes) {
  Call call;
  call.operation = operation;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    call.operands.push_back(decode_buffer(*operands.get<xla::ffi::AnyBuffer>(i)));
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    call.results.push_back(decode_buffer(**results.get<xla::ffi::AnyBuffer>(i)));
  }
  call.attribute = [&attributes](const char* name) -> std::optional<std::int64_t> {
    if (!attributes.contains(name)) return std::nullopt;
    if (const auto integer = attributes.get<std::int32_t>(name); integer.has_value()) return *integer;
    if (const auto flag = attributes.get<bool>(name); flag.has_value()) return *flag;
    return std::nullopt;
  };
  return call;
}

}  // namespace fedfuse

#endif  // FEDFUSE_HANDLERS_DECODE_H_
