// Tests that calls are read right, that calls that do not fit are refused with a reason, and that the CPU's side of
// every operation walks batch, leaves and chunks as the contract says. For sanitizers and emulators too.
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/operations.h"

namespace fedfuse {
namespace {

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

using Dims = std::vector<std::int64_t>;

// A call that owns its memory, exactly as much as its shapes say.
struct OwnedCall {
  std::map<std::string, std::int64_t> attributes;
  std::vector<std::shared_ptr<std::byte[]>> memory;
  Call call;

  OwnedCall(const char* operation, std::map<std::string, std::int64_t> the_attributes)
      : attributes(std::move(the_attributes)) {
    call.operation = operation;
    call.attribute = [this](const char* name) -> std::optional<std::int64_t> {
      const auto found = attributes.find(name);
      if (found == attributes.end()) return std::nullopt;
      return found->second;
    };
  }
  OwnedCall(const OwnedCall&) = delete;

  Buffer buffer(Type type, const Dims& dims) {
    std::int64_t count = 1;
    for (std::int64_t dim : dims) count *= dim;
    memory.push_back(std::shared_ptr<std::byte[]>(new std::byte[count * bytes_of(type)]()));
    return {memory.back().get(), type, dims};
  }

  template <typename T>
  void operand(Type type, const Dims& dims, const std::vector<T>& values) {
    call.operands.push_back(buffer(type, dims));
    std::copy(values.begin(), values.end(), static_cast<T*>(call.operands.back().data));
  }

  void result(Type type, const Dims& dims) { call.results.push_back(buffer(type, dims)); }

  const float* floats(int result) const { return static_cast<const float*>(call.results[result].data); }
};

// Last task first: tasks do not depend on each other.
void run(const Work& work) {
  for (std::int64_t task = work.tasks - 1; task >= 0; --task) work.run(task);
  if (work.finish) work.finish();
}

template <typename Problem>
void read_and_run(const OwnedCall& owned, std::string (*read)(const Call&, Problem*)) {
  auto problem = std::make_shared<Problem>();
  const std::string error = read(owned.call, problem.get());
  expect(error.empty(), error);
  if (error.empty()) run(cut(std::shared_ptr<const Problem>(problem)));
}

// The i-th of some numbers that have no pattern.
float number(std::int64_t i) { return std::sin(1.7f * i) * 3; }

std::vector<float> numbers(std::int64_t count) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(number(i));
  return values;
}

constexpr std::int64_t kOuter = 2, kInner = 3, kClients = 5, kCoordinates = 5000;

// Two nested maps: updates are mapped over both, weights over the outer, participation over the inner.
std::unique_ptr<OwnedCall> nested_weighted_sum() {
  auto call = std::make_unique<OwnedCall>(
      "weighted_sum",
      std::map<std::string, std::int64_t>{{"batch_dims", 2}, {"num_leaves", 2}, {"has_where", 1}, {"divide", 0}});
  call->operand(Type::kFloat32, {kOuter, kInner, kClients, kCoordinates / 10, 10},
                numbers(kOuter * kInner * kClients * kCoordinates));
  call->operand(Type::kFloat32, {kOuter, 1, kClients}, numbers(kOuter * kClients));
  call->operand(Type::kFloat32, {kOuter, 1, kClients}, numbers(kOuter * kClients));
  call->operand<char>(Type::kBool, {1, kInner, kClients}, {1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0});
  call->result(Type::kFloat32, {kOuter, kInner, kCoordinates / 10, 10});
  call->result(Type::kFloat32, {kOuter, kInner});
  return call;
}

void test_nested_batch() {
  const auto owned = nested_weighted_sum();
  read_and_run(*owned, read_weighted_sum);
  const char* where = static_cast<const char*>(owned->call.operands[3].data);
  for (std::int64_t outer = 0; outer < kOuter; ++outer) {
    for (std::int64_t inner = 0; inner < kInner; ++inner) {
      for (std::int64_t column : {std::int64_t{0}, std::int64_t{4095}, std::int64_t{4096}, kCoordinates - 1}) {
        double sum = 0, small = 0;
        for (std::int64_t client = 0; client < kClients; ++client) {
          if (!where[inner * kClients + client]) continue;
          const double weight = number(outer * kClients + client);
          sum += weight * number(((outer * kInner + inner) * kClients + client) * kCoordinates + column);
          small += weight * weight;
        }
        const std::int64_t batch = outer * kInner + inner;
        expect(std::fabs(owned->floats(0)[batch * kCoordinates + column] - sum) < 1e-4, "the sum of a large leaf");
        expect(std::fabs(owned->floats(1)[batch] - small) < 1e-4, "the sum of a leaf of one number a client");
      }
    }
  }
}

void test_refusals() {
  const auto refused = [](const char* what, void (*spoil)(OwnedCall*)) {
    const auto owned = nested_weighted_sum();
    spoil(owned.get());
    WeightedSumProblem problem;
    expect(!read_weighted_sum(owned->call, &problem).empty(), std::string("refuses ") + what);
  };
  refused("a missing operand", [](OwnedCall* call) { call->call.operands.pop_back(); });
  refused("no operands", [](OwnedCall* call) { call->call.operands.clear(); });
  refused("one operand too many", [](OwnedCall* call) { call->operand<float>(Type::kFloat32, {1, 1}, {0}); });
  refused("a missing result", [](OwnedCall* call) { call->call.results.pop_back(); });
  refused("no results", [](OwnedCall* call) { call->call.results.clear(); });
  refused("integer updates", [](OwnedCall* call) { call->call.operands[0].type = Type::kInt32; });
  refused("half weights", [](OwnedCall* call) { call->call.operands[2].type = Type::kFloat16; });
  refused("float participation", [](OwnedCall* call) { call->call.operands[3].type = Type::kFloat32; });
  refused("another number of clients", [](OwnedCall* call) { call->call.operands[1].dims[2] = kClients + 1; });
  refused("no clients", [](OwnedCall* call) {
    for (int operand : {0, 1, 2, 3}) call->call.operands[operand].dims[2] = 0;
  });
  refused("weights of two dimensions", [](OwnedCall* call) { call->call.operands[2].dims.push_back(1); });
  refused("a scalar operand", [](OwnedCall* call) { call->call.operands[2].dims.clear(); });
  refused("another batch", [](OwnedCall* call) { call->call.operands[2].dims[0] = kOuter + 1; });
  refused("a result of other parameters", [](OwnedCall* call) { call->call.results[0].dims[3] = 9; });
  refused("a result of part of the batch", [](OwnedCall* call) { call->call.results[1].dims[1] = 1; });
  refused("a result of another type", [](OwnedCall* call) { call->call.results[1].type = Type::kBool; });
  for (const char* name : {"batch_dims", "num_leaves", "has_where", "divide"}) {
    for (std::int64_t value : {std::int64_t{-1}, std::int64_t{9}, std::int64_t{1} << 40}) {
      const auto owned = nested_weighted_sum();
      owned->attributes[name] = value;
      WeightedSumProblem problem;
      expect(!read_weighted_sum(owned->call, &problem).empty(), std::string("refuses a wild ") + name);
    }
    const auto owned = nested_weighted_sum();
    owned->attributes.erase(name);
    WeightedSumProblem problem;
    expect(!read_weighted_sum(owned->call, &problem).empty(), std::string("refuses to do without ") + name);
  }
}

void test_order_statistics() {
  // A traced count per element of the batch, one of which leaves nobody.
  OwnedCall owned("trimmed_mean",
                  {{"batch_dims", 1}, {"num_leaves", 1}, {"has_where", 0}, {"has_trim_count", 1}, {"trim", -1}});
  owned.operand<float>(Type::kFloat32, {1, 5, 1}, {4, 1, 9, 2, 7});
  owned.operand<std::int32_t>(Type::kInt32, {4}, {0, 2, 3, -1});
  owned.result(Type::kFloat32, {4, 1});
  read_and_run(owned, read_trimmed_mean);
  expect(std::fabs(owned.floats(0)[0] - 4.6f) < 1e-6f && owned.floats(0)[1] == 4, "means of what is kept");
  expect(std::isnan(owned.floats(0)[2]) && std::isnan(owned.floats(0)[3]), "NaN when nobody is left");

  OwnedCall spread("spread_to_selected", {{"batch_dims", 0},
                                          {"num_leaves", 1},
                                          {"has_where", 1},
                                          {"has_trim_count", 0},
                                          {"trim", 1},
                                          {"around_median", 0}});
  spread.operand<float>(Type::kFloat32, {4, 1}, {4, NAN, 1, 2});
  spread.operand<float>(Type::kFloat32, {1}, {6});
  spread.operand<char>(Type::kBool, {4}, {1, 0, 1, 1});
  spread.result(Type::kFloat32, {4, 1});
  read_and_run(spread, read_spread);
  for (int client = 0; client < 4; ++client) {
    expect(spread.floats(0)[client] == (client == 3 ? 6.0f : 0.0f), "the cotangent goes to the client that is kept");
  }

  OwnedCall selected("selected_mean", {{"batch_dims", 0},
                                       {"num_leaves", 1},
                                       {"has_where", 0},
                                       {"has_trim_count", 0},
                                       {"trim", 1},
                                       {"around_median", 0}});
  selected.operand<float>(Type::kFloat32, {3, 1}, {4, 9, 1});
  selected.operand<float>(Type::kFloat32, {3, 1}, {10, 20, 30});
  selected.result(Type::kBFloat16, {1});
  read_and_run(selected, read_selected_mean);
  expect(*static_cast<const std::uint16_t*>(selected.call.results[0].data) == 0x4120, "10 as bfloat16");
}

void test_reductions() {
  // Three blocks of the large leaf, and a leaf that is one number.
  constexpr std::int64_t kLarge = 2 * kReductionBlock + 7;
  OwnedCall norms("squared_norms", {{"batch_dims", 0}, {"num_leaves", 2}, {"has_where", 1}});
  norms.operand(Type::kFloat32, {3, kLarge}, std::vector<float>(3 * kLarge, 2.0f));
  norms.operand<float>(Type::kFloat32, {3}, {1, 2, 3});
  norms.operand<char>(Type::kBool, {3}, {1, 0, 1});
  norms.result(Type::kFloat32, {3});
  norms.result(Type::kUInt8, {3 * 4 * 8});
  read_and_run(norms, read_squared_norms);
  expect(norms.floats(0)[0] == 4 * kLarge + 1 && norms.floats(0)[1] == 0 && norms.floats(0)[2] == 4 * kLarge + 9,
         "norms over the whole tree");
  norms.call.results[1].dims[0] -= 1;
  ClientDotsProblem problem;
  expect(!read_squared_norms(norms.call, &problem).empty(), "refuses a workspace that is too small");

  OwnedCall dots("client_dots", {{"batch_dims", 0}, {"num_leaves", 1}, {"has_where", 0}, {"shared", 1}});
  dots.operand<float>(Type::kFloat32, {2, 2}, {1, 2, 3, 4});
  dots.operand<std::uint16_t>(Type::kBFloat16, {2}, {0x3f80, 0x4000});
  dots.result(Type::kFloat32, {2});
  dots.result(Type::kUInt8, {2 * 8});
  read_and_run(dots, read_client_dots);
  expect(dots.floats(0)[0] == 5 && dots.floats(0)[1] == 11, "products with one vector for all");

  // One buffer is the updates of every element of the batch, and each one's shared vector: products, not squares.
  OwnedCall same("client_dots", {{"batch_dims", 1}, {"num_leaves", 1}, {"has_where", 0}, {"shared", 1}});
  same.operand<float>(Type::kFloat32, {1, 2, 2}, {1, 2, 3, 4});
  same.call.operands.push_back({same.call.operands[0].data, Type::kFloat32, {2, 2}});
  same.result(Type::kFloat32, {2, 2});
  same.result(Type::kUInt8, {2 * 2 * 8});
  read_and_run(same, read_client_dots);
  const std::vector<float> products = {5, 11, 11, 25};
  expect(std::equal(products.begin(), products.end(), same.floats(0)), "products of rows of one buffer");

  OwnedCall finite("finite_clients", {{"batch_dims", 1}, {"num_leaves", 1}});
  finite.operand<float>(Type::kFloat32, {2, 2, 2}, {1, 2, INFINITY, 4, 5, NAN, 7, 8});
  finite.result(Type::kBool, {2, 2});
  read_and_run(finite, read_finite_clients);
  const bool* flags = static_cast<const bool*>(finite.call.results[0].data);
  expect(flags[0] && !flags[1] && !flags[2] && flags[3], "who is finite");
}

void test_streaming() {
  OwnedCall accumulate("accumulate_weighted", {{"batch_dims", 0}, {"num_leaves", 1}});
  accumulate.operand<float>(Type::kFloat32, {2}, {1, 2});
  accumulate.operand<std::uint16_t>(Type::kBFloat16, {2}, {0x3f80, 0x4000});
  accumulate.operand<float>(Type::kFloat32, {}, {3});
  accumulate.result(Type::kFloat32, {2});
  read_and_run(accumulate, read_accumulate);
  expect(accumulate.floats(0)[0] == 4 && accumulate.floats(0)[1] == 8, "total + weight * update");
  accumulate.call.operands[0].type = accumulate.call.results[0].type = Type::kFloat16;
  AccumulateProblem problem;
  expect(!read_accumulate(accumulate.call, &problem).empty(), "refuses a total of low precision");

  OwnedCall stack("stack_clients", {{"batch_dims", 1}, {"num_leaves", 1}, {"num_clients", 2}});
  stack.operand<float>(Type::kFloat32, {2, 2}, {1, 2, 3, 4});
  stack.operand<float>(Type::kFloat32, {1, 2}, {5, 6});
  stack.result(Type::kFloat32, {2, 2, 2});
  read_and_run(stack, read_stack);
  const std::vector<float> needed = {1, 2, 5, 6, 3, 4, 5, 6};
  expect(std::equal(needed.begin(), needed.end(), stack.floats(0)), "clients one after the other");
}

}  // namespace
}  // namespace fedfuse

int main() {
  using namespace fedfuse;
  test_nested_batch();
  test_refusals();
  test_order_statistics();
  test_reductions();
  test_streaming();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
