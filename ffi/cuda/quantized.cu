// quantized_weighted_sum: a thread sums a few adjacent coordinates over the clients, in their order, and widens codes
// in registers; and what the derivatives need.
#include "cuda/clients.h"
#include "cuda/collectives.h"
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

struct QuantizedParameters {
  QuantizedShape shape;
  std::int64_t work;
  View codes;
  View scales;
  View zero_points;
  View weights;
  View vector;
  View where;
  View result;
};

// A few adjacent codes, the first of which begins a byte.
template <Codes codes>
struct CodePack {
  static constexpr int kSize = 8;
  static constexpr int kBits = 8 / codes_per_byte(codes);
  static constexpr int kBytes = kSize * kBits / 8;

  std::uint64_t word;

  // The first `count` of them; the others are any.
  static FEDFUSE_DEVICE CodePack load(const std::uint8_t* from, std::int64_t count) {
    CodePack pack{0};
    if (count >= kSize && is_aligned(from, kBytes)) {
      if constexpr (kBytes == 8) {
        pack.word = *reinterpret_cast<const std::uint64_t*>(from);
      } else {
        pack.word = *reinterpret_cast<const std::uint32_t*>(from);
      }
    } else {
      for (int byte = 0; byte < kBytes; ++byte) {
        if (byte * codes_per_byte(codes) < count) pack.word |= static_cast<std::uint64_t>(from[byte]) << (8 * byte);
      }
    }
    return pack;
  }

  FEDFUSE_DEVICE int operator[](int i) const {
    const auto bits = static_cast<int>(word >> (kBits * i)) & ((1 << kBits) - 1);
    constexpr bool kSigned = codes == Codes::kInt8 || codes == Codes::kInt4;
    constexpr int kSign = 1 << (kBits - 1);
    return kSigned ? (bits ^ kSign) - kSign : bits;
  }
};

template <typename Accumulator>
FEDFUSE_DEVICE const Accumulator* numbers_of(const View& view, const Batch& batch, std::int64_t index) {
  return reinterpret_cast<const Accumulator*>(view.at(batch, index));
}

template <typename Accumulator, Codes codes>
struct QuantizedSum {
  using Parameters = QuantizedParameters;
  using Shared = Nothing;
  using CodesOfThread = CodePack<codes>;

  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr int kColumns = CodesOfThread::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    const std::int64_t tiles = (p.shape.coordinates + kTileColumns - 1) / kTileColumns;
    const std::int64_t batch = task / tiles;
    const std::int64_t tile = task - batch * tiles;
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const Accumulator* const weights = numbers_of<Accumulator>(p.weights, p.shape.batch, batch);
    const Accumulator* const scales = numbers_of<Accumulator>(p.scales, p.shape.batch, batch);
    const Accumulator* const zero_points = numbers_of<Accumulator>(p.zero_points, p.shape.batch, batch);
    const std::uint8_t* const rows = numbers_of<std::uint8_t>(p.codes, p.shape.batch, batch);
    Accumulator* const total = reinterpret_cast<Accumulator*>(p.result.at(p.shape.batch, batch));

    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t column = tile * kTileColumns + thread * kColumns;
      const std::int64_t count = p.shape.coordinates - column;
      if (count <= 0) return;
      const std::int64_t last = column + (count < kColumns ? count : kColumns) - 1;
      const std::int64_t block = column / p.shape.block_size;
      const bool one_block = block == last / p.shape.block_size;
      const std::uint8_t* const own = rows + column / codes_per_byte(codes);
      Accumulator sums[kColumns] = {};
      const auto is_present = [&](std::int64_t client) { return where == nullptr || where[client] != 0; };
      const auto levels_of = [&](std::int64_t client) {
        return CodesOfThread::load(own + client * p.shape.bytes, count);
      };
      if (one_block) {
#pragma unroll 4
        for (std::int64_t client = 0; client < p.shape.clients; ++client) {
          if (!is_present(client)) continue;
          const CodesOfThread levels = levels_of(client);
          const std::int64_t at = client * p.shape.blocks + block;
          const Accumulator slope = weights[client] * scales[at], zero = zero_points[at];
          for (int i = 0; i < kColumns; ++i) sums[i] += slope * (static_cast<Accumulator>(levels[i]) - zero);
        }
      } else {
#pragma unroll 1
        for (std::int64_t client = 0; client < p.shape.clients; ++client) {
          if (!is_present(client)) continue;
          const CodesOfThread levels = levels_of(client);
          for (int i = 0; i < kColumns; ++i) {
            const std::int64_t of_block = (i < count ? column + i : last) / p.shape.block_size;
            const std::int64_t at = client * p.shape.blocks + of_block;
            sums[i] += weights[client] * scales[at] * (static_cast<Accumulator>(levels[i]) - zero_points[at]);
          }
        }
      }
      for (int i = 0; i < kColumns; ++i) {
        if (i < count) total[column + i] = sums[i];
      }
    });
  }
};

template <typename Accumulator, Codes codes>
FEDFUSE_DEVICE int code_at(const std::uint8_t* row, std::int64_t coordinate) {
  const std::int64_t byte = coordinate / codes_per_byte(codes);
  const int half = static_cast<int>(coordinate - byte * codes_per_byte(codes));
  return CodePack<codes>::load(row + byte, codes_per_byte(codes))[half];
}

// The sum over one block of coordinates of one client by all the threads.
template <typename Accumulator, Codes codes>
struct QuantizedDotLarge {
  using Parameters = QuantizedParameters;
  static constexpr int kThreads = 1024;

  using Shared = Reduction<double, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const std::int64_t row = task / p.shape.blocks, block = task - row * p.shape.blocks;
    const std::int64_t batch = row / p.shape.clients, client = row - batch * p.shape.clients;
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const bool present = where == nullptr || where[client] != 0;
    const std::uint8_t* const codes_of_row =
        numbers_of<std::uint8_t>(p.codes, p.shape.batch, batch) + client * p.shape.bytes;
    const Accumulator* const vector = numbers_of<Accumulator>(p.vector, p.shape.batch, batch);
    const std::int64_t at = client * p.shape.blocks + block;
    const Accumulator zero = numbers_of<Accumulator>(p.zero_points, p.shape.batch, batch)[at];
    const std::int64_t begin = block * p.shape.block_size;
    const std::int64_t rest = p.shape.coordinates - begin;
    const std::int64_t end = begin + (rest < p.shape.block_size ? rest : p.shape.block_size);
    Team<kThreads> team;
    const double dot = add_up(shared, team, [&](int thread, Nothing&) {
      double sum = 0;
#pragma unroll 8
      for (std::int64_t i = begin + thread; present && i < end; i += kThreads) {
        const Accumulator offset = static_cast<Accumulator>(code_at<Accumulator, codes>(codes_of_row, i)) - zero;
        sum += static_cast<double>(offset) * static_cast<double>(vector[i]);
      }
      return sum;
    });
    team.each([&](int thread, Nothing&) {
      if (thread == 0) store_as(p.result.type, dot, p.result.at(p.shape.batch, batch), at);
    });
  }
};

// The sums over small blocks, one a thread.
template <typename Accumulator, Codes codes>
struct QuantizedDotSmall {
  using Parameters = QuantizedParameters;
  using Shared = Nothing;
  static constexpr int kThreads = 256;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    const std::int64_t chunks = (p.shape.blocks + kThreads - 1) / kThreads;
    const std::int64_t row = task / chunks, chunk = task - row * chunks;
    const std::int64_t batch = row / p.shape.clients, client = row - batch * p.shape.clients;
    const std::uint8_t* const where = where_of(p.where, p.shape.batch, batch);
    const bool present = where == nullptr || where[client] != 0;
    const std::uint8_t* const codes_of_row =
        numbers_of<std::uint8_t>(p.codes, p.shape.batch, batch) + client * p.shape.bytes;
    const Accumulator* const vector = numbers_of<Accumulator>(p.vector, p.shape.batch, batch);
    const Accumulator* const zero_points = numbers_of<Accumulator>(p.zero_points, p.shape.batch, batch);
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t block = chunk * kThreads + thread;
      if (block >= p.shape.blocks) return;
      const std::int64_t at = client * p.shape.blocks + block;
      const std::int64_t begin = block * p.shape.block_size;
      const std::int64_t rest = p.shape.coordinates - begin;
      const std::int64_t end = begin + (rest < p.shape.block_size ? rest : p.shape.block_size);
      double sum = 0;
      for (std::int64_t i = begin; present && i < end; ++i) {
        const Accumulator offset =
            static_cast<Accumulator>(code_at<Accumulator, codes>(codes_of_row, i)) - zero_points[at];
        sum += static_cast<double>(offset) * static_cast<double>(vector[i]);
      }
      store_as(p.result.type, sum, p.result.at(p.shape.batch, batch), at);
    });
  }
};

// Calls use(accumulator, codes) with a number of the accumulator's type and the codes as a constant.
template <typename Use>
std::string with_types(Type accumulator, Codes codes, Use use) {
  const auto with_codes = [&](auto number) -> std::string {
    switch (codes) {
      case Codes::kInt8:
        return use(number, std::integral_constant<Codes, Codes::kInt8>());
      case Codes::kUInt4:
        return use(number, std::integral_constant<Codes, Codes::kUInt4>());
      case Codes::kInt4:
        return use(number, std::integral_constant<Codes, Codes::kInt4>());
      default:
        return use(number, std::integral_constant<Codes, Codes::kUInt8>());
    }
  };
  return accumulator == Type::kFloat64 ? with_codes(double{}) : with_codes(float{});
}

}  // namespace

std::string enqueue(const QuantizedSumProblem& problem, Stream stream) {
  QuantizedParameters p{};
  p.shape = problem.shape;
  p.codes = problem.codes;
  p.scales = problem.scales;
  p.zero_points = problem.zero_points;
  p.weights = problem.weights;
  p.where = problem.where;
  p.result = problem.total;
  return with_types(problem.total.type, problem.shape.codes, [&](auto accumulator, auto codes) {
    using Body = QuantizedSum<decltype(accumulator), decltype(codes)::value>;
    p.work = p.shape.batch.count * ((p.shape.coordinates + Body::kTileColumns - 1) / Body::kTileColumns);
    return launch<Body>(p, stream);
  });
}

std::string enqueue(const QuantizedDotsProblem& problem, Stream stream) {
  QuantizedParameters p{};
  p.shape = problem.shape;
  p.codes = problem.codes;
  p.zero_points = problem.zero_points;
  p.vector = problem.vector;
  p.where = problem.where;
  p.result = problem.dots;
  const std::int64_t rows = p.shape.batch.count * p.shape.clients;
  return with_types(problem.dots.type, problem.shape.codes, [&](auto accumulator, auto codes) {
    using Number = decltype(accumulator);
    constexpr Codes kCodes = decltype(codes)::value;
    constexpr std::int64_t kSmall = 1024;  // coordinates a block that a thread sums alone
    if (p.shape.block_size <= kSmall) {
      using Body = QuantizedDotSmall<Number, kCodes>;
      p.work = rows * ((p.shape.blocks + Body::kThreads - 1) / Body::kThreads);
      return launch<Body>(p, stream);
    }
    p.work = rows * p.shape.blocks;
    return launch<QuantizedDotLarge<Number, kCodes>>(p, stream);
  });
}

}  // namespace cuda
}  // namespace fedfuse
