// What both modules show to Python: their handlers, and how they were built.
#ifndef FEDFUSE_HANDLERS_BINDINGS_H_
#define FEDFUSE_HANDLERS_BINDINGS_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace fedfuse {

struct NamedHandler {
  const char* operation;
  XLA_FFI_Handler* handler;
};

// {operation: capsule}, as jax.ffi.register_ffi_target takes them.
template <std::size_t kCount>
nanobind::dict as_capsules(const NamedHandler (&handlers)[kCount]) {
  nanobind::dict capsules;
  for (const NamedHandler& named : handlers) {
    capsules[named.operation] = nanobind::capsule(reinterpret_cast<void*>(named.handler));
  }
  return capsules;
}

inline nanobind::dict common_build_info() {
  nanobind::dict info;
  info["version"] = FEDFUSE_VERSION;
  info["ffi_api_major"] = std::to_string(XLA_FFI_API_MAJOR);
  info["ffi_api_minor"] = std::to_string(XLA_FFI_API_MINOR);
  info["compiler"] = FEDFUSE_COMPILER;
  return info;
}

}  // namespace fedfuse

#endif  // FEDFUSE_HANDLERS_BINDINGS_H_
