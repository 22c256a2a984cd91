// weighted_sum and weighted_mean.
#ifndef FEDFUSE_CONTRACT_LINEAR_H_
#define FEDFUSE_CONTRACT_LINEAR_H_

#include <string>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

struct WeightedSumProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  View weights;               // (clients), float32 or float64
  View where;                 // (clients) of bool, or not present
  bool divide = false;        // by the sum of the weights
  std::vector<View> reduced;  // (parameters)
};

std::string read_weighted_sum(const Call& call, WeightedSumProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_LINEAR_H_
