// Calls at random into every reader and every kernel of the CPU: right ones, and the same with something bent, such as
// a size, a type, a buffer too many, an attribute that is not there. Exported programs come from anywhere: what does
// not fit is refused with a reason, and whatever numbers the buffers hold, nothing is read or written outside of them.
// It takes the sanitizers to see all of that. The same seed makes the same calls.
//
//   fuzz_test [calls [seed]]     10^5 calls without a word; 10^6 before a release
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operations.h"
#include "cpu/pages.h"
#include "handlers/operations.h"

namespace fedfuse {
namespace {

using Dims = std::vector<std::int64_t>;
constexpr Type kFloats[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
// Sizes with which something may go wrong, and attributes: ends of ranges, powers of two, numbers a little too large.
constexpr std::int64_t kWild[] = {-1,
                                  0,
                                  1,
                                  2,
                                  3,
                                  7,
                                  8,
                                  9,
                                  std::int64_t{1} << 20,
                                  std::numeric_limits<std::int32_t>::max(),
                                  std::int64_t{1} << 31,
                                  std::int64_t{1} << 33,
                                  std::int64_t{1} << 52,
                                  std::numeric_limits<std::int64_t>::max(),
                                  std::numeric_limits<std::int64_t>::min()};
// Buffers of more bytes are spoken of, and not there: such calls are read and not run.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 21;

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : engine_(seed) {}
  std::int64_t below(std::int64_t count) { return static_cast<std::int64_t>(engine_() % std::uint64_t(count)); }
  std::int64_t from(std::int64_t least, std::int64_t most) { return least + below(most - least + 1); }
  bool one_in(std::int64_t count) { return below(count) == 0; }
  bool coin() { return one_in(2); }
  std::uint64_t word() { return engine_(); }
  template <typename T, std::size_t kCount>
  T one_of(const T (&choices)[kCount]) {
    return choices[below(kCount)];
  }

 private:
  std::mt19937_64 engine_;
};

struct Spec {
  Type type;
  Dims dims;
  std::vector<std::uint32_t> words = {};  // what it holds, if that is not anything
};

// A call before it has memory.
struct Recipe {
  std::string operation;
  std::map<std::string, std::int64_t> attributes;
  std::vector<Spec> operands, results;
};

// ---- Right calls ----------------------------------------------------------------------------------------------------

struct LeafSpec {
  Type type;
  Dims dims;
  std::int64_t count() const { return product(dims); }
};

// Adds to a recipe as the contracts' readers take from it.
class Right {
 public:
  Right(const std::string& operation, Dice* dice) : dice_(*dice) {
    recipe_.operation = operation;
    for (std::int64_t i = dice_.one_in(3) ? dice_.from(1, 3) : 0; i > 0; --i) batch_.push_back(dice_.from(0, 3));
    clients_ = dice_.one_in(40) ? dice_.from(1, 300) : dice_.from(1, 6);
    for (std::int64_t i = dice_.from(1, 3); i > 0; --i) {
      Dims dims;
      for (std::int64_t axis = dice_.below(3); axis > 0; --axis) dims.push_back(dice_.from(dice_.one_in(8) ? 0 : 1, 5));
      if (clients_ < 7 && dice_.one_in(400)) dims = {dice_.from(16000, 40000)};
      leaves_.push_back({dice_.one_of(kFloats), dims});
    }
    set("batch_dims", static_cast<std::int64_t>(batch_.size()));
  }

  Recipe finish(bool has_leaves = true) {
    set("num_leaves", has_leaves ? static_cast<std::int64_t>(leaves_.size()) : 0);
    return recipe_;
  }

  Dice& dice() { return dice_; }
  std::int64_t clients() const { return clients_; }
  std::int64_t batch_count() const { return product(batch_); }
  const std::vector<LeafSpec>& leaves() const { return leaves_; }
  void set(const char* name, std::int64_t value) { recipe_.attributes[name] = value; }
  bool flag(const char* name) {
    const bool value = dice_.coin();
    set(name, value);
    return value;
  }

  // The first operand has the whole batch; others may share an axis of it.
  void operand(Type type, const Dims& rest, std::vector<std::uint32_t> words = {}) {
    Dims dims;
    for (const std::int64_t size : batch_) dims.push_back(recipe_.operands.empty() || dice_.coin() ? size : 1);
    if (!words.empty()) std::fill(dims.begin(), dims.end(), 1);
    dims.insert(dims.end(), rest.begin(), rest.end());
    recipe_.operands.push_back({type, dims, std::move(words)});
  }
  void result(Type type, const Dims& rest) {
    Dims dims = batch_;
    dims.insert(dims.end(), rest.begin(), rest.end());
    recipe_.results.push_back({type, dims});
  }

  Type real() { return dice_.coin() ? Type::kFloat32 : Type::kFloat64; }
  void per_client(Type type) { operand(type, {clients_}); }
  void scalar(Type type) { operand(type, {}); }
  void where() {
    if (flag("has_where")) per_client(Type::kBool);
  }

  enum class Types { kLeafs, kAccumulators, kAny };
  static Dims with(Dims before, const Dims& after) {
    before.insert(before.end(), after.begin(), after.end());
    return before;
  }
  void operand_leaves(const Dims& before, Types types = Types::kLeafs) {
    for (const LeafSpec& leaf : leaves_) operand(type_of(leaf, types), with(before, leaf.dims));
  }
  void result_leaves(const Dims& before, Types types = Types::kAny) {
    for (const LeafSpec& leaf : leaves_) result(type_of(leaf, types), with(before, leaf.dims));
  }
  void updates() { operand_leaves({clients_}); }
  void workspace(std::int64_t bytes) { recipe_.results.push_back({Type::kUInt8, {bytes + dice_.below(2)}}); }

  std::int64_t blocks() const {
    std::int64_t blocks = 0;
    for (const LeafSpec& leaf : leaves_) blocks += (leaf.count() + kReductionBlock - 1) / kReductionBlock;
    return blocks;
  }

 private:
  Type type_of(const LeafSpec& leaf, Types types) {
    if (types == Types::kAny) return dice_.one_of(kFloats);
    return types == Types::kLeafs ? leaf.type : accumulator_of(leaf.type);
  }

  Dice& dice_;
  Recipe recipe_;
  Dims batch_;
  std::int64_t clients_;
  std::vector<LeafSpec> leaves_;
};

using Types = Right::Types;

Recipe weighted_sum(Right right) {
  right.updates();
  right.per_client(right.real());
  right.where();
  right.flag("divide");
  right.result_leaves({});
  return right.finish();
}

Recipe weighted_spread(Right right) {
  right.per_client(right.real());
  right.operand_leaves({}, Types::kAny);
  right.where();
  right.result_leaves({right.clients()});
  return right.finish();
}

Recipe reduction(Right right, bool dots) {
  right.updates();
  if (dots) right.operand_leaves(right.flag("shared") ? Dims{} : Dims{right.clients()}, Types::kAny);
  right.where();
  right.result(right.real(), {right.clients()});
  right.workspace(8 * right.batch_count() * right.clients() * right.blocks());
  return right.finish();
}

Recipe finite_clients(Right right) {
  right.updates();
  right.result(Type::kBool, {right.clients()});
  return right.finish();
}

Recipe accumulate(Right right) {
  right.operand_leaves({}, Types::kAccumulators);
  right.operand_leaves({});
  right.scalar(right.real());
  right.result_leaves({}, Types::kAccumulators);
  return right.finish();
}

Recipe stack(Right right) {
  right.set("num_clients", right.clients());
  for (std::int64_t client = 0; client < right.clients(); ++client) right.operand_leaves({});
  right.result_leaves({right.clients()}, Types::kLeafs);
  return right.finish();
}

void trim(Right* right) {
  right->where();
  const bool is_counted = right->flag("has_trim_count");
  if (is_counted) right->scalar(Type::kInt32);
  right->set("trim", is_counted ? -1 : right->dice().below(4));
}

Recipe trimmed_mean(Right right, bool around_median) {
  if (around_median) right.flag("around_median");
  right.updates();
  trim(&right);
  right.result_leaves({});
  return right.finish();
}

Recipe selected_mean(Right right) {
  right.updates();
  right.updates();
  right.flag("around_median");
  trim(&right);
  right.result_leaves({});
  return right.finish();
}

Recipe spread(Right right) {
  right.updates();
  right.operand_leaves({}, Types::kAny);
  right.flag("around_median");
  trim(&right);
  right.result_leaves({right.clients()}, Types::kLeafs);
  return right.finish();
}

Recipe client_norms(Right right) {
  right.updates();
  right.where();
  right.result(right.real(), {right.clients()});
  right.workspace(16 * right.batch_count() * right.clients() * right.blocks());
  return right.finish();
}

// Where a block lies of which all of a leaf is two levels, the slower one being trivial; mostly.
std::vector<std::uint32_t> noise_blocks(Right* right, std::int64_t levels) {
  std::vector<std::uint32_t> words;
  for (const LeafSpec& leaf : right->leaves()) {
    for (std::int64_t level = 0; level < levels; ++level) {
      const auto own = static_cast<std::uint32_t>(level + 1 == levels ? leaf.count() : 1);
      const auto origin = static_cast<std::uint32_t>(right->dice().below(5));
      words.insert(words.end(), {origin, origin + own, own});
    }
  }
  if (right->dice().one_in(4))
    words[right->dice().below(words.size())] = static_cast<std::uint32_t>(right->dice().word());
  return words;
}

Recipe private_sum(Right right) {
  right.updates();
  right.per_client(right.real());
  const bool clip = right.flag("clip");
  if (clip) {
    right.scalar(right.real());
    if (right.flag("has_given_norms")) right.per_client(right.real());
  }
  right.where();
  if (right.flag("noise")) {
    const auto leaves = static_cast<std::int64_t>(right.leaves().size());
    right.operand(Type::kUInt32, {leaves, 2});
    right.scalar(right.real());
    if (right.flag("has_blocks")) {
      const std::int64_t levels = right.dice().from(1, 3);
      right.operand(Type::kUInt32, {leaves, levels, 3}, noise_blocks(&right, levels));
    }
  }
  if (clip) right.result(right.real(), {right.clients()});
  right.result_leaves({}, Types::kAccumulators);
  if (clip) right.workspace(16 * right.batch_count() * right.clients() * (right.blocks() + 1));
  return right.finish();
}

Recipe server_update(Right right) {
  right.set("rule", right.dice().below(kNumServerRules));
  right.scalar(Type::kInt32);
  right.operand_leaves({});
  right.operand_leaves({}, Types::kAccumulators);
  right.operand_leaves({}, Types::kAccumulators);
  right.operand_leaves({right.clients()}, Types::kAny);
  right.per_client(right.real());
  right.where();
  for (int rate = 0; rate < 4; ++rate) right.scalar(right.real());
  right.result(Type::kInt32, {});
  right.result_leaves({}, Types::kLeafs);
  right.result_leaves({}, Types::kAccumulators);
  right.result_leaves({}, Types::kAccumulators);
  std::int64_t bytes = right.batch_count() * 4 + 64;
  for (const LeafSpec& leaf : right.leaves()) bytes += 8 * right.batch_count() * leaf.count() + 64;
  right.workspace(bytes);
  return right.finish();
}

Recipe sparse(Right right, bool has_values, bool has_weights, bool has_vector) {
  const Type type = right.dice().one_of(kFloats), accumulator = accumulator_of(type);
  const std::int64_t entries = right.dice().below(right.dice().one_in(20) ? 200 : 6);
  const std::int64_t coordinates = right.dice().below(right.dice().one_in(20) ? 60000 : 9);
  if (has_values) right.operand(type, {right.clients(), entries});
  right.operand(Type::kInt32, {right.clients(), entries});
  if (has_weights) right.per_client(accumulator);
  if (has_vector) right.operand(accumulator, {coordinates});
  right.where();
  if (!has_vector) {
    right.set("num_params", coordinates);
    right.result(accumulator, {coordinates});
    right.workspace(right.batch_count() * right.clients());
  } else if (has_values) {
    right.result(accumulator, {right.clients()});
  } else {
    right.result(type, {right.clients(), entries});
  }
  return right.finish(false);
}

Recipe quantized(Right right, bool dots) {
  const Type type = right.real();
  const std::int64_t clients = right.clients(), num_bits = right.dice().coin() ? 8 : 4, per_byte = 8 / num_bits;
  const std::int64_t coordinates = right.dice().below(right.dice().one_in(20) ? 10000 : 20);
  std::int64_t blocks = 1, block_size = 0;
  if (right.dice().coin()) {
    block_size = right.dice().from(1, 9);
    blocks = (coordinates + block_size - 1) / block_size;
  }
  right.set("num_bits", num_bits);
  right.set("num_params", coordinates);
  right.set("block_size", block_size);
  right.operand(right.dice().coin() ? Type::kUInt8 : Type::kInt8, {clients, (coordinates + per_byte - 1) / per_byte});
  right.operand(type, {clients, blocks});
  if (dots) {
    right.operand(type, {coordinates});
    right.where();
    right.result(type, {clients, blocks});
  } else {
    right.operand(type, {clients, blocks});
    right.per_client(type);
    right.where();
    right.result(type, {coordinates});
  }
  return right.finish(false);
}

Recipe pairs(Right right) {
  const std::int64_t clients = right.clients();
  right.updates();
  if (right.flag("has_others")) right.updates();
  right.where();
  right.result(right.real(), {clients, clients});
  const std::int64_t segments = std::min(right.blocks(), kMostPairSums / (clients * clients));
  right.workspace(8 * right.batch_count() * std::max<std::int64_t>(1, segments) * clients * clients);
  return right.finish();
}

Recipe mix(Right right) {
  const std::int64_t rows = right.dice().from(1, 5);
  right.updates();
  right.operand(right.real(), {rows, right.clients()});
  right.result_leaves({rows});
  return right.finish();
}

Recipe step(Right right) {
  right.updates();
  right.operand_leaves({}, Types::kAccumulators);
  right.per_client(right.real());
  right.where();
  right.result_leaves({}, Types::kAccumulators);
  right.result(right.real(), {right.clients()});
  right.workspace(8 * right.batch_count() * right.clients() * right.blocks());
  return right.finish();
}

// A right call of a reader's.
Recipe recipe_for(const std::string& operation, const std::string& reader, Dice* dice) {
  using Make = std::function<Recipe(Right)>;
  static const std::map<std::string, Make> kMakers = {
      {"read_weighted_sum", weighted_sum},
      {"read_weighted_spread", weighted_spread},
      {"read_squared_norms", [](Right right) { return reduction(std::move(right), false); }},
      {"read_client_dots", [](Right right) { return reduction(std::move(right), true); }},
      {"read_finite_clients", finite_clients},
      {"read_accumulate", accumulate},
      {"read_stack", stack},
      {"read_trimmed_mean", [](Right right) { return trimmed_mean(std::move(right), false); }},
      {"read_mean_around_median", [](Right right) { return trimmed_mean(std::move(right), true); }},
      {"read_selected_mean", selected_mean},
      {"read_spread", spread},
      {"read_client_norms", client_norms},
      {"read_private_sum", private_sum},
      {"read_server_update", server_update},
      {"read_sparse_sum", [](Right right) { return sparse(std::move(right), true, true, false); }},
      {"read_sparse_spread", [](Right right) { return sparse(std::move(right), false, true, true); }},
      {"read_sparse_dots", [](Right right) { return sparse(std::move(right), true, false, true); }},
      {"read_quantized_sum", [](Right right) { return quantized(std::move(right), false); }},
      {"read_quantized_dots", [](Right right) { return quantized(std::move(right), true); }},
      {"read_pairs", pairs},
      {"read_mix", mix},
      {"read_step", step},
  };
  const auto found = kMakers.find(reader);
  if (found == kMakers.end()) {
    std::printf("FAILED: no calls are made for %s\n", reader.c_str());
    std::exit(1);
  }
  return found->second(Right(operation, dice));
}

// ---- Wrong calls ----------------------------------------------------------------------------------------------------

// By one up or down, from end to end.
void move(std::int64_t* number, Dice* dice) {
  *number = static_cast<std::int64_t>(static_cast<std::uint64_t>(*number) + (dice->coin() ? 1 : ~std::uint64_t{0}));
}

void bend_buffers(std::vector<Spec>* buffers, Dice* dice) {
  const auto count = static_cast<std::int64_t>(buffers->size());
  if (count == 0) return;
  const auto at = buffers->begin() + dice->below(count);
  Dims& dims = at->dims;
  const auto rank = static_cast<std::int64_t>(dims.size());
  switch (dice->below(8)) {
    case 0:
      buffers->erase(at);
      break;
    case 1:
      buffers->insert(buffers->begin() + dice->below(count + 1), Spec(*at));
      break;
    case 2:
      std::swap(*at, (*buffers)[dice->below(count)]);
      break;
    case 3:
      at->type = static_cast<Type>(dice->below(static_cast<std::int64_t>(Type::kOther) + 1));
      break;
    case 4:
      dims.insert(dims.begin() + dice->below(rank + 1), dice->coin() ? 1 : dice->one_of(kWild));
      break;
    case 5:
      if (rank > 0) dims.erase(dims.begin() + dice->below(rank));
      break;
    case 6:
      if (rank > 0) move(&dims[dice->below(rank)], dice);
      break;
    default:
      if (rank > 0) dims[dice->below(rank)] = dice->one_of(kWild);
  }
}

void bend(Recipe* recipe, Dice* dice) {
  if (dice->one_in(3)) {
    const auto at = std::next(recipe->attributes.begin(), dice->below(recipe->attributes.size()));
    if (dice->one_in(4)) {
      recipe->attributes.erase(at);  // as it is with one of another type
      recipe->attributes["another"] = 1;
    } else {
      if (dice->coin()) at->second = dice->one_of(kWild);
      move(&at->second, dice);
    }
  } else {
    bend_buffers(dice->one_in(3) ? &recipe->results : &recipe->operands, dice);
  }
}

// A size that many buffers have, changed in all of them: what fits together all the same, and is absurd.
void bend_alike(Recipe* recipe, Dice* dice) {
  const Spec& spec = recipe->operands[dice->below(recipe->operands.size())];
  if (spec.dims.empty()) return;
  const std::int64_t old = spec.dims[dice->below(spec.dims.size())], size = dice->one_of(kWild);
  for (std::vector<Spec>* buffers : {&recipe->operands, &recipe->results}) {
    for (Spec& each : *buffers) std::replace(each.dims.begin(), each.dims.end(), old, size);
  }
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

// -1 for more than there is.
std::int64_t bytes_if_real(const Spec& spec) {
  std::int64_t bytes = bytes_of(spec.type);
  for (const std::int64_t dim : spec.dims) {
    if (dim < 0) return -1;
    bytes = product({bytes, dim});
  }
  return bytes <= kMostBytes ? bytes : -1;
}

// Numbers of all kinds: wild bits, few different numbers, small ones, the ends of their ranges.
void fill(const Spec& spec, std::int64_t bytes, Dice* dice, std::byte* to) {
  const std::int64_t size = bytes_of(spec.type), kind = dice->below(4);
  for (std::int64_t at = 0; at < bytes; at += size) {
    std::uint64_t bits = dice->word();
    if (!spec.words.empty()) {
      bits = spec.words[at / size % spec.words.size()];
    } else if (kind == 1) {
      bits = bits % 8 == 0 ? bits : 0;
    } else if (kind == 2) {
      const double small = static_cast<double>(bits % 64) / 8 - 3;
      const auto single = static_cast<float>(small);
      if (spec.type == Type::kFloat64) {
        std::memcpy(&bits, &small, sizeof small);
      } else if (spec.type == Type::kFloat32) {
        std::memcpy(&bits, &single, sizeof single);
      } else {
        bits %= 8;
      }
    } else if (kind == 3) {
      constexpr std::uint64_t kEnds[] = {0, 1, ~std::uint64_t{0}, 0x7fffffffu, 0x80000000u, 0x7fefffffffffffffu};
      bits = dice->one_of(kEnds);
    }
    std::memcpy(to + at, &bits, size);
  }
}

struct Memory {
  std::vector<std::unique_ptr<std::byte[]>> kept;
  bool is_real = true;  // all of it is there

  void give(const std::vector<Spec>& specs, Dice* dice, std::vector<Buffer>* buffers) {
    for (const Spec& spec : specs) {
      Buffer buffer{nullptr, spec.type, spec.dims};
      const std::int64_t bytes = bytes_if_real(spec);
      is_real = is_real && bytes >= 0;
      // An array without elements may have no address.
      if (bytes > 0 || (bytes == 0 && dice->coin())) {
        kept.emplace_back(new std::byte[bytes]);
        fill(spec, bytes, dice, kept.back().get());
        buffer.data = kept.back().get();
      }
      buffers->push_back(std::move(buffer));
    }
  }
};

// ---- Running --------------------------------------------------------------------------------------------------------

struct Counts {
  std::int64_t run = 0, refused = 0, only_read = 0, failed = 0;
};

void run(const Work& work, bool backwards) {
  for (std::int64_t i = 0; i < work.tasks; ++i) work.run(backwards ? work.tasks - 1 - i : i);
  if (work.finish) work.finish();
  if (work.next != nullptr) run(*work.next, backwards);
}

// False if a right call was refused, or a wrong one without a word.
template <typename Problem>
bool call(const Recipe& recipe, bool is_right, std::string (*read)(const Call&, Problem*), Dice* dice, Counts* counts) {
  Memory memory;
  Call call;
  call.operation = recipe.operation.c_str();
  memory.give(recipe.operands, dice, &call.operands);
  memory.give(recipe.results, dice, &call.results);
  call.attribute = [&recipe](const char* name) -> std::optional<std::int64_t> {
    const auto found = recipe.attributes.find(name);
    if (found == recipe.attributes.end()) return std::nullopt;
    return found->second;
  };
  auto problem = std::make_shared<Problem>();
  const std::string error = read(call, problem.get());
  if (!error.empty()) {
    ++counts->refused;
    if (is_right) std::printf("%s\n", error.c_str());
    return !is_right && error.rfind("fedfuse " + recipe.operation + ": ", 0) == 0;
  }
  if (!memory.is_real) {
    ++counts->only_read;
    return true;
  }
  prefer_huge_pages(call.results, 2);
  try {
    run(cut(std::shared_ptr<const Problem>(std::move(problem))), dice->coin());
    ++counts->run;
  } catch (const std::invalid_argument&) {
    ++counts->refused;
  }
  return true;
}

struct Target {
  const char* operation;
  const char* reader;
  std::function<bool(const Recipe&, bool, Dice*, Counts*)> call;
};

#define FEDFUSE_TARGET(operation, Problem, read)                                            \
  {#operation, #read, [](const Recipe& recipe, bool is_right, Dice* dice, Counts* counts) { \
     return call<Problem>(recipe, is_right, read, dice, counts);                            \
   }},
const Target kTargets[] = {FEDFUSE_FOR_EACH_OPERATION(FEDFUSE_TARGET)};

std::string describe(const Recipe& recipe) {
  std::string text = recipe.operation;
  for (const auto& [name, value] : recipe.attributes) text += " " + name + "=" + std::to_string(value);
  for (const std::vector<Spec>* buffers : {&recipe.operands, &recipe.results}) {
    text += buffers == &recipe.operands ? "\n  operands:" : "\n  results:";
    for (const Spec& spec : *buffers) {
      text += std::string(" ") + name_of(spec.type) + "[";
      for (const std::int64_t dim : spec.dims) text += std::to_string(dim) + ",";
      text += "]";
    }
  }
  return text;
}

int fuzz(std::int64_t calls, std::uint64_t seed, bool tells) {
  const std::vector<std::string> isas = supported_isas();
  std::map<std::string, Counts> counts;
  Counts all;
  for (std::int64_t i = 0; i < calls; ++i) {
    // Every call has a seed of its own, so that one alone can be made again.
    Dice dice(seed + static_cast<std::uint64_t>(i));
    const Target& target = dice.one_of(kTargets);
    choose_isa(isas[dice.below(static_cast<std::int64_t>(isas.size()))]);
    Recipe recipe = recipe_for(target.operation, target.reader, &dice);
    const bool is_right = dice.one_in(3);
    if (!is_right && dice.one_in(4)) bend_alike(&recipe, &dice);
    for (std::int64_t bends = is_right ? 0 : dice.from(1, 3); bends > 0; --bends) bend(&recipe, &dice);
    if (tells) std::printf("%s\n", describe(recipe).c_str()), std::fflush(stdout);
    Counts& own = counts[target.operation];
    if (!target.call(recipe, is_right, &dice, &own)) {
      ++all.failed;
      if (all.failed <= 20) {
        std::printf("FAILED: call %lld: %s\n", static_cast<long long>(seed + i), describe(recipe).c_str());
      }
    }
  }
  for (const auto& [operation, own] : counts) {
    all.run += own.run;
    all.refused += own.refused;
    all.only_read += own.only_read;
    // Or nothing was tried.
    if (calls >= 100000 && (own.run < calls / 300 || own.refused < calls / 300)) {
      ++all.failed;
      std::printf("FAILED: %s: %lld run, %lld refused\n", operation.c_str(), static_cast<long long>(own.run),
                  static_cast<long long>(own.refused));
    }
  }
  std::printf("%lld run, %lld refused, %lld too large to run, %lld failed\n", static_cast<long long>(all.run),
              static_cast<long long>(all.refused), static_cast<long long>(all.only_read),
              static_cast<long long>(all.failed));
  return all.failed != 0;
}

}  // namespace
}  // namespace fedfuse

int main(int argc, char** argv) {
  const std::int64_t calls = argc > 1 ? std::atoll(argv[1]) : 100000;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  return fedfuse::fuzz(calls, seed, calls == 1);
}
