// Between clients: how far apart they are, combinations of them, and a step toward them.
#ifndef FEDFUSE_CONTRACT_DISTANCES_H_
#define FEDFUSE_CONTRACT_DISTANCES_H_

#include <string>
#include <vector>

#include "contract/buffers.h"
#include "contract/reductions.h"

namespace fedfuse {

// The partial sums of all pairs are kept for so many segments of the coordinates that they are no more numbers than
// this, for one segment at least. fedfuse_jax/_primitives/distances.py sizes the workspace by it.
inline constexpr std::int64_t kMostPairSums = std::int64_t{1} << 20;

// Squared distances of all pairs of clients; or the products of their differences with those of others.
struct PairsProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  std::vector<View> others;   // (clients, parameters), of the updates' types; the updates again for distances
  bool squares = true;
  View where;  // (clients) of bool, or not present
  View pairs;  // (clients, clients), float32 or float64
  // (batch, segments, clients, clients) partial sums. A segment is some of the blocks of kReductionBlock coordinates.
  double* partials = nullptr;
  std::int64_t segments = 1;
  std::vector<std::int64_t> first_block;  // of each leaf, and one past the last
};

// What is said of a pair of clients: what their sum is when it is one of squares. NaN is what a client that is not
// finite has for a distance from itself.
inline FEDFUSE_HOST_DEVICE double finish_pair(double sum, bool squares, bool both_present, bool itself) {
  if (squares) {
    if (!both_present) return __builtin_inf();
    return sum != sum && !itself ? __builtin_inf() : sum;
  }
  return both_present && !itself ? sum : 0;
}

// mixed[r] = sum over i of mixing[r][i] * updates[i]; whoever's coefficient is 0 is not touched.
struct MixProblem {
  Shape shape;
  std::int64_t rows = 0;
  std::vector<View> updates;  // (clients, parameters)
  View mixing;                // (rows, clients), float32 or float64
  std::vector<View> mixed;    // (rows, parameters)
};

// moved = center + sum over i of weights[i] * (updates[i] - center), and how far every client is from there: 0 for an
// absent one, infinite for one that is not finite. Whoever's weight is 0 is measured but not touched.
struct StepProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  std::vector<View> center;   // (parameters), of the accumulators' types
  View weights;               // (clients), float32 or float64
  View where;                 // (clients) of bool, or not present
  std::vector<View> moved;    // (parameters), of the accumulators' types
  View distances;             // (clients), float32 or float64
  // (batch, clients, blocks) partial sums of squares.
  double* partials = nullptr;
  std::vector<std::int64_t> first_block;  // of each leaf, and one past the last
};

std::string read_pairs(const Call& call, PairsProblem* problem);
std::string read_mix(const Call& call, MixProblem* problem);
std::string read_step(const Call& call, StepProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_DISTANCES_H_
