// The fused server optimizers: fedavgm_, fedadagrad_, fedadam_ and fedyogi_weighted_update.
#ifndef FEDFUSE_CONTRACT_SERVER_H_
#define FEDFUSE_CONTRACT_SERVER_H_

#include <string>
#include <vector>

#include "contract/buffers.h"
#include "contract/linear.h"
#include "math/server_rules.h"

namespace fedfuse {

// Parameters and state, before or after; the buffers may be the same ones.
struct ServerBuffers {
  View step;                 // scalar int32
  std::vector<View> params;  // (parameters)
  std::vector<View> first;   // (parameters), in the accumulators' types of the parameters
  std::vector<View> second;
};

struct ServerUpdateProblem {
  ServerRule rule = ServerRule::kAvgM;
  Shape shape;
  ServerBuffers old;
  ServerBuffers updated;
  View learning_rate, b1, b2, tau;  // scalars, float32 or float64
  // The weighted mean, into scratch memory of the moments' types.
  WeightedSumProblem mean;
  // For each element of the batch, whether the round counts: somebody takes part, and all that is new is finite.
  std::int32_t* accepted = nullptr;
};

std::string read_server_update(const Call& call, ServerUpdateProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_SERVER_H_
