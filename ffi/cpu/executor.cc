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
#include <vector>

#include "handlers/errors.h"

namespace fedfuse {
namespace {

// Below this, waking another thread costs more than it saves.
constexpr std::int64_t kSerialCost = 1 << 20;

constexpr std::size_t kCacheLineBytes = 64;

// Tasks in a row, to be taken one by one.
struct alignas(kCacheLineBytes) Range {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
};

// A thread has a range of its own, and helps with the others' after it: neighbouring tasks are neighbours in memory,
// and two threads that first write to one page have it cleared twice.
struct Stage {
  explicit Stage(Work the_work) : work(std::move(the_work)) {
    if (work.tasks > 0) return;
    // Nothing to run, such as leaves without coordinates; there may be something to finish.
    work.tasks = 1;
    work.run = [](std::int64_t) {};
    unfinished = 1;
  }

  void divide(std::int64_t threads) {
    ranges = std::vector<Range>(static_cast<std::size_t>(threads));
    for (std::int64_t thread = 0; thread < threads; ++thread) {
      ranges[thread].next = work.tasks * thread / threads;
      ranges[thread].end = work.tasks * (thread + 1) / threads;
    }
  }

  Work work;
  std::vector<Range> ranges;
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

  // Before anybody helps: so many threads will, if all of them come.
  void divide(std::int64_t threads) {
    for (Stage& stage : stages_) stage.divide(threads);
  }

  // Takes tasks until there are none left; `thread` is whose come first.
  void help(std::int64_t thread) {
    for (std::size_t stage = 0; stage < stages_.size(); ++stage) {
      if (stage > 0) wait_for(stage);
      const std::size_t ranges = stages_[stage].ranges.size();
      for (std::size_t range = 0; range < ranges; ++range) help_with(stage, (thread + range) % ranges);
    }
  }

 private:
  void help_with(std::size_t index, std::size_t range_index) {
    Stage& stage = stages_[index];
    Range& range = stage.ranges[range_index];
    for (std::int64_t task = range.next++; task < range.end; task = range.next++) {
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
      return error_of("fedfuse", error);
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
  std::int64_t threads = 1;
  if (state->cost() >= kSerialCost) threads = std::min<std::int64_t>(pool.num_threads(), state->most_tasks());
  threads = std::max<std::int64_t>(threads, 1);
  state->divide(threads);
  for (std::int64_t thread = 1; thread < threads; ++thread) pool.Schedule([state, thread] { state->help(thread); });
  state->help(0);
  return future;
}

}  // namespace fedfuse
