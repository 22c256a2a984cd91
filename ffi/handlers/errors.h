// What XLA is told of an exception.
#ifndef FEDFUSE_HANDLERS_ERRORS_H_
#define FEDFUSE_HANDLERS_ERRORS_H_

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace fedfuse {

// `who` begins the message. A size that no container can have is memory that is not there, too.
inline xla::ffi::Error error_of(const std::string& who, const std::exception& exception) {
  using xla::ffi::Error;
  if (dynamic_cast<const std::bad_alloc*>(&exception) != nullptr ||
      dynamic_cast<const std::length_error*>(&exception) != nullptr) {
    return Error(xla::ffi::ErrorCode::kResourceExhausted, who + ": out of memory.");
  }
  if (dynamic_cast<const std::invalid_argument*>(&exception) != nullptr) {
    return Error::InvalidArgument(who + ": " + exception.what());
  }
  return Error::Internal(who + ": " + exception.what());
}

}  // namespace fedfuse

#endif  // FEDFUSE_HANDLERS_ERRORS_H_
