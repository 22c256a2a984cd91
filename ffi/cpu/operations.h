// The CPU's side of every operation: a problem in, work out.
#ifndef FEDFUSE_CPU_OPERATIONS_H_
#define FEDFUSE_CPU_OPERATIONS_H_

#include <memory>

#include "contract/compressed.h"
#include "contract/linear.h"
#include "contract/order_statistics.h"
#include "contract/private.h"
#include "contract/reductions.h"
#include "contract/server.h"
#include "contract/streaming.h"
#include "cpu/work.h"

namespace fedfuse {

Work cut(std::shared_ptr<const WeightedSumProblem> problem);
Work cut(std::shared_ptr<const WeightedSpreadProblem> problem);
Work cut(std::shared_ptr<const TrimmedMeanProblem> problem);
Work cut(std::shared_ptr<const SelectedMeanProblem> problem);
Work cut(std::shared_ptr<const SpreadProblem> problem);
Work cut(std::shared_ptr<const ClientDotsProblem> problem);
Work cut(std::shared_ptr<const FiniteClientsProblem> problem);
Work cut(std::shared_ptr<const AccumulateProblem> problem);
Work cut(std::shared_ptr<const StackProblem> problem);
Work cut(std::shared_ptr<const ClientNormsProblem> problem);
Work cut(std::shared_ptr<const PrivateSumProblem> problem);
Work cut(std::shared_ptr<const ServerUpdateProblem> problem);
Work cut(std::shared_ptr<const SparseSumProblem> problem);
Work cut(std::shared_ptr<const SparseSpreadProblem> problem);
Work cut(std::shared_ptr<const SparseDotsProblem> problem);
Work cut(std::shared_ptr<const QuantizedSumProblem> problem);
Work cut(std::shared_ptr<const QuantizedDotsProblem> problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_OPERATIONS_H_
