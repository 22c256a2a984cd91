#include "contract/distances.h"

#include <algorithm>

#include "contract/reader.h"

namespace fedfuse {

std::string read_pairs(const Call& call, PairsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->squares = !reader.flag("has_others");
  problem->others = problem->squares ? problem->updates : reader.operand_leaves("others", Axis::kClients);
  reader.same_types("others", problem->others, problem->updates);
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  reader.set_rows(reader.shape().clients);
  problem->pairs = reader.result("distances", Axis::kRowsOfClients, {Type::kFloat32, Type::kFloat64});
  problem->shape = reader.shape();
  problem->first_block = first_blocks(problem->shape);
  const std::int64_t pairs = std::max<std::int64_t>(1, product({problem->shape.clients, problem->shape.clients}));
  problem->segments = std::max<std::int64_t>(1, std::min(problem->first_block.back(), kMostPairSums / pairs));
  problem->partials = reinterpret_cast<double*>(
      reader.workspace(product({problem->shape.batch.count, problem->segments, pairs, sizeof(double)})));
  return reader.finish();
}

std::string read_mix(const Call& call, MixProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->mixing = reader.operand("mixing", Axis::kRowsOfClients, {Type::kFloat32, Type::kFloat64});
  problem->mixed = reader.result_leaves("mixed", Axis::kRows);
  problem->shape = reader.shape();
  problem->rows = reader.rows();
  return reader.finish();
}

std::string read_step(const Call& call, StepProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->center = reader.operand_leaves("center", Axis::kNone);
  reader.accumulators("center", problem->center, problem->updates);
  problem->weights = reader.operand("weights", Axis::kClients, {Type::kFloat32, Type::kFloat64});
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  problem->moved = reader.result_leaves("moved", Axis::kNone);
  reader.accumulators("moved", problem->moved, problem->updates);
  problem->distances = reader.result("distances", Axis::kClients, {Type::kFloat32, Type::kFloat64});
  problem->shape = reader.shape();
  problem->first_block = first_blocks(problem->shape);
  const Shape& shape = problem->shape;
  problem->partials = reinterpret_cast<double*>(
      reader.workspace(product({shape.batch.count, shape.clients, problem->first_block.back(), sizeof(double)})));
  return reader.finish();
}

}  // namespace fedfuse
