#include "contract/server.h"

#include <limits>

#include "contract/reader.h"

namespace fedfuse {
namespace {

// Every part of the scratch memory begins on a cache line; fedfuse_jax/_primitives/server.py leaves room for that.
constexpr std::int64_t kAlignment = 64;

constexpr std::initializer_list<Type> kReals = {Type::kFloat32, Type::kFloat64};

std::int64_t aligned(std::int64_t bytes) {
  const std::int64_t whole = bytes / kAlignment * kAlignment;
  // What no memory has room for stays so.
  if (whole == bytes || kAlignment > std::numeric_limits<std::int64_t>::max() - whole) return bytes;
  return whole + kAlignment;
}

// A whole array of the batch in scratch memory.
View scratch_view(const Batch& batch, Type type, std::int64_t elements) {
  View view;
  view.type = type;
  view.elements = elements;
  std::int64_t stride = product({elements, bytes_of(type)});
  for (int axis = batch.rank - 1; axis >= 0; --axis) {
    view.strides[axis] = batch.sizes[axis] == 1 ? 0 : stride;
    stride = product({stride, batch.sizes[axis]});
  }
  return view;
}

}  // namespace

std::string read_server_update(const Call& call, ServerUpdateProblem* problem) {
  Reader reader(call);
  problem->rule = static_cast<ServerRule>(reader.attribute("rule", 0, kNumServerRules - 1));
  problem->old.step = reader.operand("step", Axis::kNone, {Type::kInt32});
  problem->old.params = reader.operand_leaves("params", Axis::kNone);
  problem->old.first = reader.operand_leaves("first_moment", Axis::kNone);
  problem->old.second = reader.operand_leaves("second_moment", Axis::kNone);
  WeightedSumProblem& mean = problem->mean;
  mean.updates = reader.operand_leaves("updates", Axis::kClients);
  mean.weights = reader.operand("weights", Axis::kClients, kReals);
  if (reader.flag("has_where")) mean.where = reader.operand("where", Axis::kClients, {Type::kBool});
  mean.divide = true;
  problem->learning_rate = reader.operand("learning_rate", Axis::kNone, kReals);
  problem->b1 = reader.operand("b1", Axis::kNone, kReals);
  problem->b2 = reader.operand("b2", Axis::kNone, kReals);
  problem->tau = reader.operand("tau", Axis::kNone, kReals);
  problem->updated.step = reader.result("step", Axis::kNone, {Type::kInt32});
  problem->updated.params = reader.result_leaves("params", Axis::kNone);
  problem->updated.first = reader.result_leaves("first_moment", Axis::kNone);
  problem->updated.second = reader.result_leaves("second_moment", Axis::kNone);
  reader.accumulators("first_moment", problem->old.first, problem->old.params);
  reader.same_types("second_moment", problem->old.second, problem->old.first);
  reader.same_types("params", problem->updated.params, problem->old.params);
  reader.same_types("first_moment", problem->updated.first, problem->old.first);
  reader.same_types("second_moment", problem->updated.second, problem->old.second);
  problem->shape = mean.shape = reader.shape();
  if (!reader.ok()) return reader.finish();  // sizes may be anything

  const Batch& batch = problem->shape.batch;
  std::int64_t bytes = aligned(product({batch.count, sizeof(std::int32_t)}));
  std::vector<std::int64_t> offsets;
  for (std::size_t leaf = 0; leaf < problem->old.first.size(); ++leaf) {
    const View& first = problem->old.first[leaf];
    offsets.push_back(bytes);
    mean.reduced.push_back(scratch_view(batch, first.type, first.elements));
    if (__builtin_add_overflow(bytes, aligned(product({batch.count, first.elements, bytes_of(first.type)})), &bytes)) {
      reader.require(false, "the mean has more elements than any memory");
      bytes = 0;
    }
  }
  std::byte* const workspace = reader.workspace(bytes);
  if (!reader.ok()) return reader.finish();
  problem->accepted = reinterpret_cast<std::int32_t*>(workspace);
  for (std::size_t leaf = 0; leaf < offsets.size(); ++leaf) mean.reduced[leaf].data = workspace + offsets[leaf];
  return reader.finish();
}

}  // namespace fedfuse
