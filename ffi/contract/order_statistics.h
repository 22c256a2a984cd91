// coordinate_median, trimmed_mean and mean_around_median, and the two halves of their derivative.
#ifndef FEDFUSE_CONTRACT_ORDER_STATISTICS_H_
#define FEDFUSE_CONTRACT_ORDER_STATISTICS_H_

#include <string>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

// What an order statistic keeps: of m participating clients, in every coordinate, the ranks from k to m - k - 1; or,
// around the median, the m - k in a row whose values are nearest it (math/around_median.h).
struct Trim {
  View where;                   // (clients) of bool, or not present
  View count;                   // scalar int32, or not present
  std::int64_t attribute = -1;  // k where `count` is not present
  bool around_median = false;
};

struct TrimmedMeanProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  Trim trim;
  std::vector<View> reduced;  // (parameters)
};

// The mean of other values over the clients whose updates are kept.
struct SelectedMeanProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  std::vector<View> values;   // (clients, parameters), of the updates' types
  Trim trim;
  std::vector<View> reduced;  // (parameters)
};

// Its transpose: every client that is kept gets its share of the cotangent, the others get 0.
struct SpreadProblem {
  Shape shape;
  std::vector<View> updates;     // (clients, parameters)
  std::vector<View> cotangents;  // (parameters)
  Trim trim;
  std::vector<View> spread;  // (clients, parameters), of the updates' types
};

std::string read_trimmed_mean(const Call& call, TrimmedMeanProblem* problem);
std::string read_mean_around_median(const Call& call, TrimmedMeanProblem* problem);
std::string read_selected_mean(const Call& call, SelectedMeanProblem* problem);
std::string read_spread(const Call& call, SpreadProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_ORDER_STATISTICS_H_
