#include "cpu/executor.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string>
#include <utility>

namespace fedfuse {
namespace {

// Below this, waking another thread costs more than it saves.
constexpr std::int64_t kSerialCost = 1 << 20;

// Shared by all threads that work on one call; the last one to let go frees it.
struct State {
  State(Work the_work) : work(std::move(the_work)), promise(work.tasks) {}

  Work work;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> unfinished{work.tasks};
  // Counts tasks, not threads: a thread that the pool wakes only after the work is done keeps nobody waiting.
  xla::ffi::CountDownPromise promise;

  // Takes tasks until there are none left.
  void help() {
    for (std::int64_t task = next++; task < work.tasks; task = next++) {
      xla::ffi::Error error = attempt([&] { work.run(task); });
      if (--unfinished == 0 && work.finish && error.success()) error = attempt(work.finish);
      promise.CountDown(1, error);
    }
  }

  // An exception must not leave a task: on a thread of the pool it would end the process.
  template <typename Function>
  static xla::ffi::Error attempt(const Function& function) {
    try {
      function();
      return xla::ffi::Error::Success();
    } catch (const std::exception& error) {
      return xla::ffi::Error::Internal(std::string("fedfuse: ") + error.what());
    }
  }
};

}  // namespace

xla::ffi::Future failed(xla::ffi::Error error) {
  xla::ffi::Promise promise;
  xla::ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

xla::ffi::Future execute(xla::ffi::ThreadPool& pool, Work work) {
  if (work.tasks == 0) {
    // Nothing to run, such as leaves without coordinates; there may be something to finish.
    work.tasks = 1;
    work.run = [](std::int64_t) {};
  }
  const bool is_serial = work.cost < kSerialCost;
  auto state = std::make_shared<State>(std::move(work));
  xla::ffi::Future future(state->promise);
  if (!is_serial) {
    const std::int64_t helpers = std::min<std::int64_t>(pool.num_threads(), state->work.tasks) - 1;
    for (std::int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([state] { state->help(); });
  }
  state->help();
  return future;
}

}  // namespace fedfuse
