#include "contract/streaming.h"

#include <algorithm>

#include "contract/reader.h"

namespace fedfuse {

std::string read_accumulate(const Call& call, AccumulateProblem* problem) {
  Reader reader(call);
  problem->total = reader.operand_leaves("total", Axis::kNone);
  problem->update = reader.operand_leaves("update", Axis::kNone);
  problem->weight = reader.operand("weight", Axis::kNone, {Type::kFloat32, Type::kFloat64});
  problem->result = reader.result_leaves("result", Axis::kNone);
  reader.same_types("result", problem->result, problem->total);
  reader.accumulators("total", problem->total, problem->update);
  problem->shape = reader.shape();
  return reader.finish();
}

std::string read_stack(const Call& call, StackProblem* problem) {
  Reader reader(call);
  // Every client has all leaves: a larger number would only waste memory before the first error.
  const std::int64_t leaves = static_cast<std::int64_t>(std::max<std::size_t>(1, reader.shape().coordinates.size()));
  const std::int64_t operands = static_cast<std::int64_t>(call.operands.size());
  const std::int64_t clients = reader.attribute("num_clients", 1, operands / leaves);
  for (std::int64_t client = 0; client < clients; ++client) {
    problem->clients.push_back(reader.operand_leaves("a client's update", Axis::kNone));
    reader.same_types("a client's update", problem->clients.back(), problem->clients.front());
  }
  reader.set_clients(clients);
  problem->stacked = reader.result_leaves("stacked", Axis::kClients);
  reader.same_types("stacked", problem->stacked, problem->clients.front());
  problem->shape = reader.shape();
  return reader.finish();
}

}  // namespace fedfuse
