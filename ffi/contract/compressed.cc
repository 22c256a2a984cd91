#include "contract/compressed.h"

#include <limits>

#include "contract/reader.h"

namespace fedfuse {
namespace {

constexpr std::initializer_list<Type> kFloats = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
constexpr std::initializer_list<Type> kAccumulators = {Type::kFloat32, Type::kFloat64};

View read_where(Reader* reader) {
  return reader->flag("has_where") ? reader->operand("where", Axis::kClients, {Type::kBool}) : View();
}

SparseShape sparse_shape(const Reader& reader, std::int64_t entries, std::int64_t coordinates) {
  return {reader.shape().batch, reader.shape().clients, entries, coordinates};
}

void require_same_accumulator(Reader* reader, const char* name, const View& view, const View& model) {
  reader->require(view.type == accumulator_of(model.type), std::string(name) + " is " + name_of(view.type) +
                                                               "; it needs " + name_of(accumulator_of(model.type)));
}

// How a client's codes lie, once codes, per_block (scales or zero points) and what has a number for each coordinate
// are known.
QuantizedShape quantized_shape(Reader* reader, const View& codes, const View& per_block, const View& coordinates) {
  QuantizedShape shape;
  shape.batch = reader->shape().batch;
  shape.clients = reader->shape().clients;
  const std::int64_t num_bits = reader->attribute("num_bits", 4, 8);
  reader->require(num_bits == 4 || num_bits == 8, "attribute num_bits needs to be 4 or 8");
  const bool is_signed = codes.type == Type::kInt8;
  shape.codes = num_bits == 8 ? (is_signed ? Codes::kInt8 : Codes::kUInt8) : (is_signed ? Codes::kInt4 : Codes::kUInt4);
  const std::int64_t clients = shape.clients > 0 ? shape.clients : 1;
  shape.bytes = codes.elements / clients;
  shape.blocks = per_block.elements / clients;
  shape.coordinates = coordinates.elements;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::int64_t num_params = reader->attribute("num_params", -1, kMost);
  const std::int64_t per_byte = codes_per_byte(shape.codes);
  const std::int64_t needed = num_params < 0 ? shape.bytes * per_byte : num_params;
  reader->require(shape.coordinates == needed && shape.bytes == (needed + per_byte - 1) / per_byte,
                  "there are " + std::to_string(shape.bytes) + " bytes of codes and " +
                      std::to_string(shape.coordinates) + " coordinates, which do not fit together");
  // Blocks of a size of their own, or as many equal ones as there are scales.
  const std::int64_t block_size = reader->attribute("block_size", 0, kMost);
  const std::int64_t blocks = block_size > 0     ? (shape.coordinates + block_size - 1) / block_size
                              : shape.blocks > 0 ? shape.blocks
                                                 : 1;
  reader->require(shape.blocks == blocks && (block_size > 0 || shape.coordinates % blocks == 0),
                  "there are " + std::to_string(shape.blocks) + " blocks, which do not fit " +
                      std::to_string(shape.coordinates) + " coordinates");
  shape.block_size = block_size > 0 ? block_size : shape.coordinates / blocks;
  return shape;
}

}  // namespace

std::string read_sparse_sum(const Call& call, SparseSumProblem* problem) {
  Reader reader(call);
  problem->values = reader.flat_operand("values", Axis::kClients, kFloats);
  problem->indices = reader.flat_operand("indices", Axis::kClients, {Type::kInt32});
  problem->weights = reader.operand("weights", Axis::kClients, kAccumulators);
  problem->where = read_where(&reader);
  problem->total = reader.flat_result("total", Axis::kNone, kAccumulators);
  reader.require(problem->values.elements == problem->indices.elements, "values and indices need the same shape");
  require_same_accumulator(&reader, "weights", problem->weights, problem->values);
  require_same_accumulator(&reader, "total", problem->total, problem->values);
  const std::int64_t coordinates = problem->total.elements;
  reader.require(reader.attribute("num_params", 0, std::numeric_limits<std::int32_t>::max()) == coordinates,
                 "attribute num_params needs to be " + std::to_string(coordinates));
  const Shape& shape = reader.shape();
  const std::int64_t rows = product({shape.batch.count, shape.clients});
  problem->sorted = reinterpret_cast<std::uint8_t*>(reader.workspace(rows));
  problem->shape = sparse_shape(reader, shape.clients > 0 ? problem->values.elements / shape.clients : 0, coordinates);
  return reader.finish();
}

std::string read_sparse_spread(const Call& call, SparseSpreadProblem* problem) {
  Reader reader(call);
  problem->indices = reader.flat_operand("indices", Axis::kClients, {Type::kInt32});
  problem->weights = reader.operand("weights", Axis::kClients, kAccumulators);
  problem->vector = reader.flat_operand("vector", Axis::kNone, kAccumulators);
  problem->where = read_where(&reader);
  problem->spread = reader.flat_result("spread", Axis::kClients, kFloats);
  reader.require(problem->spread.elements == problem->indices.elements, "spread and indices need the same shape");
  require_same_accumulator(&reader, "weights", problem->weights, problem->spread);
  require_same_accumulator(&reader, "vector", problem->vector, problem->spread);
  const std::int64_t clients = reader.shape().clients;
  problem->shape =
      sparse_shape(reader, clients > 0 ? problem->indices.elements / clients : 0, problem->vector.elements);
  return reader.finish();
}

std::string read_sparse_dots(const Call& call, SparseDotsProblem* problem) {
  Reader reader(call);
  problem->values = reader.flat_operand("values", Axis::kClients, kFloats);
  problem->indices = reader.flat_operand("indices", Axis::kClients, {Type::kInt32});
  problem->vector = reader.flat_operand("vector", Axis::kNone, kAccumulators);
  problem->where = read_where(&reader);
  problem->dots = reader.result("dots", Axis::kClients, kAccumulators);
  reader.require(problem->values.elements == problem->indices.elements, "values and indices need the same shape");
  require_same_accumulator(&reader, "vector", problem->vector, problem->values);
  require_same_accumulator(&reader, "dots", problem->dots, problem->values);
  const std::int64_t clients = reader.shape().clients;
  problem->shape = sparse_shape(reader, clients > 0 ? problem->values.elements / clients : 0, problem->vector.elements);
  return reader.finish();
}

std::string read_quantized_sum(const Call& call, QuantizedSumProblem* problem) {
  Reader reader(call);
  problem->codes = reader.flat_operand("codes", Axis::kClients, {Type::kUInt8, Type::kInt8});
  problem->scales = reader.flat_operand("scales", Axis::kClients, kAccumulators);
  problem->zero_points = reader.flat_operand("zero_points", Axis::kClients, kAccumulators);
  problem->weights = reader.operand("weights", Axis::kClients, kAccumulators);
  problem->where = read_where(&reader);
  problem->total = reader.flat_result("total", Axis::kNone, kAccumulators);
  reader.require(problem->scales.elements == problem->zero_points.elements,
                 "scales and zero_points need the same shape");
  require_same_accumulator(&reader, "scales", problem->scales, problem->total);
  require_same_accumulator(&reader, "zero_points", problem->zero_points, problem->total);
  require_same_accumulator(&reader, "weights", problem->weights, problem->total);
  problem->shape = quantized_shape(&reader, problem->codes, problem->scales, problem->total);
  return reader.finish();
}

std::string read_quantized_dots(const Call& call, QuantizedDotsProblem* problem) {
  Reader reader(call);
  problem->codes = reader.flat_operand("codes", Axis::kClients, {Type::kUInt8, Type::kInt8});
  problem->zero_points = reader.flat_operand("zero_points", Axis::kClients, kAccumulators);
  problem->vector = reader.flat_operand("vector", Axis::kNone, kAccumulators);
  problem->where = read_where(&reader);
  problem->dots = reader.flat_result("dots", Axis::kClients, kAccumulators);
  reader.require(problem->dots.elements == problem->zero_points.elements, "dots and zero_points need the same shape");
  require_same_accumulator(&reader, "zero_points", problem->zero_points, problem->dots);
  require_same_accumulator(&reader, "vector", problem->vector, problem->dots);
  problem->shape = quantized_shape(&reader, problem->codes, problem->zero_points, problem->vector);
  return reader.finish();
}

}  // namespace fedfuse
