// The CPU module: handlers that decode a call, check it against its contract and set its work going.
#include <memory>
#include <string>

#include "cpu/executor.h"
#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/pages.h"
#include "handlers/bindings.h"
#include "handlers/decode.h"

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
    for (const Buffer& result : call.results) prefer_huge_pages(result.data, bytes_of(result));
    return execute(pool, cut(std::shared_ptr<const Problem>(std::move(problem))));
  } catch (const std::exception& error) {
    return failed(ffi::Error::Internal(std::string("fedfuse ") + operation + ": " + error.what()));
  }
}

#define FEDFUSE_HANDLER(operation, Problem, read)                                                                     \
  XLA_FFI_DEFINE_HANDLER(                                                                                             \
      operation,                                                                                                      \
      [](ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) { \
        return (handle<Problem, read>)(#operation, pool, operands, results, attributes);                              \
      },                                                                                                              \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs())

FEDFUSE_HANDLER(weighted_sum, WeightedSumProblem, read_weighted_sum);
FEDFUSE_HANDLER(weighted_mean, WeightedSumProblem, read_weighted_sum);
FEDFUSE_HANDLER(weighted_spread, WeightedSpreadProblem, read_weighted_spread);
FEDFUSE_HANDLER(squared_norms, ClientDotsProblem, read_squared_norms);
FEDFUSE_HANDLER(client_dots, ClientDotsProblem, read_client_dots);
FEDFUSE_HANDLER(finite_clients, FiniteClientsProblem, read_finite_clients);
FEDFUSE_HANDLER(accumulate_weighted, AccumulateProblem, read_accumulate);
FEDFUSE_HANDLER(stack_clients, StackProblem, read_stack);
FEDFUSE_HANDLER(coordinate_median, TrimmedMeanProblem, read_trimmed_mean);
FEDFUSE_HANDLER(trimmed_mean, TrimmedMeanProblem, read_trimmed_mean);
FEDFUSE_HANDLER(mean_around_median, TrimmedMeanProblem, read_mean_around_median);
FEDFUSE_HANDLER(selected_mean, SelectedMeanProblem, read_selected_mean);
FEDFUSE_HANDLER(spread_to_selected, SpreadProblem, read_spread);
FEDFUSE_HANDLER(client_norms, ClientNormsProblem, read_client_norms);
FEDFUSE_HANDLER(clipped_weighted_sum, PrivateSumProblem, read_private_sum);
FEDFUSE_HANDLER(noisy_weighted_sum, PrivateSumProblem, read_private_sum);
FEDFUSE_HANDLER(clipped_noisy_weighted_sum, PrivateSumProblem, read_private_sum);
FEDFUSE_HANDLER(fedavgm_weighted_update, ServerUpdateProblem, read_server_update);
FEDFUSE_HANDLER(fedadagrad_weighted_update, ServerUpdateProblem, read_server_update);
FEDFUSE_HANDLER(fedadam_weighted_update, ServerUpdateProblem, read_server_update);
FEDFUSE_HANDLER(fedyogi_weighted_update, ServerUpdateProblem, read_server_update);
FEDFUSE_HANDLER(topk_sparse_weighted_sum, SparseSumProblem, read_sparse_sum);
FEDFUSE_HANDLER(sparse_spread, SparseSpreadProblem, read_sparse_spread);
FEDFUSE_HANDLER(sparse_dots, SparseDotsProblem, read_sparse_dots);
FEDFUSE_HANDLER(quantized_weighted_sum, QuantizedSumProblem, read_quantized_sum);
FEDFUSE_HANDLER(quantized_dots, QuantizedDotsProblem, read_quantized_dots);

constexpr NamedHandler kHandlers[] = {
    {"weighted_sum", weighted_sum},
    {"weighted_mean", weighted_mean},
    {"weighted_spread", weighted_spread},
    {"squared_norms", squared_norms},
    {"client_dots", client_dots},
    {"finite_clients", finite_clients},
    {"accumulate_weighted", accumulate_weighted},
    {"stack_clients", stack_clients},
    {"coordinate_median", coordinate_median},
    {"trimmed_mean", trimmed_mean},
    {"mean_around_median", mean_around_median},
    {"selected_mean", selected_mean},
    {"spread_to_selected", spread_to_selected},
    {"client_norms", client_norms},
    {"clipped_weighted_sum", clipped_weighted_sum},
    {"noisy_weighted_sum", noisy_weighted_sum},
    {"clipped_noisy_weighted_sum", clipped_noisy_weighted_sum},
    {"fedavgm_weighted_update", fedavgm_weighted_update},
    {"fedadagrad_weighted_update", fedadagrad_weighted_update},
    {"fedadam_weighted_update", fedadam_weighted_update},
    {"fedyogi_weighted_update", fedyogi_weighted_update},
    {"topk_sparse_weighted_sum", topk_sparse_weighted_sum},
    {"sparse_spread", sparse_spread},
    {"sparse_dots", sparse_dots},
    {"quantized_weighted_sum", quantized_weighted_sum},
    {"quantized_dots", quantized_dots},
};

}  // namespace
}  // namespace fedfuse

NB_MODULE(_cpu, module) {
  using namespace fedfuse;
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
