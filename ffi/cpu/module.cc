// The CPU module: handlers that decode a call, check it against its contract and set its work going.
#include <memory>
#include <string>

#include "cpu/executor.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/pages.h"
#include "handlers/bindings.h"
#include "handlers/decode.h"
#include "handlers/errors.h"
#include "handlers/operations.h"

namespace fedfuse {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

template <typename Problem, std::string (*read)(const Call&, Problem*)>
ffi::Future handle(const char* operation, ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  try {
    auto problem = std::make_shared<Problem>();
    const Call call = decode_call(operation, operands, results, attributes);
    const std::string error = read(call, problem.get());
    if (!error.empty()) return failed(ffi::Error::InvalidArgument(error));
    prefer_huge_pages(call.results, pool.num_threads());
    return execute(pool, cut(std::shared_ptr<const Problem>(std::move(problem))));
  } catch (const std::exception& error) {
    return failed(error_of(std::string("fedfuse ") + operation, error));
  }
}

#define FEDFUSE_HANDLER(operation, Problem, read)                                                                     \
  XLA_FFI_DEFINE_HANDLER(                                                                                             \
      operation,                                                                                                      \
      [](ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) { \
        return (handle<Problem, read>)(#operation, pool, operands, results, attributes);                              \
      },                                                                                                              \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());

FEDFUSE_FOR_EACH_OPERATION(FEDFUSE_HANDLER)

#define FEDFUSE_NAMED(operation, Problem, read) {#operation, operation},
constexpr NamedHandler kHandlers[] = {FEDFUSE_FOR_EACH_OPERATION(FEDFUSE_NAMED)};

}  // namespace
}  // namespace fedfuse

NB_MODULE(_cpu, module) {
  using namespace fedfuse;
  if (supported_isas().empty()) throw nb::import_error("the CPU kernels of fedfuse_jax need a processor with AVX");
  module.doc() = "CPU kernels of fedfuse_jax, as XLA FFI handlers.";
  module.def("handlers", [] { return as_capsules(kHandlers); });
  module.def("build_info", [] {
    nb::dict info = common_build_info();
    std::string names;
    for (const std::string& name : supported_isas()) names += (names.empty() ? "" : ", ") + name;
    info["instruction_set"] = kernels().name;
    info["supported_here"] = names;
    return info;
  });
  module.def("choose_isa", [](const std::string& name) { return choose_isa(name); });
}
