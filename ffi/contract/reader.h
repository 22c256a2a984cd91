// Reads a call's operands and results one after the other, checks that they fit together, and says what does not.
//
// Python checked the same when it traced the call; an exported program is run without our Python.
#ifndef FEDFUSE_CONTRACT_READER_H_
#define FEDFUSE_CONTRACT_READER_H_

#include <initializer_list>
#include <string>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

// The leading axes of an operand, after the batch and before the leaf's parameters. How many rows there are is learned
// as the number of clients is.
enum class Axis { kNone, kClients, kRows, kRowsOfClients };

class Reader {
 public:
  explicit Reader(const Call& call);

  // Attributes, which need to be in the given range.
  std::int64_t attribute(const char* name, std::int64_t least, std::int64_t most);
  bool flag(const char* name) { return attribute(name, 0, 1) != 0; }

  // The number of clients, where no operand shows it.
  void set_clients(std::int64_t clients) { shape_.clients = clients; }
  void set_rows(std::int64_t rows) { rows_ = rows; }

  // The next operand or result.
  View operand(const char* name, Axis axis, std::initializer_list<Type> types);
  View result(const char* name, Axis axis, std::initializer_list<Type> types);

  // The same, with any further dimensions: a kernel knows how many elements there are, and what they mean.
  View flat_operand(const char* name, Axis axis, std::initializer_list<Type> types);
  View flat_result(const char* name, Axis axis, std::initializer_list<Type> types);

  // The next operand, with these dimensions after the batch; kAny stands for one of any size.
  static constexpr std::int64_t kAny = -1;
  View table(const char* name, std::initializer_list<std::int64_t> dims, Type type);

  // The next operands or results, one per leaf, of floating types.
  std::vector<View> operand_leaves(const char* name, Axis axis);
  std::vector<View> result_leaves(const char* name, Axis axis);

  // Whether all that was read so far fits. Sizes of a call that does not may be anything.
  bool ok() const { return error_.empty(); }

  // The next result as scratch memory of at least so many bytes: a product(), which no overflow makes small.
  std::byte* workspace(std::int64_t bytes);

  // Views that need to have the same type, or that of what they are summed in.
  void same_types(const char* name, const std::vector<View>& views, const std::vector<View>& models);

  // Views that need to have the types in which sums of the models' types are kept.
  void accumulators(const char* name, const std::vector<View>& views, const std::vector<View>& models);

  // Whatever else needs to hold.
  void require(bool condition, const std::string& message) {
    if (!condition) fail(message);
  }

  const Shape& shape() const { return shape_; }
  std::int64_t rows() const { return rows_; }

  // Empty if every buffer was read and all of them fit; otherwise what does not.
  std::string finish();

 private:
  // Buffers of one list, in order.
  struct Cursor {
    const std::vector<Buffer>& buffers;
    std::size_t position = 0;
    bool is_result = false;
  };

  void fail(const std::string& message);
  void join_batch(const Buffer& operand);
  const Buffer& next(Cursor& cursor, const char* name);
  View view_of(const Buffer& buffer) const;
  View read(Cursor& cursor, const char* name, Axis axis, std::initializer_list<Type> types, int leaf);
  std::vector<View> read_leaves(Cursor& cursor, const char* name, Axis axis);

  const Call& call_;
  Cursor operands_;
  Cursor results_;
  Shape shape_;
  std::int64_t rows_ = 0;
  std::vector<std::vector<std::int64_t>> parameters_;  // the dimensions of each leaf, once one was read
  std::string error_;
};

}  // namespace fedfuse

#endif  // FEDFUSE_CONTRACT_READER_H_
