#include "contract/private.h"

#include "contract/reader.h"

namespace fedfuse {
namespace {

constexpr std::initializer_list<Type> kAccumulators = {Type::kFloat32, Type::kFloat64};

std::int64_t count_partials(const ClientNormsProblem& problem) {
  return problem.shape.batch.count * problem.shape.clients * problem.first_block.back();
}

}  // namespace

std::string read_client_norms(const Call& call, ClientNormsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  problem->norms = reader.result("norms", Axis::kClients, kAccumulators);
  problem->shape = reader.shape();
  problem->first_block = reduction_blocks(problem->shape);
  problem->partials =
      reinterpret_cast<ScaledSum*>(reader.workspace(count_partials(*problem) * std::int64_t{sizeof(ScaledSum)}));
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
      problem->noise.levels = static_cast<int>(problem->noise.blocks.elements / (3 * leaves));
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
    norms.first_block = reduction_blocks(norms.shape);
    const std::int64_t factors = norms.shape.batch.count * norms.shape.clients;
    std::byte* const workspace = reader.workspace(count_partials(norms) * std::int64_t{sizeof(ScaledSum)} +
                                                  factors * std::int64_t{sizeof(ClipFactor)});
    problem->factors = reinterpret_cast<ClipFactor*>(workspace);
    norms.partials = reinterpret_cast<ScaledSum*>(workspace) + factors;
  }
  return reader.finish();
}

}  // namespace fedfuse
