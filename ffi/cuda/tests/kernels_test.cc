// Runs the CUDA kernels' own source on the host, without a card or a CUDA compiler (see cuda/team.h), from whole
// problems down to the last thread, against plain definitions in double. The threads of a block take turns forwards and
// backwards, and must come to the same bits. Buffers have exactly their size, for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/tests/arrays.h"
#include "math/ordered_keys.h"

namespace fedfuse {
namespace cuda {
namespace {

// ---- Order statistics -----------------------------------------------------------------------------------------------

// The first kept rank of values in order. Around the median, a window slides up while what it would gain is nearer.
std::int64_t first_kept(const std::vector<double>& sorted, std::int64_t trim, bool around_median) {
  const auto size = static_cast<std::int64_t>(sorted.size());
  if (!around_median) return trim;
  const long double a = sorted[(size - 1) / 2], b = sorted[size / 2], median = (a + b) / 2;
  const auto distance = [&](long double value) { return value == median ? 0 : std::fabs(value - median); };
  std::int64_t first = 0;
  while (first < trim) {
    const long double lost = sorted[first], gained = sorted[first + size - trim];
    // Added from the greatest down, numbers far apart cancel before the small ones go lost.
    long double terms[] = {lost, gained, -a, -b};
    std::sort(terms, terms + 4, [](long double x, long double y) { return std::fabs(x) > std::fabs(y); });
    const long double sum = terms[0] + terms[1] + terms[2] + terms[3];
    const bool nearer = std::isfinite(sum) ? sum < 0 : gained < median || distance(gained) < distance(lost);
    if (!nearer) break;
    ++first;
  }
  return first;
}

// Whether each client is kept, from the values of all of them.
std::vector<bool> kept_clients(const std::vector<double>& values, const std::vector<bool>& present, std::int64_t trim,
                               bool around_median) {
  std::vector<int> order;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (present[i]) order.push_back(static_cast<int>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (std::isnan(values[a])) return false;
    return std::isnan(values[b]) || values[a] < values[b];
  });
  std::vector<bool> kept(values.size(), false);
  const auto count = static_cast<std::int64_t>(order.size());
  const std::int64_t num_kept = count - (around_median ? trim : 2 * trim);
  if (trim < 0 || num_kept < 1) return kept;
  std::vector<double> sorted;
  for (const int client : order) sorted.push_back(values[client]);
  const std::int64_t first = first_kept(sorted, trim, around_median);
  for (std::int64_t rank = first; rank < first + num_kept; ++rank) kept[order[rank]] = true;
  return kept;
}

bool is_mean(double got, const std::vector<double>& values, Type accumulator, Type type) {
  if (values.empty()) return std::isnan(got);
  long double sum = 0, magnitude = 0;
  for (const double value : values) {
    sum += value;
    magnitude += std::fabs(value);
  }
  const auto count = static_cast<long double>(values.size());
  if (std::isnan(sum)) return std::isnan(got);
  if (std::isinf(sum)) return got == static_cast<double>(sum);
  const auto mean = static_cast<double>(sum / count);
  if (type != accumulator) {  // rounded to a type that the mean may be too large for
    if (std::isinf(got)) return std::fabs(mean) > 65000;
    return std::fabs(got - mean) <= 1.01 * epsilon_of(type) * static_cast<double>(magnitude / count) + 1e-7;
  }
  if (values.size() == 1) return got == values[0];
  // Two middle values: what half of their sum rounds to.
  if (values.size() == 2) {
    return accumulator == Type::kFloat64 ? got == mean : got == static_cast<float>(values[0] / 2 + values[1] / 2);
  }
  const double smallest = accumulator == Type::kFloat64 ? 4.9e-324 : 1.4e-45;
  return std::isfinite(got) && std::fabs(got - mean) <= epsilon_of(accumulator) * (2 + static_cast<double>(count)) *
                                                                static_cast<double>(magnitude / count) +
                                                            smallest;
}

struct OrderCase {
  Type type;
  std::int64_t clients;
  std::vector<std::int64_t> coordinates;
  std::int64_t trim;
  bool traced = false;
  bool masked = false;
  std::vector<std::int64_t> batch = {};
  Type reduced = Type::kOther;  // the accumulator's
  bool derivatives = true;
  bool around_median = false;
};

void check_order(const OrderCase& c, int pattern) {
  const Shape shape = shape_of(c.batch, c.clients, c.coordinates);
  const Type reduced_type = c.reduced == Type::kOther ? accumulator(c.type) : c.reduced;
  const std::string what = std::string(name_of(c.type)) + " n=" + std::to_string(c.clients) +
                           " d=" + std::to_string(c.coordinates[0]) + " trim=" + std::to_string(c.trim) +
                           (c.traced ? " traced" : "") + (c.masked ? " masked" : "") +
                           (c.around_median ? " around the median" : "") + " pattern=" + std::to_string(pattern) +
                           " batch=" + std::to_string(shape.batch.count);
  std::vector<Array> updates, values, reduced, tangent, cotangents, spread;
  for (const std::int64_t coordinates : c.coordinates) {
    const std::int64_t stacked = c.clients * coordinates;
    // What is shared over the batch differs between operands.
    fill_wildly(&updates.emplace_back(c.type, shape.batch, stacked, 0x5), pattern);
    fill_wildly(&values.emplace_back(c.type, shape.batch, stacked, 0x2), 0);
    cotangents.emplace_back(reduced_type, shape.batch, coordinates).fill([](std::int64_t) { return normal(); });
    reduced.emplace_back(reduced_type, shape.batch, coordinates);
    tangent.emplace_back(reduced_type, shape.batch, coordinates);
    spread.emplace_back(c.type, shape.batch, stacked);
  }
  Trim trim;
  Array where(Type::kBool, shape.batch, c.clients, 0x3);
  where.fill([](std::int64_t) { return random_bits() % 3 != 0; });
  Array count(Type::kInt32, shape.batch, 1, 0x1);
  count.fill([&](std::int64_t) { return c.trim; });
  if (c.masked) trim.where = where.view;
  if (c.traced) trim.count = count.view;
  trim.attribute = c.traced ? -1 : c.trim;
  trim.around_median = c.around_median;

  run(what, TrimmedMeanProblem{shape, views_of(updates), trim, views_of(reduced)}, pointers(reduced));
  if (c.derivatives) {
    run(what, SelectedMeanProblem{shape, views_of(updates), views_of(values), trim, views_of(tangent)},
        pointers(tangent));
    run(what, SpreadProblem{shape, views_of(updates), views_of(cotangents), trim, views_of(spread)}, pointers(spread));
  }

  int wrong_means = 0, wrong_tangents = 0, wrong_spreads = 0;
  for (std::size_t leaf = 0; leaf < updates.size(); ++leaf) {
    for (std::int64_t batch = 0; batch < shape.batch.count; ++batch) {
      for (std::int64_t column = 0; column < shape.coordinates[leaf]; ++column) {
        const auto element = [&](const Array& array, std::int64_t row) {
          return get(array.view.type, array.view.at(shape.batch, batch), row * shape.coordinates[leaf] + column);
        };
        std::vector<double> all, kept_values, kept_tangents;
        std::vector<bool> present;
        for (std::int64_t row = 0; row < c.clients; ++row) {
          all.push_back(element(updates[leaf], row));
          present.push_back(!c.masked || get(Type::kBool, where.view.at(shape.batch, batch), row) != 0);
        }
        const std::vector<bool> kept = kept_clients(all, present, c.trim, c.around_median);
        for (std::int64_t row = 0; row < c.clients; ++row) {
          if (!kept[row]) continue;
          kept_values.push_back(all[row]);
          kept_tangents.push_back(element(values[leaf], row));
        }
        wrong_means += !is_mean(element(reduced[leaf], 0), kept_values, accumulator(c.type), reduced_type);
        if (!c.derivatives) continue;
        wrong_tangents += !is_mean(element(tangent[leaf], 0), kept_tangents, accumulator(c.type), reduced_type);
        const double cotangent = element(cotangents[leaf], 0);
        std::byte share[8] = {};
        if (accumulator(c.type) == Type::kFloat64) {
          put(c.type, cotangent / static_cast<double>(kept_values.size()), share, 0);
        } else {
          put(c.type, static_cast<float>(cotangent) / static_cast<float>(kept_values.size()), share, 0);
        }
        const double expected = get(c.type, share, 0);
        for (std::int64_t row = 0; row < c.clients; ++row) {
          const double got = element(spread[leaf], row);
          wrong_spreads += !(kept[row] ? got == expected : got == 0 && !std::signbit(got));
        }
      }
    }
  }
  expect(wrong_means == 0, "mean " + what + ": " + std::to_string(wrong_means));
  expect(wrong_tangents == 0, "selected mean " + what + ": " + std::to_string(wrong_tangents));
  expect(wrong_spreads == 0, "spread " + what + ": " + std::to_string(wrong_spreads));
}

void check_order_statistics(Type type, bool brief) {
  int pattern = 0;
  // Every network, full and with pads; the default trim, the median, and others.
  for (std::int64_t clients = 1; clients <= 195; clients += clients < 34 ? 1 : brief ? 9 : 3) {
    for (const std::int64_t trim : {clients / 5, (clients - 1) / 2, std::int64_t{0}, clients / 3, clients}) {
      for (int i = 0; i < (clients < 34 ? 3 : 1); ++i) check_order({type, clients, {7, 3}, trim}, pattern++);
    }
    check_order({type, clients, {5, 2}, clients / 5, true}, pattern++);
    check_order({type, clients, {5, 2}, clients / 5, false, true}, pattern++);
    check_order({type, clients, {5, 2}, (clients - 1) / 4, true, true}, pattern++);
  }
  // As many as the largest networks have room for, and one more; more than any has.
  for (const std::int64_t clients : {128, 129, 160, 161, 192, 193, 1000, 5000}) {
    for (const std::int64_t trim : {clients / 5, (clients - 1) / 2, std::int64_t{0}}) {
      for (int i = 0; i < 6; ++i) check_order({type, clients, {i == 0 ? 19 : 2}, trim}, pattern++);
      if (brief && clients == 5000) break;
    }
    for (int i = 0; i < (clients < 1000 ? 6 : 2); ++i) {
      check_order({type, clients, {i % 2 == 0 ? 3 : 4}, clients / 5, i < 4, i != 2}, pattern++);
    }
  }
  // As many as bit planes have room for, and one more; a tile of columns, and one more or less.
  for (const std::int64_t clients : {256, 257, 512, 513, 1024, 1025}) {
    for (const std::int64_t columns : {31, 64, 65}) {
      check_order({type, clients, {columns}, clients / 5, columns == 64, columns == 31}, pattern++);
    }
  }
  // Around the median.
  for (const std::int64_t clients : {1, 2, 5, 8, 33, 200, 1030}) {
    for (const std::int64_t trim : {std::int64_t{0}, clients / 5, (clients - 1) / 2, clients - 1, clients}) {
      OrderCase around{type, clients, {19, 2}, trim, false, trim % 2 == 1};
      around.around_median = true;
      for (int i = 0; i < (clients < 33 ? 6 : 2); ++i) check_order(around, pattern++);
    }
  }
  // Tiles, batches, many leaves, other results.
  for (const std::int64_t clients : {3, 10, 150, 192, 200}) {
    check_order({type, clients, {300}, clients / 5}, 0);
    check_order({type, clients, {257}, clients / 5, true, true}, 1);
    check_order({type, clients, {129, 0, 4}, clients / 5, true, true, {3}}, pattern++);
    check_order({type, clients, {5, 16}, clients / 5, true, true, {2, 3, 2}}, pattern++);
    check_order({type, clients, {5}, clients / 5, false, false, {}, Type::kBFloat16}, 0);
    check_order({type, clients, {5}, clients / 5, false, false, {}, Type::kFloat16}, 0);
  }
  check_order({type, 3, with_many({300, 2, 7}), 1}, pattern++);
  check_order({type, 3, {2}, 1, false, true, {70000}, Type::kOther, false}, 1);
  check_order({type, 3, {2}, -1, true}, 0);  // nobody is left
}

// ---- Sums -----------------------------------------------------------------------------------------------------------

void check_weighted_sum(Type type, std::int64_t clients, std::vector<std::int64_t> coordinates, bool divide,
                        bool masked, std::vector<std::int64_t> batch, Type reduced_type) {
  const Shape shape = shape_of(std::move(batch), clients, std::move(coordinates));
  const std::string what = std::string("weighted sum ") + name_of(type) + " n=" + std::to_string(clients) +
                           " d=" + std::to_string(shape.coordinates[0]) + " to " + name_of(reduced_type);
  std::vector<Array> updates, reduced;
  Array where(Type::kBool, shape.batch, clients, 0x1);
  where.fill([&](std::int64_t i) { return clients == 1 || i % clients == 0 || random_bits() % 3 != 0; });
  Array weights(accumulator(type), shape.batch, clients, 0x2);
  weights.fill([](std::int64_t) { return std::fabs(normal()) + 0.5; });
  for (const std::int64_t count : shape.coordinates) {
    Array& array = updates.emplace_back(type, shape.batch, clients * count, 0x5);
    array.fill([](std::int64_t) { return normal(); });
    reduced.emplace_back(reduced_type, shape.batch, count);
    if (!masked || shape.batch.rank > 0) continue;
    for (std::int64_t row = 0; row < clients; ++row) {  // whoever is absent is NaN
      if (get(Type::kBool, where.view.data, row) != 0) continue;
      for (std::int64_t column = 0; column < count; ++column) put(type, NAN, array.view.data, row * count + column);
    }
  }
  WeightedSumProblem problem{shape, views_of(updates), weights.view, {}, divide, views_of(reduced)};
  if (masked) problem.where = where.view;
  run(what, problem, pointers(reduced));
  int wrong = 0;
  for (std::size_t leaf = 0; leaf < updates.size(); ++leaf) {
    for (std::int64_t index = 0; index < shape.batch.count; ++index) {
      const auto at = [&](const Array& array, std::int64_t i) {
        return get(array.view.type, array.view.at(shape.batch, index), i);
      };
      for (std::int64_t column = 0; column < shape.coordinates[leaf]; ++column) {
        double sum = 0, total = 0, magnitude = 0;
        for (std::int64_t row = 0; row < clients; ++row) {
          if (masked && at(where, row) == 0) continue;
          const double term = at(weights, row) * at(updates[leaf], row * shape.coordinates[leaf] + column);
          sum += term;
          magnitude += std::fabs(term);
          total += at(weights, row);
        }
        const double divisor = divide ? total : 1;
        const double got = at(reduced[leaf], column);
        const double tolerance = magnitude / divisor *
                                 (static_cast<double>(clients + 3) * epsilon_of(accumulator(type)) +
                                  (reduced_type == accumulator(type) ? 0 : epsilon_of(reduced_type)));
        wrong += !is_close(got, sum / divisor, tolerance);
      }
    }
  }
  expect(wrong == 0, what + ": " + std::to_string(wrong));
}

void check_weighted_spread(Type type, std::int64_t clients, std::vector<std::int64_t> coordinates, bool masked,
                           std::vector<std::int64_t> batch, Type cotangent_type) {
  const Shape shape = shape_of(std::move(batch), clients, std::move(coordinates));
  const std::string what = std::string("weighted spread ") + name_of(type) + " n=" + std::to_string(clients) +
                           " from " + name_of(cotangent_type);
  std::vector<Array> cotangents, spread;
  Array where(Type::kBool, shape.batch, clients, 0x1);
  where.fill([&](std::int64_t) { return random_bits() % 3 != 0; });
  Array weights(accumulator(type), shape.batch, clients, 0x2);
  weights.fill([](std::int64_t) { return normal(); });
  for (const std::int64_t count : shape.coordinates) {
    cotangents.emplace_back(cotangent_type, shape.batch, count).fill([](std::int64_t) { return normal(); });
    spread.emplace_back(type, shape.batch, clients * count);
  }
  WeightedSpreadProblem problem{shape, weights.view, views_of(cotangents), {}, views_of(spread)};
  if (masked) problem.where = where.view;
  run(what, problem, pointers(spread));
  int wrong = 0;
  for (std::size_t leaf = 0; leaf < spread.size(); ++leaf) {
    for (std::int64_t index = 0; index < shape.batch.count; ++index) {
      const auto at = [&](const Array& array, std::int64_t i) {
        return get(array.view.type, array.view.at(shape.batch, index), i);
      };
      for (std::int64_t row = 0; row < clients; ++row) {
        for (std::int64_t column = 0; column < shape.coordinates[leaf]; ++column) {
          const bool is_absent = masked && at(where, row) == 0;
          const double exact = is_absent ? 0 : at(weights, row) * at(cotangents[leaf], column);
          const double got = at(spread[leaf], row * shape.coordinates[leaf] + column);
          // The weight may be rounded to the accumulator, the product to the accumulator and to the type.
          const double tolerance = std::fabs(exact) * (2 * epsilon_of(accumulator(type)) + epsilon_of(type));
          wrong += is_absent ? got != 0 : !is_close(got, exact, tolerance + 1e-7 * (type == Type::kFloat16));
        }
      }
    }
  }
  expect(wrong == 0, what + ": " + std::to_string(wrong));
}

void check_sums(Type type) {
  for (const std::int64_t clients : {1, 2, 7, 8, 9, 33, 255, 256, 257, 1000}) {
    for (const bool masked : {false, true}) {
      check_weighted_sum(type, clients, {17, 1}, masked, masked, {}, accumulator(type));
    }
  }
  for (const Type reduced : {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16}) {
    check_weighted_sum(type, 5, {16, 3, 0, 2049, 64}, true, true, {}, reduced);
  }
  check_weighted_sum(type, 10, {5, 16}, true, true, {2, 3, 2}, accumulator(type));
  check_weighted_sum(type, 3, with_many({4, 5000}), false, false, {2}, accumulator(type));

  for (const Type cotangent : {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16}) {
    check_weighted_spread(type, 5, {16, 3, 0, 2049, 64}, true, {2, 3}, cotangent);
  }
  check_weighted_spread(type, 300, {1, 16}, false, {}, accumulator(type));
  check_weighted_spread(type, 3, with_many({4, 5000}), true, {2}, accumulator(type));

  // accumulate_weighted, in place
  const Shape shape = shape_of({3}, 0, with_many({1, 5000, 16}));
  std::vector<Array> total, update, before;
  Array weight(accumulator(type), shape.batch, 1);
  weight.fill([](std::int64_t) { return normal(); });
  for (const std::int64_t count : shape.coordinates) {
    total.emplace_back(accumulator(type), shape.batch, count).fill([](std::int64_t) { return normal(); });
    before.emplace_back(accumulator(type), shape.batch, count);
    std::memcpy(before.back().view.data, total.back().view.data, total.back().bytes);
    update.emplace_back(type, shape.batch, count, 0).fill([](std::int64_t) { return normal(); });
  }
  run("accumulate", AccumulateProblem{shape, views_of(total), views_of(update), weight.view, views_of(total)},
      pointers(total));
  int wrong = 0;
  for (std::size_t leaf = 0; leaf < total.size(); ++leaf) {
    for (std::int64_t i = 0; i < total[leaf].size(); ++i) {
      const std::int64_t batch = i / shape.coordinates[leaf], column = i % shape.coordinates[leaf];
      const double old = get(accumulator(type), before[leaf].view.data, i);
      const double term = get(accumulator(type), weight.view.data, batch) * get(type, update[leaf].view.data, column);
      wrong += !is_close(get(accumulator(type), total[leaf].view.data, i), old + term,
                         2 * epsilon_of(accumulator(type)) * (std::fabs(old) + std::fabs(term)));
    }
  }
  expect(wrong == 0, std::string("accumulate ") + name_of(type));
}

void check_stack(Type type, std::int64_t clients, std::vector<std::int64_t> batch) {
  const Shape shape = shape_of(std::move(batch), clients, {1, 16, 0, 9000, 33});
  std::vector<Array> stacked;
  std::vector<std::vector<Array>> sources(clients);
  StackProblem problem{shape, {}, {}};
  for (std::vector<Array>& leaves : sources) {
    for (const std::int64_t count : shape.coordinates)
      fill_wildly(&leaves.emplace_back(type, shape.batch, count, 1), 4);
    problem.clients.push_back(views_of(leaves));
  }
  for (const std::int64_t count : shape.coordinates) stacked.emplace_back(type, shape.batch, clients * count);
  problem.stacked = views_of(stacked);
  run("stack", problem, pointers(stacked));
  bool same = true;
  for (std::size_t leaf = 0; leaf < stacked.size(); ++leaf) {
    const std::int64_t bytes = shape.coordinates[leaf] * bytes_of(type);
    for (std::int64_t index = 0; index < shape.batch.count; ++index) {
      for (std::int64_t client = 0; client < clients; ++client) {
        same &= std::memcmp(stacked[leaf].view.at(shape.batch, index) + client * bytes,
                            sources[client][leaf].view.at(shape.batch, index), bytes) == 0;
      }
    }
  }
  expect(same, std::string("stack ") + name_of(type) + " n=" + std::to_string(clients));
}

// ---- Reductions over coordinates ------------------------------------------------------------------------------------

void check_reductions(Type type, Type others_type, bool shared, bool norms, std::vector<std::int64_t> batch) {
  const std::int64_t clients = 4;
  const Shape shape = shape_of(std::move(batch), clients, with_many({1, 40001, 0, 16384, 7}));
  std::vector<Array> updates, others;
  for (const std::int64_t count : shape.coordinates) {
    updates.emplace_back(type, shape.batch, clients * count, 1).fill([](std::int64_t) { return normal(); });
    others.emplace_back(others_type, shape.batch, (shared ? 1 : clients) * count).fill([](std::int64_t) {
      return normal();
    });
  }
  Array where(Type::kBool, shape.batch, clients, 0);
  where.fill([](std::int64_t i) { return i != 2; });
  Array dots(Type::kFloat64, shape.batch, clients);
  ClientDotsProblem problem{shape,
                            views_of(updates),
                            norms ? views_of(updates) : views_of(others),
                            norms,
                            shared,
                            where.view,
                            dots.view,
                            nullptr,
                            {0}};
  for (const std::int64_t count : shape.coordinates) {
    problem.first_block.push_back(problem.first_block.back() + (count + kReductionBlock - 1) / kReductionBlock);
  }
  const auto partials = std::make_unique<double[]>(shape.batch.count * clients * problem.first_block.back());
  problem.partials = partials.get();
  run("dots", problem, {&dots});
  int wrong = 0;
  for (std::int64_t index = 0; index < shape.batch.count; ++index) {
    for (std::int64_t client = 0; client < clients; ++client) {
      double sum = 0, magnitude = 0;
      for (std::size_t leaf = 0; client != 2 && leaf < updates.size(); ++leaf) {
        const std::int64_t count = shape.coordinates[leaf];
        for (std::int64_t column = 0; column < count; ++column) {
          const double x = get(type, updates[leaf].view.at(shape.batch, index), client * count + column);
          const Array& other = others[leaf];
          const double y =
              norms ? x : get(others_type, other.view.at(shape.batch, index), (shared ? 0 : client * count) + column);
          sum += x * y;
          magnitude += std::fabs(x * y);
        }
      }
      wrong += !is_close(get(Type::kFloat64, dots.view.at(shape.batch, index), client), sum, 1e-13 * magnitude);
    }
  }
  expect(wrong == 0, std::string("dots ") + name_of(type) + " " + name_of(others_type));
}

void check_finite(Type type) {
  const std::int64_t clients = 300;
  const Shape shape = shape_of({2}, clients, with_many({3, 0, 20}));
  std::vector<Array> updates;
  for (const std::int64_t count : shape.coordinates) {
    updates.emplace_back(type, shape.batch, clients * count).fill([](std::int64_t) {
      const double bad[] = {INFINITY, -INFINITY, NAN, -NAN};
      return random_bits() % 50 == 0 ? bad[random_bits() % 4] : 60000 * normal() / 8;
    });
  }
  Array finite(Type::kBool, shape.batch, clients);
  run("finite", FiniteClientsProblem{shape, views_of(updates), finite.view}, {&finite});
  int wrong = 0;
  for (std::int64_t index = 0; index < shape.batch.count; ++index) {
    for (std::int64_t client = 0; client < clients; ++client) {
      bool expected = true;
      for (std::size_t leaf = 0; leaf < updates.size(); ++leaf) {
        const std::int64_t count = shape.coordinates[leaf];
        for (std::int64_t i = 0; i < count; ++i) {
          expected &= std::isfinite(get(type, updates[leaf].view.at(shape.batch, index), client * count + i));
        }
      }
      wrong += (get(Type::kBool, finite.view.at(shape.batch, index), client) != 0) != expected;
    }
  }
  expect(wrong == 0, std::string("finite ") + name_of(type));
}

// ---- Between clients
// --------------------------------------------------------------------------------------------------

// The elements of one client over all leaves.
std::vector<double> client_of(const std::vector<Array>& leaves, const Shape& shape, std::int64_t index,
                              std::int64_t client) {
  std::vector<double> values;
  for (std::size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    for (std::int64_t column = 0; column < shape.coordinates[leaf]; ++column) {
      const View& view = leaves[leaf].view;
      values.push_back(get(view.type, view.at(shape.batch, index), client * shape.coordinates[leaf] + column));
    }
  }
  return values;
}

void check_pairs(Type type, std::int64_t clients, bool squares, bool masked, std::vector<std::int64_t> batch) {
  const Shape shape = shape_of(std::move(batch), clients, {1, 17000, 0, 33});
  const std::string what = std::string("pairs ") + name_of(type) + " n=" + std::to_string(clients);
  std::vector<Array> updates, others;
  for (const std::int64_t coordinates : shape.coordinates) {
    updates.emplace_back(type, shape.batch, clients * coordinates, 0x1).fill([](std::int64_t) { return normal(); });
    others.emplace_back(type, shape.batch, clients * coordinates, 0x2).fill([](std::int64_t) { return normal(); });
  }
  put(type, NAN, updates[3].view.data, 5);  // of the first client
  Array where(Type::kBool, shape.batch, clients, 0x3);
  where.fill([&](std::int64_t) { return random_bits() % 3 != 0; });
  PairsProblem problem;
  problem.shape = shape;
  problem.updates = views_of(updates);
  problem.others = squares ? problem.updates : views_of(others);
  problem.squares = squares;
  if (masked) problem.where = where.view;
  problem.first_block = first_blocks(shape);
  problem.segments = std::min<std::int64_t>(problem.first_block.back(), 3);
  Array pairs(accumulator(type), shape.batch, clients * clients);
  std::vector<double> partials(shape.batch.count * problem.segments * clients * clients, NAN);
  problem.pairs = pairs.view;
  problem.partials = partials.data();
  run(what, problem, {&pairs});
  int wrong = 0;
  for (std::int64_t index = 0; index < shape.batch.count; ++index) {
    for (std::int64_t i = 0; i < clients; ++i) {
      for (std::int64_t j = 0; j < clients; ++j) {
        const auto present = [&](std::int64_t client) {
          return !masked || get(Type::kBool, where.view.at(shape.batch, index), client) != 0;
        };
        const std::vector<double> x = client_of(updates, shape, index, i), y = client_of(updates, shape, index, j);
        const std::vector<double> u = client_of(others, shape, index, i), v = client_of(others, shape, index, j);
        long double sum = 0, magnitude = 0;
        for (std::size_t k = 0; k < x.size(); ++k) {
          const long double term = static_cast<long double>(x[k] - y[k]) * (squares ? x[k] - y[k] : u[k] - v[k]);
          sum += term;
          magnitude += std::fabs(term);
        }
        double expected = static_cast<double>(sum);
        if (squares && i != j && std::isnan(sum)) expected = INFINITY;
        if (!squares && i == j) expected = 0;
        if (!present(i) || !present(j)) expected = squares ? INFINITY : 0;
        const double got = get(accumulator(type), pairs.view.at(shape.batch, index), i * clients + j);
        wrong += !is_close(got, expected, 40 * epsilon_of(accumulator(type)) * static_cast<double>(magnitude));
      }
    }
  }
  expect(wrong == 0, what + ": " + std::to_string(wrong) + " wrong");
}

void check_mix(Type type, std::int64_t clients, std::int64_t rows, Type mixed_type, std::vector<std::int64_t> batch) {
  const Shape shape = shape_of(std::move(batch), clients, {1, 600, 0, 5});
  std::vector<Array> updates, mixed;
  for (const std::int64_t coordinates : shape.coordinates) {
    updates.emplace_back(type, shape.batch, clients * coordinates, 0x1).fill([](std::int64_t) { return normal(); });
    mixed.emplace_back(mixed_type, shape.batch, rows * coordinates);
  }
  put(type, NAN, updates[3].view.data, 0);  // of the first client, whom only the last row has
  Array mixing(accumulator(type), shape.batch, rows * clients, 0x2);
  mixing.fill([&](std::int64_t i) {
    const std::int64_t row = i / clients % rows;
    return i % clients == 0 ? row == rows - 1 : random_bits() % 3 == 0 ? 0 : normal();
  });
  MixProblem problem{shape, rows, views_of(updates), mixing.view, views_of(mixed)};
  run("mix", problem, pointers(mixed));
  int wrong = 0;
  for (std::int64_t index = 0; index < shape.batch.count; ++index) {
    for (std::int64_t row = 0; row < rows; ++row) {
      std::vector<double> expected(606, 0), magnitude(606, 0);
      for (std::int64_t client = 0; client < clients; ++client) {
        const double c = get(accumulator(type), mixing.view.at(shape.batch, index), row * clients + client);
        const std::vector<double> x = client_of(updates, shape, index, client);
        for (std::size_t k = 0; c != 0 && k < x.size(); ++k) {
          expected[k] += c * x[k];
          magnitude[k] += std::fabs(c * x[k]);
        }
      }
      const std::vector<double> got = client_of(mixed, shape, index, row);
      for (std::size_t k = 0; k < got.size(); ++k) {
        const double slack = (clients + 2) * epsilon_of(accumulator(type)) * magnitude[k] +
                             epsilon_of(mixed_type) * std::fabs(expected[k]) + 1e-7;
        wrong += !is_close(got[k], expected[k], slack);
      }
    }
  }
  expect(wrong == 0, std::string("mix ") + name_of(type) + ": " + std::to_string(wrong) + " wrong");
}

void check_step(Type type, std::int64_t clients, bool masked, std::vector<std::int64_t> batch) {
  const Shape shape = shape_of(std::move(batch), clients, {1, 17000, 0, 33});
  const Type sum_type = accumulator(type);
  std::vector<Array> updates, center, moved;
  for (const std::int64_t coordinates : shape.coordinates) {
    updates.emplace_back(type, shape.batch, clients * coordinates, 0x1).fill([](std::int64_t) { return normal(); });
    center.emplace_back(sum_type, shape.batch, coordinates, 0x2).fill([](std::int64_t) { return normal(); });
    moved.emplace_back(sum_type, shape.batch, coordinates);
  }
  put(type, NAN, updates[3].view.data, 5);  // of the first client, whose weight is 0
  Array weights(sum_type, shape.batch, clients, 0x3), where(Type::kBool, shape.batch, clients, 0x1);
  weights.fill([&](std::int64_t i) { return i % clients == 0 ? 0 : normal() / static_cast<double>(clients); });
  where.fill([&](std::int64_t) { return random_bits() % 3 != 0; });
  StepProblem problem;
  problem.shape = shape;
  problem.updates = views_of(updates);
  problem.center = views_of(center);
  problem.weights = weights.view;
  if (masked) problem.where = where.view;
  problem.moved = views_of(moved);
  Array distances(sum_type, shape.batch, clients);
  problem.distances = distances.view;
  problem.first_block = first_blocks(shape);
  std::vector<double> partials(shape.batch.count * clients * problem.first_block.back(), NAN);
  problem.partials = partials.data();
  std::vector<Array*> results = pointers(moved);
  results.push_back(&distances);
  run("step", problem, results);
  int wrong = 0;
  for (std::int64_t index = 0; index < shape.batch.count; ++index) {
    const std::vector<double> start = client_of(center, shape, index, 0);
    std::vector<double> expected = start;
    const auto present = [&](std::int64_t client) {
      return !masked || get(Type::kBool, where.view.at(shape.batch, index), client) != 0;
    };
    for (std::int64_t client = 0; client < clients; ++client) {
      const double weight = get(sum_type, weights.view.at(shape.batch, index), client);
      const std::vector<double> x = client_of(updates, shape, index, client);
      for (std::size_t k = 0; weight != 0 && present(client) && k < x.size(); ++k) {
        expected[k] += weight * (x[k] - start[k]);
      }
    }
    const std::vector<double> got = client_of(moved, shape, index, 0);
    const double epsilon = epsilon_of(sum_type);
    for (std::size_t k = 0; k < got.size(); ++k) {
      wrong += !is_close(got[k], expected[k], 8 * static_cast<double>(clients + 4) * epsilon);
    }
    for (std::int64_t client = 0; client < clients; ++client) {
      long double square = 0;
      const std::vector<double> x = client_of(updates, shape, index, client);
      for (std::size_t k = 0; k < x.size(); ++k) square += static_cast<long double>(x[k] - got[k]) * (x[k] - got[k]);
      const auto root = static_cast<double>(std::sqrt(square));
      const double distance = !present(client) ? 0 : std::isnan(root) ? INFINITY : root;
      wrong +=
          !is_close(get(sum_type, distances.view.at(shape.batch, index), client), distance, 4 * epsilon * distance);
    }
  }
  expect(wrong == 0, std::string("step ") + name_of(type) + ": " + std::to_string(wrong) + " wrong");
}

void check_between_clients(Type type) {
  for (const std::int64_t clients : {1, 3, 40}) {
    check_pairs(type, clients, true, false, {});
    check_pairs(type, clients, clients == 3, true,
                clients == 3 ? std::vector<std::int64_t>{2, 3} : std::vector<std::int64_t>{});
    check_pairs(type, clients, false, false, {});
    check_mix(type, clients, clients + 1, accumulator(type), {});
    check_step(type, clients, clients != 3, {});
  }
  check_mix(type, 5, 9, Type::kBFloat16, {2, 3});
  check_step(type, 5, true, {2, 3});
}

int main_of_test(bool brief) {
  constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
  for (const Type type : kTypes) {
    check_sums(type);
    check_stack(type, 3, {});
    check_stack(type, 150, {2});
    check_finite(type);
    check_between_clients(type);
    check_reductions(type, type, false, true, {});
    check_reductions(type, type, false, true, {2});
    for (const Type others : kTypes) check_reductions(type, others, others == type, false, {2});
    check_order_statistics(type, brief);
    std::printf("%s: %d passed, %d failed\n", name_of(type), passed, failed);
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace cuda
}  // namespace fedfuse

int main(int argc, char** argv) { return fedfuse::cuda::main_of_test(argc > 1 && std::strcmp(argv[1], "0") != 0); }
