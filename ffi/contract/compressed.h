// Sums of sparse and of quantised updates, and what their derivatives need.
#ifndef FEDFUSE_CONTRACT_COMPRESSED_H_
#define FEDFUSE_CONTRACT_COMPRESSED_H_

#include <string>

#include "contract/buffers.h"

namespace fedfuse {

// ---- Sparse -----------------------------------------------------------------------------------------------------

// A client's k entries each go with an index. One that is not from 0 to coordinates - 1 is ignored, with its value.
// Everything that is not low precision has the accumulator's type.
struct SparseShape {
  Batch batch;
  std::int64_t clients = 0;
  std::int64_t entries = 0;  // of a client
  std::int64_t coordinates = 0;
};

struct SparseSumProblem {
  SparseShape shape;
  View values;   // (clients, entries), floating
  View indices;  // (clients, entries) of int32
  View weights;  // (clients)
  View where;    // (clients) of bool, or not present
  View total;    // (coordinates)
  // (batch, clients): scratch, for whether a client's indices are sorted. fedfuse_jax/_primitives/sparse.py sizes it.
  std::uint8_t* sorted = nullptr;
};

// wᵢ y(index): the sum's transpose by its values.
struct SparseSpreadProblem {
  SparseShape shape;
  View indices;  // (clients, entries) of int32
  View weights;  // (clients)
  View vector;   // (coordinates)
  View where;    // (clients) of bool, or not present
  View spread;   // (clients, entries), floating
};

// The sum over a client's entries of value times y(index): the sum's transpose by its weights.
struct SparseDotsProblem {
  SparseShape shape;
  View values;   // (clients, entries), floating
  View indices;  // (clients, entries) of int32
  View vector;   // (coordinates)
  View where;    // (clients) of bool, or not present
  View dots;     // (clients)
};

std::string read_sparse_sum(const Call& call, SparseSumProblem* problem);
std::string read_sparse_spread(const Call& call, SparseSpreadProblem* problem);
std::string read_sparse_dots(const Call& call, SparseDotsProblem* problem);

// ---- Quantised --------------------------------------------------------------------------------------------------

// What a byte holds: one code, or two of 4 bits, the low half first.
enum class Codes : std::uint8_t { kUInt8, kInt8, kUInt4, kInt4 };
inline constexpr int kNumCodes = 4;

inline constexpr int codes_per_byte(Codes codes) { return codes == Codes::kUInt4 || codes == Codes::kInt4 ? 2 : 1; }

// A client's codes, whole bytes of them, in blocks of adjacent coordinates; the last block may be short.
struct QuantizedShape {
  Batch batch;
  std::int64_t clients = 0;
  std::int64_t coordinates = 0;
  std::int64_t bytes = 0;  // of a client
  std::int64_t blocks = 0;
  std::int64_t block_size = 0;
  Codes codes = Codes::kUInt8;
};

// The sum over the clients of weight * scale * (code - zero point). All but codes and `where` have the total's type.
struct QuantizedSumProblem {
  QuantizedShape shape;
  View codes;        // (clients, bytes) of uint8 or int8
  View scales;       // (clients, blocks)
  View zero_points;  // (clients, blocks)
  View weights;      // (clients)
  View where;        // (clients) of bool, or not present
  View total;        // (coordinates), float32 or float64
};

// The sum over each block of (code - zero point) * y: the other's transpose, but for a factor.
struct QuantizedDotsProblem {
  QuantizedShape shape;
  View codes;        // (clients, bytes) of uint8 or int8
  View zero_points;  // (clients, blocks)
  View vector;       // (coordinates)
  View where;        // (clients) of bool, or not present
  View dots;         // (clients, blocks), float32 or float64
};

std::string read_quantized_sum(const Call& call, QuantizedSumProblem* problem);
std::string read_quantized_dots(const Call& call, QuantizedDotsProblem* problem);

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_COMPRESSED_H_
