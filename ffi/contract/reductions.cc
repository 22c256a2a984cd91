#include "contract/reductions.h"

#include "contract/reader.h"

namespace fedfuse {
namespace {

std::string read_rest(Reader* reader, ClientDotsProblem* problem) {
  if (reader->flag("has_where")) problem->where = reader->operand("where", Axis::kClients, {Type::kBool});
  problem->dots = reader->result("dots", Axis::kClients, {Type::kFloat32, Type::kFloat64});
  problem->shape = reader->shape();
  problem->first_block = first_blocks(problem->shape);
  const Shape& shape = problem->shape;
  problem->partials = reinterpret_cast<double*>(
      reader->workspace(product({shape.batch.count, shape.clients, problem->first_block.back(), sizeof(double)})));
  return reader->finish();
}

}  // namespace

std::string read_squared_norms(const Call& call, ClientDotsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->others = problem->updates;
  problem->squares = true;
  return read_rest(&reader, problem);
}

std::string read_client_dots(const Call& call, ClientDotsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->shared = reader.flag("shared");
  problem->others = reader.operand_leaves("others", problem->shared ? Axis::kNone : Axis::kClients);
  return read_rest(&reader, problem);
}

std::string read_finite_clients(const Call& call, FiniteClientsProblem* problem) {
  Reader reader(call);
  problem->updates = reader.operand_leaves("updates", Axis::kClients);
  problem->finite = reader.result("finite", Axis::kClients, {Type::kBool});
  problem->shape = reader.shape();
  return reader.finish();
}

}  // namespace fedfuse
