// Private sums and server optimizers as the CUDA backend computes them, on the host (see cuda/team.h), against plain
// definitions in double.
#include "cuda/tests/arrays.h"
#include "math/blocks.h"

namespace fedfuse {
namespace cuda {
namespace {

// ---- Noise, once more -----------------------------------------------------------------------------------------------

std::uint32_t random_word(const std::uint32_t* key, std::uint64_t counter) {
  const std::uint32_t schedule[] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bdau};
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  std::uint32_t x0 = static_cast<std::uint32_t>(counter >> 32) + schedule[0];
  std::uint32_t x1 = static_cast<std::uint32_t>(counter) + schedule[1];
  for (std::uint32_t group = 0; group < 5; ++group) {
    for (const int rotation : kRotations[group % 2]) {
      x0 += x1;
      x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0;
    }
    x0 += schedule[(group + 1) % 3];
    x1 += schedule[(group + 2) % 3] + group + 1;
  }
  return x0 ^ x1;
}

// sqrt(2) erfinv(u), by bisection of what is defined: erfc(x / sqrt(2)) = 1 - |u|.
double normal_of(std::uint32_t word) {
  const double u = -1 + 0x1p-24 + 2 * (static_cast<double>(word >> 9) * 0x1p-23);
  const double rest = 1 - static_cast<double>(static_cast<float>(u) * static_cast<float>(u));
  const double tail = 1 - std::sqrt(1 - rest);
  double low = 0, high = 8;
  for (int i = 0; i < 80; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) > tail ? low : high) = middle;
  }
  return u < 0 ? -low : low;
}

// ---- Private sums ---------------------------------------------------------------------------------------------------

struct PrivateCase {
  Type type;
  bool clip, given, noise, blocks, where;
  double scale;
};

void check_private(const PrivateCase& c, std::vector<std::int64_t> batch_sizes) {
  constexpr std::int64_t kClients = 300;
  constexpr std::int64_t kBlockRows = 2, kBlockColumns = 6;
  const std::vector<std::int64_t> coordinates = {1, 1030, 0, kBlockRows * kBlockColumns};
  const Shape shape = shape_of(std::move(batch_sizes), kClients, c.noise ? coordinates : with_many(coordinates));
  const Batch& batch = shape.batch;
  const std::string what = std::string("private ") + name_of(c.type) + (c.clip ? " clip" : "") +
                           (c.given ? " given" : "") + (c.noise ? " noise" : "") + (c.blocks ? " blocks" : "");
  const Type accumulator_type = accumulator(c.type);
  std::vector<Array> updates, reduced;
  for (const std::int64_t count : shape.coordinates) {
    updates.emplace_back(c.type, batch, kClients * count, 1).fill([&](std::int64_t i) {
      const std::int64_t client = count == 0 ? 0 : i / count % kClients;
      if (c.clip && client == 7) return static_cast<double>(NAN);
      if (c.clip && client == 8) return static_cast<double>(INFINITY);
      return c.scale * normal() * static_cast<double>(client % 3);
    });
    reduced.emplace_back(accumulator_type, batch, count);
  }
  const auto num_keys = static_cast<std::int64_t>(2 * shape.coordinates.size());
  Array weights(Type::kFloat64, batch, kClients), max_norm(Type::kFloat32, batch, 1, 0);
  Array given(Type::kFloat64, batch, kClients), where(Type::kBool, batch, kClients, 0);
  Array norms(Type::kFloat64, batch, kClients), keys(Type::kUInt32, batch, num_keys), stddev(Type::kFloat32, batch, 1);
  Array blocks(Type::kUInt32, batch, 4 * 2 * 3, 0);
  weights.fill([](std::int64_t i) { return i % 4 == 3 ? -0.5 : 1.25; });
  max_norm.fill([&](std::int64_t) { return 30 * c.scale; });
  given.fill([&](std::int64_t i) { return c.scale * static_cast<double>(i % 50); });
  where.fill([](std::int64_t i) { return i % 11 != 5; });
  for (std::int64_t i = 0; i < keys.size(); ++i) {
    const auto word = static_cast<std::uint32_t>(random_bits());
    std::memcpy(keys.view.data + 4 * i, &word, 4);
  }
  stddev.fill([&](std::int64_t i) { return c.scale * (0.5 + static_cast<double>(i)); });
  // The last leaf is a block of a leaf that is 100000 x 65536, behind 2^32 coordinates; the others are whole.
  blocks.fill([&](std::int64_t i) {
    const std::int64_t leaf = i / 6, level = i % 6 / 3, word = i % 3;
    if (leaf == 3)
      return static_cast<double>(level == 0 ? (std::int64_t[]){70000, 100000, kBlockRows}[word]
                                            : (std::int64_t[]){65530, 65536, kBlockColumns}[word]);
    return static_cast<double>(level == 0
                                   ? (std::int64_t[]){0, 1, 1}[word]
                                   : (std::int64_t[]){0, shape.coordinates[leaf], shape.coordinates[leaf]}[word]);
  });

  PrivateSumProblem problem;
  problem.shape = shape;
  problem.updates = views_of(updates);
  problem.reduced = views_of(reduced);
  problem.weights = weights.view;
  if (c.where) problem.where = where.view;
  std::vector<std::byte> workspace;
  if (c.clip) {
    problem.max_norm = max_norm.view;
    if (c.given) problem.given_norms = given.view;
    problem.norms = {shape, problem.updates, problem.where, norms.view, nullptr, first_blocks(shape)};
    const std::int64_t rows = batch.count * kClients;
    workspace.resize(rows * (sizeof(ClipFactor) + problem.norms.first_block.back() * sizeof(ScaledSum)));
    problem.factors = reinterpret_cast<ClipFactor*>(workspace.data());
    problem.norms.partials = reinterpret_cast<ScaledSum*>(problem.factors + rows);
  } else {
    norms.fill([](std::int64_t) { return 0; });
  }
  if (c.noise) problem.noise = {keys.view, stddev.view, c.blocks ? blocks.view : View(), c.blocks ? 2 : 0};
  std::vector<Array*> results = pointers(reduced);
  results.push_back(&norms);
  run(what, problem, results);

  int wrong_sums = 0, wrong_norms = 0;
  for (std::int64_t index = 0; index < batch.count; ++index) {
    std::vector<double> factors(kClients, 1);
    for (std::int64_t client = 0; client < kClients; ++client) {
      const bool present = !c.where || get(Type::kBool, where.view.at(batch, index), client) != 0;
      if (!present) factors[client] = NAN;  // whoever does not count
      if (!c.clip) continue;
      double squares = 0;
      for (std::size_t leaf = 0; leaf < updates.size(); ++leaf) {
        const std::int64_t count = shape.coordinates[leaf];
        for (std::int64_t i = 0; i < count; ++i) {
          const double x = get(c.type, updates[leaf].view.at(batch, index), client * count + i) / c.scale;
          squares += x * x;
        }
      }
      double norm = std::sqrt(squares) * c.scale;
      if (!present) norm = 0;
      if (c.given) norm = get(Type::kFloat64, given.view.at(batch, index), client);
      wrong_norms += !is_close(get(Type::kFloat64, norms.view.at(batch, index), client), norm, 1e-12 * norm);
      if (!std::isfinite(norm)) factors[client] = NAN;
      const double bound = get(Type::kFloat32, max_norm.view.data, 0);
      if (norm > bound) factors[client] *= bound / norm;
    }
    for (std::size_t leaf = 0; leaf < updates.size(); ++leaf) {
      const std::int64_t count = shape.coordinates[leaf];
      std::uint32_t key[2];
      std::memcpy(key, keys.view.at(batch, index) + 8 * leaf, sizeof key);
      for (std::int64_t i = 0; i < count; ++i) {
        double sum = 0, magnitude = 0;
        for (std::int64_t client = 0; client < kClients; ++client) {
          const double x = get(c.type, updates[leaf].view.at(batch, index), client * count + i);
          if (std::isnan(factors[client]) || (c.given && !std::isfinite(x))) continue;
          const double term = get(Type::kFloat64, weights.view.at(batch, index), client) * factors[client] * x;
          sum += term;
          magnitude += std::fabs(term);
        }
        double tolerance = 400 * epsilon_of(accumulator_type) * magnitude;
        if (c.noise) {
          std::uint64_t counter = i;
          if (c.blocks && leaf == 3) counter = (70000 + i / kBlockColumns) * 65536ull + 65530 + i % kBlockColumns;
          const double noise =
              get(Type::kFloat32, stddev.view.at(batch, index), 0) * normal_of(random_word(key, counter));
          sum += noise;
          tolerance += 2e-6 * std::fabs(noise);
        }
        const double got = get(accumulator_type, reduced[leaf].view.at(batch, index), i);
        // A client that is known to be finite, and is not, comes through.
        if (c.given && !std::isfinite(got)) continue;
        wrong_sums += !is_close(got, sum, tolerance);
      }
    }
  }
  expect(wrong_sums == 0, what + " sums: " + std::to_string(wrong_sums));
  expect(wrong_norms == 0, what + " norms: " + std::to_string(wrong_norms));
}

// ---- Server optimizers ----------------------------------------------------------------------------------------------

void check_server(ServerRule rule, Type type, Type update_type, bool in_place, double poison, bool refused) {
  constexpr std::int64_t kClients = 3;
  const Shape shape = shape_of({2}, kClients, with_many({1, 0, 2051}));
  const Batch& batch = shape.batch;
  const Type real = accumulator(type);
  const auto fill = [](std::int64_t) { return std::fabs(normal()) + 0.1; };
  std::vector<Array> updates, means;
  std::vector<std::vector<Array>> old(3), updated(3);
  for (const std::int64_t count : shape.coordinates) {
    updates.emplace_back(update_type, batch, kClients * count).fill(fill);
    means.emplace_back(real, batch, count);
    for (int part = 0; part < 3; ++part) {
      old[part].emplace_back(part == 0 ? type : real, batch, count).fill(fill);
      updated[part].emplace_back(part == 0 ? type : real, batch, count);
    }
  }
  // The second element of the batch has one bad coordinate.
  put(update_type, poison, updates[2].view.at(batch, 1), 2051 + 2050);
  Array step(Type::kInt32, batch, 1), new_step(Type::kInt32, batch, 1), weights(Type::kFloat32, batch, kClients, 0);
  Array rates(Type::kFloat32, batch, 1, 0), b1(Type::kFloat32, batch, 1), b2(Type::kFloat64, batch, 1, 0);
  step.fill([](std::int64_t i) { return 5 + i; });
  weights.fill([](std::int64_t i) { return 1 + i; });
  rates.fill([](std::int64_t) { return 0.25; });
  b1.fill([](std::int64_t i) { return 0.5 + 0.25 * static_cast<double>(i); });
  b2.fill([](std::int64_t) { return 0.75; });
  std::vector<std::int32_t> accepted(batch.count);

  ServerUpdateProblem problem;
  problem.rule = rule;
  problem.shape = shape;
  problem.old = {step.view, views_of(old[0]), views_of(old[1]), views_of(old[2])};
  problem.updated = {new_step.view, views_of(updated[0]), views_of(updated[1]), views_of(updated[2])};
  problem.learning_rate = problem.tau = rates.view;
  problem.b1 = b1.view;
  problem.b2 = b2.view;
  problem.mean = {shape, views_of(updates), weights.view, View(), true, views_of(means)};
  problem.accepted = accepted.data();
  std::vector<std::vector<double>> before(3);
  for (int part = 0; part < 3; ++part) {
    for (std::int64_t i = 0; i < old[part][2].size(); ++i) {
      before[part].push_back(get(old[part][2].view.type, old[part][2].view.data, i));
    }
  }
  std::vector<Array*> results = {in_place ? &step : &new_step};
  if (in_place) problem.updated = problem.old;
  for (int part = 0; part < 3; ++part) {
    for (Array& array : in_place ? old[part] : updated[part]) results.push_back(&array);
  }
  const std::string what = "server rule " + std::to_string(static_cast<int>(rule)) + " " + name_of(type) + " " +
                           name_of(update_type) + (in_place ? " in place" : "");
  run(what, problem, results);

  int wrong = 0;
  for (std::int64_t index = 0; index < batch.count; ++index) {
    const bool counts = index == 0 || !refused;
    const double beta1 = get(Type::kFloat32, b1.view.at(batch, index), 0);
    wrong += get(Type::kInt32, problem.updated.step.at(batch, index), 0) != static_cast<double>(5 + index + counts);
    for (std::int64_t i = 0; i < shape.coordinates[2]; ++i) {
      double delta = 0;
      for (std::int64_t client = 0; client < kClients; ++client) {
        delta +=
            static_cast<double>(1 + client) / 6 * get(update_type, updates[2].view.at(batch, index), client * 2051 + i);
      }
      const std::int64_t at = index * shape.coordinates[2] + i;
      double param = before[0][at], first = before[1][at], second = before[2][at];
      if (counts) {
        const double square = delta * delta;
        first = rule == ServerRule::kAvgM ? beta1 * first + delta : beta1 * first + (1 - beta1) * delta;
        if (rule == ServerRule::kAdagrad) second += square;
        if (rule == ServerRule::kAdam) second = 0.75 * second + 0.25 * square;
        if (rule == ServerRule::kYogi) second -= 0.25 * square * (second > square ? 1 : -1);
        param += rule == ServerRule::kAvgM ? 0.25 * first : 0.25 * first / (std::sqrt(second) + 0.25);
      }
      const double expected[] = {param, first, second};
      const std::vector<View>* const views[] = {&problem.updated.params, &problem.updated.first,
                                                &problem.updated.second};
      for (int part = 0; part < 3; ++part) {
        const View& view = (*views[part])[2];
        const double tolerance = counts ? 8 * (epsilon_of(view.type) + 0x1p-23) * (std::fabs(expected[part]) + 1) : 0;
        wrong += !is_close(get(view.type, view.at(batch, index), i), expected[part], tolerance);
      }
    }
  }
  expect(wrong == 0, what + ": " + std::to_string(wrong));
}

int main_of_test() {
  constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
  for (const Type type : kTypes) {
    const double huge = type == Type::kFloat64 ? 1e200 : type == Type::kFloat16 ? 100 : 1e36;
    check_private({type, true, false, false, false, true, 1}, {2});
    check_private({type, true, false, true, false, false, 1}, {});
    check_private({type, true, true, true, true, true, 1}, {2, 1});
    check_private({type, false, false, true, true, false, 1}, {2});
    check_private({type, true, false, false, false, false, huge}, {});
    if (type == Type::kFloat64) check_private({type, true, false, false, false, false, 1e-200}, {});
    for (int rule = 0; rule < kNumServerRules; ++rule) {
      check_server(static_cast<ServerRule>(rule), type, type, rule % 2 == 0, NAN, true);
      check_server(static_cast<ServerRule>(rule), type, Type::kBFloat16, rule % 2 == 1, -INFINITY, true);
      // A mean that is finite, but neither its square nor, in float16, the parameter.
      const bool refused = rule == 0 ? type == Type::kFloat16 : type != Type::kFloat64;
      check_server(static_cast<ServerRule>(rule), type, Type::kFloat32, true, 1e25, refused);
    }
    check_server(ServerRule::kAdam, type, Type::kFloat64, true, 1, false);
    std::printf("%s: %d passed, %d failed\n", name_of(type), passed, failed);
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace cuda
}  // namespace fedfuse

int main() { return fedfuse::cuda::main_of_test(); }
