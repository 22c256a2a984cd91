// Reductions over a client's coordinates: squared_norms, client_dots, finite_clients.
#ifndef FEDFUSE_CONTRACT_REDUCTIONS_H_
#define FEDFUSE_CONTRACT_REDUCTIONS_H_

#include <string>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

// Sums over coordinates are taken in blocks of so many of a leaf, whose float64 sums are then added in order: neither
// the number of threads nor the size of a chunk can change them. fedfuse_jax/_core/workspace.py sizes the workspace by
// it.
inline constexpr std::int64_t kReductionBlock = 16384;

// The first block of each leaf, and one past the last.
inline std::vector<std::int64_t> first_blocks(const Shape& shape) {
  std::vector<std::int64_t> first = {0};
  for (const std::int64_t coordinates : shape.coordinates) {
    first.push_back(first.back() + (coordinates + kReductionBlock - 1) / kReductionBlock);
  }
  return first;
}

struct ClientDotsProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  std::vector<View> others;   // (clients, parameters), or (parameters) when shared; the updates again for squares
  bool squares = false;       // of the updates: squared_norms. Equal addresses do not say so: a batch may share others
  bool shared = false;
  View where;  // (clients) of bool, or not present
  View dots;   // (clients), float32 or float64
  // (batch, clients, blocks) partial sums.
  double* partials = nullptr;
  std::vector<std::int64_t> first_block;  // of each leaf, and one past the last
};

struct FiniteClientsProblem {
  Shape shape;
  std::vector<View> updates;  // (clients, parameters)
  View finite;                // (clients) of bool
};

std::string read_squared_norms(const Call& call, ClientDotsProblem* problem);
std::string read_client_dots(const Call& call, ClientDotsProblem* problem);
std::string read_finite_clients(const Call& call, FiniteClientsProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_REDUCTIONS_H_
