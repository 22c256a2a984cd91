#include "contract/linear.h"

#include "contract/reader.h"

namespace fedfuse {

std::string read_weighted_sum(const Call& call, WeightedSumProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->weights = reader.operand("weights", Axis::kClients, {Type::kFloat32, Type::kFloat64});
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  problem->divide = reader.flag("divide");
  problem->reduced = reader.result_leaves("reduced", Axis::kNone);
  problem->shape = reader.shape();
  return reader.finish();
}

std::string read_weighted_spread(const Call& call, WeightedSpreadProblem* problem) {
  Reader reader(call);
  problem->weights = reader.operand("weights", Axis::kClients, {Type::kFloat32, Type::kFloat64});
  problem->cotangents = reader.operand_leaves("cotangents", Axis::kNone);
  if (reader.flag("has_where")) problem->where = reader.operand("where", Axis::kClients, {Type::kBool});
  problem->spread = reader.result_leaves("spread", Axis::kClients);
  problem->shape = reader.shape();
  return reader.finish();
}

}  // namespace fedfuse
