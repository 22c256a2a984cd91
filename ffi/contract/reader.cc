#include "contract/reader.h"

#include <algorithm>

namespace fedfuse {
namespace {

constexpr int kNoLeaf = -1;
constexpr int kFlat = -2;  // no leaf either, and of any shape

std::string to_string(const std::vector<std::int64_t>& dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

// Bytes that no machine has room to address, a thousandth of what its numbers reach: no size that is made of two of
// them overflows silently. Dimensions of size 0 do not count: what is left is still multiplied up.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 52;

bool is_addressable(const Buffer& buffer) {
  std::int64_t bytes = bytes_of(buffer.type);
  for (const std::int64_t dim : buffer.dims) {
    if (dim < 0) return false;
    if (dim > 0 && (__builtin_mul_overflow(bytes, dim, &bytes) || bytes > kMostBytes)) return false;
  }
  return true;
}

// From one of the dimensions on.
std::int64_t elements_from(const std::vector<std::int64_t>& dims, std::size_t first) {
  return product(std::vector<std::int64_t>(dims.begin() + std::min(first, dims.size()), dims.end()));
}

}  // namespace

Reader::Reader(const Call& call) : call_(call), operands_{call.operands}, results_{call.results, 0, true} {
  shape_.batch.rank = static_cast<int>(attribute("batch_dims", 0, kMaxBatchDims));
  // Every leaf is an operand at least once: a larger number would only waste memory before the first error.
  const std::int64_t num_leaves = attribute("num_leaves", 0, std::max<std::int64_t>(1, call.operands.size()));
  parameters_.resize(num_leaves);
  shape_.coordinates.assign(num_leaves, -1);
  std::fill_n(shape_.batch.sizes, kMaxBatchDims, 1);
  for (const std::vector<Buffer>* buffers : {&call.operands, &call.results}) {
    for (const Buffer& buffer : *buffers) {
      require(is_addressable(buffer),
              "there is a buffer of shape " + to_string(buffer.dims) + ", more than any memory");
    }
  }
  for (const Buffer& operand : call.operands) join_batch(operand);
  const std::int64_t* const sizes = shape_.batch.sizes;
  shape_.batch.count = product(std::vector<std::int64_t>(sizes, sizes + shape_.batch.rank));
  require(shape_.batch.count <= kMostBytes, "the batch has more elements than any memory");
}

std::int64_t Reader::attribute(const char* name, std::int64_t least, std::int64_t most) {
  const std::optional<std::int64_t> value = call_.attribute(name);
  if (value.has_value() && *value >= least && *value <= most) return *value;
  fail("attribute " + std::string(name) + (value ? " is " + std::to_string(*value) : " is missing") +
       "; it needs to be from " + std::to_string(least) + " to " + std::to_string(most));
  return least;
}

View Reader::operand(const char* name, Axis axis, std::initializer_list<Type> types) {
  return read(operands_, name, axis, types, kNoLeaf);
}

View Reader::result(const char* name, Axis axis, std::initializer_list<Type> types) {
  return read(results_, name, axis, types, kNoLeaf);
}

View Reader::flat_operand(const char* name, Axis axis, std::initializer_list<Type> types) {
  return read(operands_, name, axis, types, kFlat);
}

View Reader::flat_result(const char* name, Axis axis, std::initializer_list<Type> types) {
  return read(results_, name, axis, types, kFlat);
}

std::vector<View> Reader::operand_leaves(const char* name, Axis axis) { return read_leaves(operands_, name, axis); }

std::vector<View> Reader::result_leaves(const char* name, Axis axis) { return read_leaves(results_, name, axis); }

std::byte* Reader::workspace(std::int64_t bytes) {
  const Buffer& buffer = next(results_, "workspace");
  const std::int64_t size = product(buffer.dims);
  if (ok() && (buffer.type != Type::kUInt8 || size < bytes)) {
    fail("workspace is " + std::string(name_of(buffer.type)) + to_string(buffer.dims) + "; it needs uint8[" +
         std::to_string(bytes) + "]");
  }
  return static_cast<std::byte*>(buffer.data);
}

void Reader::same_types(const char* name, const std::vector<View>& views, const std::vector<View>& models) {
  for (std::size_t i = 0; i < views.size() && ok(); ++i) {
    if (views[i].type != models[i].type) {
      fail(std::string(name) + " has a leaf of " + name_of(views[i].type) + "; it needs " + name_of(models[i].type));
    }
  }
}

void Reader::accumulators(const char* name, const std::vector<View>& views, const std::vector<View>& models) {
  std::vector<View> needed(models);
  for (View& view : needed) view.type = accumulator_of(view.type);
  same_types(name, views, needed);
}

std::string Reader::finish() {
  for (std::int64_t coordinates : shape_.coordinates) require(coordinates >= 0, "there are leaves that no buffer has");
  for (const Cursor* cursor : {&operands_, &results_}) {
    if (cursor->position != cursor->buffers.size()) {
      fail("there are " + std::to_string(cursor->buffers.size()) + (cursor->is_result ? " results" : " operands") +
           "; it needs " + std::to_string(cursor->position));
    }
  }
  return error_;
}

void Reader::fail(const std::string& message) {
  // The first mistake is the one to mend: later ones may only follow from it.
  if (ok()) error_ = "fedfuse " + std::string(call_.operation) + ": " + message + ".";
}

void Reader::join_batch(const Buffer& operand) {
  for (int axis = 0; axis < shape_.batch.rank; ++axis) {
    if (operand.dims.size() <= static_cast<std::size_t>(axis)) {
      fail("an operand of shape " + to_string(operand.dims) + " lacks a batch dimension");
      return;
    }
    std::int64_t& size = shape_.batch.sizes[axis];
    const std::int64_t own = operand.dims[axis];
    if (size == 1) size = own;
    if (own != 1 && own != size) {
      fail("batch dimension " + std::to_string(axis) + " has size " + std::to_string(own) + " in one operand and " +
           std::to_string(size) + " in another");
    }
  }
}

const Buffer& Reader::next(Cursor& cursor, const char* name) {
  static const Buffer kMissing;
  if (cursor.position < cursor.buffers.size()) return cursor.buffers[cursor.position++];
  fail(std::string(name) + " is missing");
  return kMissing;
}

std::vector<View> Reader::read_leaves(Cursor& cursor, const char* name, Axis axis) {
  std::vector<View> views;
  for (std::size_t leaf = 0; leaf < parameters_.size() && ok(); ++leaf) {
    views.push_back(read(cursor, name, axis, {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16},
                         static_cast<int>(leaf)));
  }
  // Whoever indexes them by leaf before finish() must find them all.
  views.resize(parameters_.size());
  return views;
}

View Reader::read(Cursor& cursor, const char* name, Axis axis, std::initializer_list<Type> types, int leaf) {
  const Buffer& buffer = next(cursor, name);
  if (!ok()) return View();
  const std::string described = std::string(name) + " is " + name_of(buffer.type) + to_string(buffer.dims);
  if (std::find(types.begin(), types.end(), buffer.type) == types.end()) {
    std::string needed;
    for (Type type : types) needed += (needed.empty() ? "" : " or ") + std::string(name_of(type));
    fail(described + "; it needs " + needed);
    return View();
  }
  std::size_t position = shape_.batch.rank;
  const bool has_rows = axis == Axis::kRows || axis == Axis::kRowsOfClients;
  const bool has_clients = axis == Axis::kClients || axis == Axis::kRowsOfClients;
  if (buffer.dims.size() < position + has_rows + has_clients) {
    fail(described + "; it needs more dimensions");
    return View();
  }
  for (int i = 0; cursor.is_result && i < shape_.batch.rank; ++i) {
    if (buffer.dims[i] != shape_.batch.sizes[i]) {
      fail(described + "; it needs the whole batch");
      return View();
    }
  }
  if (has_rows) {
    const std::int64_t rows = buffer.dims[position++];
    if (rows_ == 0) rows_ = rows;
    if (rows != rows_ || rows < 1) {
      fail(described + "; it needs " + std::to_string(std::max<std::int64_t>(rows_, 1)) + " rows");
      return View();
    }
  }
  if (has_clients) {
    const std::int64_t clients = buffer.dims[position++];
    if (shape_.clients == 0) shape_.clients = clients;
    if (clients != shape_.clients || clients < 1) {
      fail(described + "; it needs " + std::to_string(std::max<std::int64_t>(shape_.clients, 1)) + " clients");
      return View();
    }
  }
  const std::vector<std::int64_t> rest(buffer.dims.begin() + position, buffer.dims.end());
  if (leaf == kNoLeaf) {
    if (!rest.empty()) {
      fail(described + "; it needs fewer dimensions");
      return View();
    }
  } else if (leaf == kFlat) {
    // Its elements are counted below.
  } else if (shape_.coordinates[leaf] < 0) {
    parameters_[leaf] = rest;
    shape_.coordinates[leaf] = product(rest);
  } else if (rest != parameters_[leaf]) {
    fail(described + "; it needs the parameters " + to_string(parameters_[leaf]));
    return View();
  }
  return view_of(buffer);
}

View Reader::view_of(const Buffer& buffer) const {
  View view;
  view.data = static_cast<std::byte*>(buffer.data);
  view.type = buffer.type;
  view.elements = elements_from(buffer.dims, shape_.batch.rank);
  std::int64_t stride = view.elements * bytes_of(view.type);
  for (int i = shape_.batch.rank - 1; i >= 0; --i) {
    // A dimension of size 1 is one that a larger batch shares, or that has one element: either way index 0.
    view.strides[i] = buffer.dims[i] == 1 ? 0 : stride;
    stride *= buffer.dims[i];
  }
  return view;
}

View Reader::table(const char* name, std::initializer_list<std::int64_t> dims, Type type) {
  const Buffer& buffer = next(operands_, name);
  if (!ok()) return View();
  bool fits = buffer.type == type && buffer.dims.size() == shape_.batch.rank + dims.size();
  std::size_t position = shape_.batch.rank;
  for (std::int64_t dim : dims) {
    if (!fits) break;
    fits = dim == kAny || buffer.dims[position] == dim;
    ++position;
  }
  if (fits) return view_of(buffer);
  std::vector<std::int64_t> needed(dims);
  fail(std::string(name) + " is " + name_of(buffer.type) + to_string(buffer.dims) + "; it needs " + name_of(type) +
       to_string(needed) + ", -1 being any size");
  return View();
}

}  // namespace fedfuse
