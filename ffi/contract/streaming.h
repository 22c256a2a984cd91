// accumulate_weighted and stack_clients.
#ifndef FEDFUSE_CONTRACT_STREAMING_H_
#define FEDFUSE_CONTRACT_STREAMING_H_

#include <string>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

struct AccumulateProblem {
  Shape shape;
  std::vector<View> total;   // (parameters), in the accumulator's type
  std::vector<View> update;  // (parameters)
  View weight;               // scalar, float32 or float64
  std::vector<View> result;  // (parameters); may be total's own memory
};

struct StackProblem {
  Shape shape;
  std::vector<std::vector<View>> clients;  // for each client, its leaves: (parameters)
  std::vector<View> stacked;               // (clients, parameters)
};

std::string read_accumulate(const Call& call, AccumulateProblem* problem);
std::string read_stack(const Call& call, StackProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_STREAMING_H_
