// weighted_sum and weighted_mean, and what their derivative needs.
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

// The transpose of weighted_sum: every client gets the cotangent times its weight, an absent one exactly 0.
struct WeightedSpreadProblem {
  Shape shape;
  View weights;                  // (clients), float32 or float64
  std::vector<View> cotangents;  // (parameters)
  View where;                    // (clients) of bool, or not present
  std::vector<View> spread;      // (clients, parameters)
};

std::string read_weighted_sum(const Call& call, WeightedSumProblem* problem);
std::string read_weighted_spread(const Call& call, WeightedSpreadProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_LINEAR_H_
