#include "cpu/executor.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace fedfuse {
namespace {

// Below this, waking another thread costs more than it saves.
constexpr std::int64_t kSerialCost = 1 << 20;

struct Stage {
  explicit Stage(Work the_work) : work(std::move(the_work)) {
    if (work.tasks > 0) return;
    // Nothing to run, such as leaves without coordinates; there may be something to finish.
    work.tasks = 1;
    work.run = [](std::int64_t) {};
    unfinished = 1;
  }

  Work work;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> unfinished{work.tasks};
};

// Shared by all threads that work on one call; the last one to let go frees it.
class State {
 public:
  explicit State(Work work) {
    std::shared_ptr<Work> next = std::move(work.next);
    stages_.emplace_back(std::move(work));
    while (next != nullptr) {
      std::shared_ptr<Work> after = std::move(next->next);
      stages_.emplace_back(std::move(*next));
      next = std::move(after);
    }
    std::int64_t tasks = 0;
    for (const Stage& stage : stages_) {
      tasks += stage.work.tasks;
      cost_ += stage.work.cost;
      most_tasks_ = std::max(most_tasks_, stage.work.tasks);
    }
    promise_ = xla::ffi::CountDownPromise(tasks);
  }

  xla::ffi::Future future() const { return xla::ffi::Future(promise_); }
  std::int64_t cost() const { return cost_; }
  std::int64_t most_tasks() const { return most_tasks_; }

  // Takes tasks until there are none left.
  void help() {
    for (std::size_t stage = 0; stage < stages_.size(); ++stage) {
      if (stage > 0) wait_for(stage);
      help_with(stage);
    }
  }

 private:
  void help_with(std::size_t index) {
    Stage& stage = stages_[index];
    for (std::int64_t task = stage.next++; task < stage.work.tasks; task = stage.next++) {
      xla::ffi::Error error = xla::ffi::Error::Success();
      // After a failure, tasks are counted and no more.
      if (!failed_) error = attempt([&] { stage.work.run(task); });
      if (error.failure()) failed_ = true;
      if (--stage.unfinished == 0) {
        if (stage.work.finish && !failed_) error = attempt(stage.work.finish);
        if (error.failure()) failed_ = true;
        begin(index + 1);
      }
      promise_.CountDown(1, error);
    }
  }

  void begin(std::size_t stage) {
    if (stage == stages_.size()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      begun_ = stage;
    }
    has_begun_.notify_all();
  }

  // All tasks of the stage before are taken by now, and running.
  void wait_for(std::size_t stage) {
    std::unique_lock<std::mutex> lock(mutex_);
    has_begun_.wait(lock, [&] { return begun_ >= stage; });
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

  std::deque<Stage> stages_;
  std::int64_t cost_ = 0;
  std::int64_t most_tasks_ = 0;
  // Counts tasks, not threads: a thread that the pool wakes only after the work is done keeps nobody waiting.
  xla::ffi::CountDownPromise promise_;
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable has_begun_;
  std::size_t begun_ = 0;
};

}  // namespace

xla::ffi::Future failed(xla::ffi::Error error) {
  xla::ffi::Promise promise;
  xla::ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

xla::ffi::Future execute(xla::ffi::ThreadPool& pool, Work work) {
  auto state = std::make_shared<State>(std::move(work));
  xla::ffi::Future future = state->future();
  if (state->cost() >= kSerialCost) {
    const std::int64_t helpers = std::min<std::int64_t>(pool.num_threads(), state->most_tasks()) - 1;
    for (std::int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([state] { state->help(); });
  }
  state->help();
  return future;
}

}  // namespace fedfuse
