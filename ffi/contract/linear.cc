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

}  // namespace fedfuse
