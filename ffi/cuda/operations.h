// The GPU's side of every operation: puts the kernels for a problem on a stream. Allocates nothing, waits for nothing
// and reads nothing back, and the launches depend on shapes, types and attributes alone. Returns what went wrong, or
// "".
#ifndef FEDFUSE_CUDA_OPERATIONS_H_
#define FEDFUSE_CUDA_OPERATIONS_H_

#include <string>

#include "contract/compressed.h"
#include "contract/linear.h"
#include "contract/order_statistics.h"
#include "contract/private.h"
#include "contract/reductions.h"
#include "contract/server.h"
#include "contract/streaming.h"
#include "cuda/team.h"

namespace fedfuse {
namespace cuda {

std::string enqueue(const WeightedSumProblem& problem, Stream stream);
std::string enqueue(const WeightedSpreadProblem& problem, Stream stream);
std::string enqueue(const TrimmedMeanProblem& problem, Stream stream);
std::string enqueue(const SelectedMeanProblem& problem, Stream stream);
std::string enqueue(const SpreadProblem& problem, Stream stream);
std::string enqueue(const ClientDotsProblem& problem, Stream stream);
std::string enqueue(const FiniteClientsProblem& problem, Stream stream);
std::string enqueue(const AccumulateProblem& problem, Stream stream);
std::string enqueue(const StackProblem& problem, Stream stream);
std::string enqueue(const ClientNormsProblem& problem, Stream stream);
std::string enqueue(const PrivateSumProblem& problem, Stream stream);
std::string enqueue(const ServerUpdateProblem& problem, Stream stream);
std::string enqueue(const SparseSumProblem& problem, Stream stream);
std::string enqueue(const SparseSpreadProblem& problem, Stream stream);
std::string enqueue(const SparseDotsProblem& problem, Stream stream);
std::string enqueue(const QuantizedSumProblem& problem, Stream stream);
std::string enqueue(const QuantizedDotsProblem& problem, Stream stream);

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_OPERATIONS_H_
