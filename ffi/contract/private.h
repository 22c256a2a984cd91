// client_norms, and sums that are clipped, noisy, or both.
#ifndef FEDFUSE_CONTRACT_PRIVATE_H_
#define FEDFUSE_CONTRACT_PRIVATE_H_

#include <string>
#include <vector>

#include "contract/buffers.h"
#include "contract/reductions.h"
#include "math/clipping.h"

namespace fedfuse {

struct ClientNormsProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  View where;                 // (clients) of bool, or not present
  View norms;                 // (clients), float32 or float64
  // (batch, clients, blocks): sums over blocks of kReductionBlock coordinates. fedfuse_jax/_primitives/norms.py knows
  // their size.
  ScaledSum* partials = nullptr;
  std::vector<std::int64_t> first_block;  // of each leaf, and one past the last
};

// Levels are a leaf's axes, or several of them in one, and arrays have fewer axes than this.
inline constexpr int kMostBlockLevels = 64;

// Noise on a sum: stddev times the normals of a key per leaf.
struct Noise {
  View keys;    // (leaves, 2) of uint32, or not present: no noise
  View stddev;  // scalar, float32 or float64
  View blocks;  // (leaves, levels, 3) of uint32: where this device's coordinates lie; or not present: all are here
  int levels = 0;
};

struct PrivateSumProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  View weights;               // (clients), float32 or float64
  View max_norm;              // scalar, float32 or float64; or not present: nobody is clipped
  View given_norms;           // (clients), float32 or float64; or not present: they are to be found
  View where;                 // (clients) of bool, or not present
  Noise noise;
  std::vector<View> reduced;  // (parameters), in the accumulators' types
  // Where clients are clipped: their norms, and for (batch, clients) what they are multiplied by.
  ClientNormsProblem norms;
  ClipFactor* factors = nullptr;
};

std::string read_client_norms(const Call& call, ClientNormsProblem* problem);
std::string read_private_sum(const Call& call, PrivateSumProblem* problem);

// What is wrong with the numbers in `blocks`, where they can be read: each leaf's levels have the coordinates that it
// has here, and lie inside it. Where they cannot be, on a GPU, numbers that do not fit make other noise and no more:
// nothing is divided by them or addressed with them.
std::string check_blocks(const PrivateSumProblem& problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_PRIVATE_H_
