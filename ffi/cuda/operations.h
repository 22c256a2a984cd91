// The GPU's side of every operation: puts the kernels for a problem on a stream. Allocates nothing, waits for nothing
// and reads nothing back, and the launches depend on shapes, types and attributes alone. Returns what went wrong, or
// "".
#ifndef FEDFUSE_CUDA_OPERATIONS_H_
#define FEDFUSE_CUDA_OPERATIONS_H_

#include <string>

#include "contract/distances.h"
#include "contract/linear.h"
#include "contract/order_statistics.h"
#include "contract/reductions.h"
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
std::string enqueue(const PairsProblem& problem, Stream stream);
std::string enqueue(const MixProblem& problem, Stream stream);
std::string enqueue(const StepProblem& problem, Stream stream);

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_OPERATIONS_H_
