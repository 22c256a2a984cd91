// The fused server optimizers: the weighted mean, whether the step along it stays finite, and the step.
#include "contract/server.h"
#include "cuda/clients.h"
#include "cuda/elements.h"
#include "cuda/operations.h"

namespace fedfuse {
namespace cuda {
namespace {

// A thread for each element of the batch: whether somebody takes part; or, at the end, how many steps were taken.
template <bool kCounts>
struct Rounds {
  struct Parameters {
    Batch batch;
    std::int64_t clients;
    std::int64_t work;
    View where;
    std::int32_t* accepted;
    View old_step;
    View new_step;
  };
  using Shared = Nothing;

  static constexpr int kThreads = 128;

  static FEDFUSE_DEVICE void run(const Parameters& p, Shared&, std::int64_t task) {
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t batch = task * kThreads + thread;
      if (batch >= p.batch.count) return;
      if constexpr (kCounts) {
        const std::int32_t old = *reinterpret_cast<const std::int32_t*>(p.old_step.at(p.batch, batch));
        *reinterpret_cast<std::int32_t*>(p.new_step.at(p.batch, batch)) = next_step(old, p.accepted[batch]);
      } else {
        const std::uint8_t* const where = where_of(p.where, p.batch, batch);
        bool somebody = where == nullptr;
        for (std::int64_t client = 0; !somebody && client < p.clients; ++client) somebody = where[client] != 0;
        p.accepted[batch] = somebody ? 1 : 0;
      }
    });
  }
};

struct StepOptions {
  ServerRule rule;
  View rates[4];
  std::int32_t* accepted;
};

// Operands: parameters and both moments, the mean, then the new parameters and moments, which may be the old ones. A
// pass that judges writes nothing but a refusal, where something new would not be finite; whoever writes it, writes the
// same.
template <Type type, bool kJudges>
struct Step {
  using Bits = typename Element<type>::Bits;
  using Real = typename Element<type>::Accumulator;
  using Elements = Pack<Bits>;
  using Reals = Pack<Real>;
  using Parameters = cuda::Parameters<7, StepOptions>;
  using Shared = Nothing;

  static constexpr bool kStreams = true;
  static constexpr int kThreads = 256;
  static constexpr int kColumns = Elements::kSize;  // a thread's
  static constexpr int kTileColumns = kThreads * kColumns;

  template <typename Table>
  static FEDFUSE_DEVICE void run(const Table& p, Shared&, std::int64_t task) {
    const Tile tile = locate(p, task, kTileColumns);
    const auto params = [&](int operand) {
      return reinterpret_cast<Bits*>(operand_data(p, tile, operand, 1, sizeof(Bits))) + tile.begin;
    };
    const auto reals = [&](int operand) {
      return reinterpret_cast<Real*>(operand_data(p, tile, operand, 1, sizeof(Real))) + tile.begin;
    };
    const Bits* const param = params(0);
    const Real *const first = reals(1), *const second = reals(2), *const delta = reals(3);
    Bits* const new_param = params(4);
    Real *const new_first = reals(5), *const new_second = reals(6);
    const auto rate = [&](int index) {
      const View& view = p.options.rates[index];
      return load_as<Real>(view.type, view.at(p.batch, tile.batch), 0);
    };
    const Rates<Real> rates = {rate(0), rate(1), rate(2), rate(3)};
    const bool accepted = p.options.accepted[tile.batch] != 0;
    if (kJudges && !accepted) return;
    const bool params_aligned = is_aligned(param, kPackBytes) && is_aligned(new_param, kPackBytes);
    const bool reals_aligned = is_aligned(first, kPackBytes) && is_aligned(second, kPackBytes) &&
                               is_aligned(delta, kPackBytes) && is_aligned(new_first, kPackBytes) &&
                               is_aligned(new_second, kPackBytes);
    Team<kThreads> team;
    team.each([&](int thread, Nothing&) {
      const std::int64_t column = thread * kColumns;
      const std::int64_t columns = tile.columns - column;
      if (columns <= 0) return;
      Elements values = Elements::load(param + column, params_aligned, columns);
      bool fine = true;
      for (int i = 0; i < kColumns; i += Reals::kSize) {
        Reals m = Reals::load(first + column + i, reals_aligned, columns - i);
        Reals v = Reals::load(second + column + i, reals_aligned, columns - i);
        const Reals d = Reals::load(delta + column + i, reals_aligned, columns - i);
        for (int j = 0; accepted && j < Reals::kSize; ++j) {
          const ServerCoordinate<Real> old = {Element<type>::widen(values.elements[i + j]), m.elements[j],
                                              v.elements[j]};
          const ServerCoordinate<Real> updated = step(p.options.rule, rates, old, d.elements[j]);
          values.elements[i + j] = Element<type>::narrow(updated.param);
          m.elements[j] = updated.first;
          v.elements[j] = updated.second;
          if constexpr (kJudges) {
            const auto rounded = static_cast<Real>(Element<type>::widen(values.elements[i + j]));
            const bool counts = i + j < columns;
            const auto overflow = static_cast<Real>(__builtin_inf());
            fine &= !counts | stays_finite<Real>({rounded, updated.first, updated.second}, overflow);
          }
        }
        if constexpr (!kJudges) {
          m.store(new_first + column + i, reals_aligned, columns - i);
          v.store(new_second + column + i, reals_aligned, columns - i);
        }
      }
      if constexpr (!kJudges) values.store(new_param + column, params_aligned, columns);
      if (!fine) p.options.accepted[tile.batch] = 0;
    });
  }

  static FEDFUSE_DEVICE ServerCoordinate<Real> step(ServerRule rule, const Rates<Real>& rates,
                                                    const ServerCoordinate<Real>& old, Real delta) {
    switch (rule) {
      case ServerRule::kAvgM:
        return server_step<ServerRule::kAvgM, Real>(rates, old, delta);
      case ServerRule::kAdagrad:
        return server_step<ServerRule::kAdagrad, Real>(rates, old, delta);
      case ServerRule::kAdam:
        return server_step<ServerRule::kAdam, Real>(rates, old, delta);
      default:
        return server_step<ServerRule::kYogi, Real>(rates, old, delta);
    }
  }
};

template <bool kJudges>
std::string enqueue_steps(const ServerUpdateProblem& problem, Stream stream) {
  return for_each_type([&](auto type) {
    using Body = Step<decltype(type)::value, kJudges>;
    typename Body::Parameters p{};
    p.options.rule = problem.rule;
    p.options.rates[0] = problem.learning_rate;
    p.options.rates[1] = problem.b1;
    p.options.rates[2] = problem.b2;
    p.options.rates[3] = problem.tau;
    p.options.accepted = problem.accepted;
    return for_each_table(
        problem.shape,
        {&problem.old.params, &problem.old.first, &problem.old.second, &problem.mean.reduced, &problem.updated.params,
         &problem.updated.first, &problem.updated.second},
        Body::kTileColumns, 1, &p, [&](const typename Body::Parameters& table) { return launch<Body>(table, stream); },
        [&](std::size_t leaf) { return problem.old.params[leaf].type == type; });
  });
}

template <bool kCounts>
std::string enqueue_rounds(const ServerUpdateProblem& problem, Stream stream) {
  typename Rounds<kCounts>::Parameters p{};
  p.batch = problem.shape.batch;
  p.clients = problem.shape.clients;
  p.work = (p.batch.count + Rounds<kCounts>::kThreads - 1) / Rounds<kCounts>::kThreads;
  p.where = problem.mean.where;
  p.accepted = problem.accepted;
  p.old_step = problem.old.step;
  p.new_step = problem.updated.step;
  return launch<Rounds<kCounts>>(p, stream);
}

}  // namespace

std::string enqueue(const ServerUpdateProblem& problem, Stream stream) {
  std::string error = enqueue(problem.mean, stream);
  if (error.empty()) error = enqueue_rounds<false>(problem, stream);
  if (error.empty()) error = enqueue_steps<true>(problem, stream);
  if (error.empty()) error = enqueue_rounds<true>(problem, stream);
  if (error.empty()) error = enqueue_steps<false>(problem, stream);
  return error;
}

}  // namespace cuda
}  // namespace fedfuse
