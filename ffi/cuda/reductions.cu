// Reductions over a client's coordinates: squared_norms, client_dots and finite_clients.
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"
#include "cuda/reductions.h"

namespace fedfuse {
namespace cuda {
namespace {

struct DotOptions {
  View where;
  Type others_type;
  bool squares;
  bool shared;
  std::int64_t num_blocks;
};

// The partial sum of one client over one block of coordinates. The third operand is where a leaf's partial sums are.
template <Type type>
struct PartialDot {
  using Bits = typename Element<type>::Bits;
  using Elements = Pack<Bits>;
  using Parameters = cuda::Parameters<3, DotOptions>;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = kReductionThreads;
  static constexpr int kBlocks = 4;
  static constexpr int kColumns = Elements::kSize;
  static constexpr int kTileColumns = kReductionBlock;

  using Shared = Reduction<double, kThreads>;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared& shared, std::int64_t task) {
    const ClientTile at = locate_client(p, task, kTileColumns);
    const Tile& tile = at.tile;
    const std::int64_t client = at.client;
    const DotOptions& options = p.options;
    const std::int64_t coordinates = p.leaves[tile.leaf].coordinates;
    const std::int64_t other_bytes = bytes_of(options.others_type);
    const std::int64_t begin = client * coordinates + tile.begin;
    const Bits* const updates =
        reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) + begin;
    const std::byte* const others = operand_data(p, tile, 1, options.shared ? 1 : p.clients, other_bytes) +
                                    (options.shared ? tile.begin : begin) * other_bytes;
    const bool aligned = is_aligned(updates, kPackBytes);
    const std::uint8_t* const where = where_of(options.where, p.batch, tile.batch);
    const bool present = where == nullptr || where[client] != 0;
    const std::int64_t columns = tile.columns;

    Team<kThreads> team;
    const double dot = add_up(shared, team, [&](int thread, Nothing&) {
      double sum = 0;
      if (!present) return sum;
#pragma unroll 4
      for (std::int64_t column = thread * kColumns; column < columns; column += kThreads * kColumns) {
        const Elements elements = Elements::load(updates + column, aligned, columns - column);
        for (int i = 0; i < kColumns; ++i) {
          const double value = Element<type>::widen(elements.elements[i]);
          double other = value;
          if (!options.squares) {
            other = column + i < columns ? load_as<double>(options.others_type, others, column + i) : 0;
          }
          sum += value * other;
        }
      }
      return sum;
    });
    double* const partials = reinterpret_cast<double*>(p.leaves[tile.leaf].data[2]);
    team.each([&](int thread, Nothing&) {
      if (thread != 0) return;
      partials[(tile.batch * p.clients + client) * options.num_blocks + tile.begin / kReductionBlock] = dot;
    });
  }
};

// Adds the partial sums of one client.
struct AddPartials {
  struct Parameters {
    Batch batch;
    std::int64_t clients;
    std::int64_t work;
    std::int64_t num_blocks;
    const double* partials;
    View dots;
  };

  static constexpr int kThreads = kReductionThreads;

  using Shared = Reduction<double, kThreads>;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared& shared, std::int64_t task) {
    const std::int64_t batch = task / p.clients;
    Team<kThreads> team;
    const double dot = add_blocks(p.partials + task * p.num_blocks, p.num_blocks, shared, team);
    team.each([&](int thread, Nothing&) {
      if (thread == 0) store_as(p.dots.type, dot, p.dots.at(p.batch, batch), task - batch * p.clients);
    });
  }
};

struct MarkAllFinite {
  struct Parameters {
    std::int64_t work;
    std::int64_t count;
    bool* finite;
  };
  using Shared = Nothing;

  static constexpr int kThreads = 256;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t client = task * kThreads + thread;
      if (client < p.count) p.finite[client] = true;
    });
  }
};

struct FiniteOptions {
  View finite;
};

// Takes the mark from a client with an infinity or NaN. Whoever writes, writes the same.
template <Type type>
struct FindNotFinite {
  using Bits = typename Element<type>::Bits;
  using Elements = Pack<Bits>;
  using Parameters = cuda::Parameters<1, FiniteOptions>;
  using Shared = Nothing;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = kReductionThreads;
  static constexpr int kColumns = Elements::kSize;
  static constexpr int kTileColumns = kReductionBlock;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared&, std::int64_t task) {
    const ClientTile at = locate_client(p, task, kTileColumns);
    const Tile& tile = at.tile;
    const std::int64_t client = at.client;
    const Bits* const updates = reinterpret_cast<const Bits*>(operand_data(p, tile, 0, p.clients, sizeof(Bits))) +
                                client * p.leaves[tile.leaf].coordinates + tile.begin;
    const bool aligned = is_aligned(updates, kPackBytes);
    const std::int64_t columns = tile.columns;
    bool* const finite = reinterpret_cast<bool*>(p.options.finite.at(p.batch, tile.batch)) + client;

    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      // Infinities and NaNs are what has every bit of the exponent set.
      constexpr Bits kExponent = static_cast<Bits>(~Keys<type>::kNegativeInfinity);
      bool found = false;
#pragma unroll 4
      for (std::int64_t column = thread * kColumns; column < columns; column += kThreads * kColumns) {
        const Elements elements = Elements::load(updates + column, aligned, columns - column);
        for (int i = 0; i < kColumns; ++i) found |= (elements.elements[i] & kExponent) == kExponent;
      }
      if (found) *finite = false;
    });
  }
};

}  // namespace

std::string enqueue(const ClientDotsProblem& problem, Stream stream) {
  const Shape& shape = problem.shape;
  std::vector<View> partials(shape.coordinates.size());
  for (std::size_t leaf = 0; leaf < partials.size(); ++leaf) {
    partials[leaf].data = reinterpret_cast<std::byte*>(problem.partials + problem.first_block[leaf]);
  }
  std::string error = for_each_type([&](auto type) {
    using Body = PartialDot<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.where = problem.where;
    p.options.squares = problem.squares;
    p.options.shared = problem.shared;
    p.options.num_blocks = problem.first_block.back();
    return for_each_type([&](auto others_type) {
      p.options.others_type = others_type;
      return for_each_table(
          shape, {&problem.updates, &problem.others, &partials}, Body::kTileColumns, shape.clients, &p,
          [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
          [&](std::size_t leaf) {
            return problem.updates[leaf].type == type && problem.others[leaf].type == others_type;
          });
    });
  });
  if (!error.empty()) return error;
  AddPartials::Parameters p{};
  p.batch = shape.batch;
  p.clients = shape.clients;
  p.work = shape.batch.count * shape.clients;
  p.num_blocks = problem.first_block.back();
  p.partials = problem.partials;
  p.dots = problem.dots;
  return launch<AddPartials>(p, stream);
}

std::string enqueue(const FiniteClientsProblem& problem, Stream stream) {
  const Shape& shape = problem.shape;
  MarkAllFinite::Parameters fill{};
  fill.count = shape.batch.count * shape.clients;
  fill.work = (fill.count + MarkAllFinite::kThreads - 1) / MarkAllFinite::kThreads;
  fill.finite = reinterpret_cast<bool*>(problem.finite.data);
  if (std::string error = launch<MarkAllFinite>(fill, stream); !error.empty()) return error;
  return for_each_type([&](auto type) {
    using Body = FindNotFinite<decltype(type)::value>;
    typename Body::Parameters p{};
    p.options.finite = problem.finite;
    return for_each_table(
        shape, {&problem.updates}, Body::kTileColumns, shape.clients, &p,
        [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.updates[leaf].type == type; });
  });
}

}  // namespace cuda
}  // namespace fedfuse
