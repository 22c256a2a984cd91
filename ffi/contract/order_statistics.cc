#include "contract/order_statistics.h"

#include <limits>

#include "contract/reader.h"

namespace fedfuse {
namespace {

void read_trim(Reader* reader, Trim* trim) {
  if (reader->flag("has_where")) trim->where = reader->operand("where", Axis::kClients, {Type::kBool});
  if (reader->flag("has_trim_count")) trim->count = reader->operand("trim_count", Axis::kNone, {Type::kInt32});
  const std::int64_t least = trim->count.present() ? -1 : 0;
  trim->attribute = reader->attribute("trim", least, std::numeric_limits<std::int32_t>::max());
}

std::string read_mean(Reader* reader, TrimmedMeanProblem* problem) {
  problem->updates = reader->operand_leaves("updates", Axis::kClients);
  read_trim(reader, &problem->trim);
  problem->reduced = reader->result_leaves("reduced", Axis::kNone);
  problem->shape = reader->shape();
  return reader->finish();
}

}  // namespace

std::string read_trimmed_mean(const Call& call, TrimmedMeanProblem* problem) {
  Reader reader(call);
  return read_mean(&reader, problem);
}

std::string read_mean_around_median(const Call& call, TrimmedMeanProblem* problem) {
  Reader reader(call);
  problem->trim.around_median = reader.flag("around_median");
  return read_mean(&reader, problem);
}

std::string read_selected_mean(const Call& call, SelectedMeanProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->values = reader.operand_leaves("values", Axis::kClients);
  problem->trim.around_median = reader.flag("around_median");
  read_trim(&reader, &problem->trim);
  problem->reduced = reader.result_leaves("reduced", Axis::kNone);
  reader.same_types("values", problem->values, problem->updates);
  problem->shape = reader.shape();
  return reader.finish();
}

std::string read_spread(const Call& call, SpreadProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->cotangents = reader.operand_leaves("cotangents", Axis::kNone);
  problem->trim.around_median = reader.flag("around_median");
  read_trim(&reader, &problem->trim);
  problem->spread = reader.result_leaves("spread", Axis::kClients);
  reader.same_types("spread", problem->spread, problem->updates);
  problem->shape = reader.shape();
  return reader.finish();
}

}  // namespace fedfuse
