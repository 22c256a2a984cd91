#include "contract/private.h"

#include "contract/reader.h"
#include "math/blocks.h"

namespace fedfuse {
namespace {

constexpr std::initializer_list<Type> kAccumulators = {Type::kFloat32, Type::kFloat64};

// Bytes for a sum of every client and block, and so many factors a client.
std::int64_t workspace_bytes(const ClientNormsProblem& problem, std::int64_t factors) {
  static_assert(sizeof(ScaledSum) == sizeof(ClipFactor));
  const Shape& shape = problem.shape;
  return product({shape.batch.count, shape.clients, problem.first_block.back() + factors, sizeof(ScaledSum)});
}

}  // namespace

std::string read_client_norms(const Call& call, ClientNormsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  problem->norms = reader.result("norms", Axis::kClients, kAccumulators);
  problem->shape = reader.shape();
  problem->first_block = first_blocks(problem->shape);
  problem->partials = reinterpret_cast<ScaledSum*>(reader.workspace(workspace_bytes(*problem, 0)));
  return reader.finish();
}

std::string read_private_sum(const Call& call, PrivateSumProblem* problem) {
  Reader reader(call);
  const bool clip = reader.flag("clip");
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->weights = reader.operand("weights", Axis::kClients, kAccumulators);
  if (clip) {
    problem->max_norm = reader.operand("max_norm", Axis::kNone, kAccumulators);
    if (reader.flag("has_given_norms")) {
      problem->given_norms = reader.operand("given_norms", Axis::kClients, kAccumulators);
    }
  }
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  if (reader.flag("noise")) {
    const std::int64_t leaves = static_cast<std::int64_t>(problem->updates.size());
    problem->noise.keys = reader.table("keys", {leaves, 2}, Type::kUInt32);
    problem->noise.stddev = reader.operand("stddev", Axis::kNone, kAccumulators);
    if (reader.flag("has_blocks")) {
      problem->noise.blocks = reader.table("blocks", {leaves, Reader::kAny, 3}, Type::kUInt32);
      const std::int64_t levels = leaves == 0 ? 0 : problem->noise.blocks.elements / (3 * leaves);
      reader.require(
          levels >= 1 && levels <= kMostBlockLevels,
          "blocks has " + std::to_string(levels) + " levels; it needs from 1 to " + std::to_string(kMostBlockLevels));
      problem->noise.levels = static_cast<int>(levels);
    }
  }
  if (clip) problem->norms.norms = reader.result("norms", Axis::kClients, kAccumulators);
  problem->reduced = reader.result_leaves("reduced", Axis::kNone);
  reader.accumulators("reduced", problem->reduced, problem->updates);
  problem->shape = reader.shape();
  if (clip) {
    ClientNormsProblem& norms = problem->norms;
    norms.shape = problem->shape;
    norms.updates = problem->updates;
    norms.where = problem->where;
    norms.first_block = first_blocks(norms.shape);
    std::byte* const workspace = reader.workspace(workspace_bytes(norms, 1));
    problem->factors = reinterpret_cast<ClipFactor*>(workspace);
    // An error has no memory behind it.
    const std::int64_t factors = workspace == nullptr ? 0 : product({norms.shape.batch.count, norms.shape.clients});
    norms.partials = reinterpret_cast<ScaledSum*>(workspace) + factors;
  }
  return reader.finish();
}

std::string check_blocks(const PrivateSumProblem& problem) {
  const Shape& shape = problem.shape;
  const Noise& noise = problem.noise;
  if (!noise.blocks.present()) return "";
  for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
    const auto* level = reinterpret_cast<const BlockLevel*>(noise.blocks.at(shape.batch, batch));
    for (std::size_t leaf = 0; leaf < shape.coordinates.size(); ++leaf) {
      std::int64_t coordinates = 1;
      bool inside = true;
      for (int i = 0; i < noise.levels; ++i, ++level) {
        inside = inside && std::uint64_t{level->origin} + level->own <= level->extent;
        coordinates = product({coordinates, std::int64_t{level->own}});
      }
      if (inside && coordinates == shape.coordinates[leaf]) continue;
      return "blocks do not say where the " + std::to_string(shape.coordinates[leaf]) + " coordinates of leaf " +
             std::to_string(leaf) + " lie in it.";
    }
  }
  return "";
}

}  // namespace fedfuse
