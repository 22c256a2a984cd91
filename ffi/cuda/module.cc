// The CUDA module: handlers that decode a call, check it against its contract and put its kernels on XLA's stream.
#include <string>

#include "cuda/operations.h"
#include "cuda/runtime.h"
#include "handlers/bindings.h"
#include "handlers/decode.h"
#include "handlers/errors.h"
#include "handlers/operations.h"

namespace fedfuse {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

template <typename Problem, std::string (*read)(const Call&, Problem*)>
ffi::Error handle(const char* operation, cuda::Stream stream, const ffi::RemainingArgs& operands,
                  const ffi::RemainingRets& results, const ffi::Dictionary& attributes) {
  try {
    Problem problem;
    std::string error = read(decode_call(operation, operands, results, attributes), &problem);
    if (!error.empty()) return ffi::Error::InvalidArgument(error);
    error = cuda::enqueue(problem, stream);
    if (error.empty()) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("fedfuse ") + operation + ": " + error);
  } catch (const std::exception& error) {
    return error_of(std::string("fedfuse ") + operation, error);
  }
}

// Launches depend on shapes, types and attributes alone, so XLA may record them in a command buffer.
#define FEDFUSE_HANDLER(operation, Problem, read)                                                                    \
  XLA_FFI_DEFINE_HANDLER(                                                                                            \
      operation,                                                                                                     \
      [](cuda::Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) { \
        return (handle<Problem, read>)(#operation, stream, operands, results, attributes);                           \
      },                                                                                                             \
      ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cuda::Stream>>().RemainingArgs().RemainingRets().Attrs(),             \
      {ffi::Traits::kCmdBufferCompatible});

FEDFUSE_FOR_EACH_OPERATION(FEDFUSE_HANDLER)

#define FEDFUSE_NAMED(operation, Problem, read) {#operation, operation},
constexpr NamedHandler kHandlers[] = {FEDFUSE_FOR_EACH_OPERATION(FEDFUSE_NAMED)};

}  // namespace
}  // namespace fedfuse

NB_MODULE(_cuda, module) {
  using namespace fedfuse;
  module.doc() = "CUDA kernels of fedfuse_jax, as XLA FFI handlers.";
  module.def("handlers", [] { return as_capsules(kHandlers); });
  module.def("build_info", [] {
    nb::dict info = common_build_info();
    info["cuda_compiler"] = cuda::compiler_version();
    info["cuda_targets"] = cuda::targets();
    info["cuda_runtime"] = cuda::runtime_version();
    info["cuda_driver"] = cuda::driver_version();
    return info;
  });
}
