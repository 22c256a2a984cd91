// Tests that every task of some work is run once, its stages one after the other, whenever the pool's threads come.
#include "cpu/executor.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fedfuse {
namespace {

// Where somebody waits in vain, the test ends too.
constexpr unsigned kMostSeconds = 60;

constexpr std::int64_t kWorthSharing = std::int64_t{1} << 40;  // bytes

int passed = 0, failures = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failures);
  if (!condition && failures <= 20) std::printf("FAILED: %s\n", what.c_str());
  std::fflush(stdout);
}

// XLA's thread pool as a handler sees it, of threads that begin when they are told to.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    api_.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      Pool& pool = *reinterpret_cast<Pool*>(args->ctx);
      pool.schedule([task = args->task, data = args->data] { task(data); });
      return nullptr;
    };
    api_.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = reinterpret_cast<Pool*>(args->ctx)->threads_;
      return nullptr;
    };
  }
  Pool(const Pool&) = delete;
  virtual ~Pool() = default;

  // What `execute` promises: whether it is kept already, and how.
  struct Outcome {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_ready = false;
    std::string error;
    xla::ffi::ErrorCode code = xla::ffi::ErrorCode::kOk;

    std::string wait() {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [&] { return is_ready; });
      return error;
    }
  };

  std::shared_ptr<Outcome> run(Work work) {
    xla::ffi::DiagnosticEngine diagnostic;
    auto* const context = reinterpret_cast<XLA_FFI_ExecutionContext*>(this);
    auto pool = *xla::ffi::CtxDecoding<xla::ffi::ThreadPool>::Decode(&api_, context, diagnostic);
    auto outcome = std::make_shared<Outcome>();
    execute(pool, std::move(work)).OnReady([outcome](const std::optional<xla::ffi::Error>& error) {
      const std::lock_guard<std::mutex> lock(outcome->mutex);
      outcome->is_ready = true;
      if (error.has_value()) {
        outcome->error = error->message();
        outcome->code = error->errc().value();
      }
      outcome->changed.notify_all();
    });
    return outcome;
  }

 private:
  virtual void schedule(std::function<void()> helper) = 0;

  const int threads_;
  XLA_FFI_Api api_ = {};
};

// Its threads run beside the caller.
class ParallelPool : public Pool {
 public:
  using Pool::Pool;
  ~ParallelPool() override {
    for (std::thread& thread : running_) thread.join();
  }

 private:
  void schedule(std::function<void()> helper) override { running_.emplace_back(std::move(helper)); }

  std::vector<std::thread> running_;
};

// One of its threads does what there is to do before the caller begins; the others come when all is done. The caller
// is number 0.
class OneThreadPool : public Pool {
 public:
  OneThreadPool(int threads, int only) : Pool(threads), only_(only) {}
  ~OneThreadPool() override {
    for (const auto& helper : late_) helper();
  }

  int scheduled() const { return scheduled_; }

 private:
  void schedule(std::function<void()> helper) override {
    if (++scheduled_ == only_) {
      helper();
    } else {
      late_.push_back(std::move(helper));
    }
  }

  const int only_;
  int scheduled_ = 0;
  std::vector<std::function<void()>> late_;
};

// Work in stages, which writes down what is run.
class Record {
 public:
  explicit Record(const std::vector<int>& tasks) : finished_(tasks.size()) {
    for (int count : tasks) runs_.emplace_back(count);
  }

  Work work(std::size_t stage = 0) {
    Work work;
    work.tasks = static_cast<std::int64_t>(runs_[stage].size());
    work.cost = kWorthSharing;
    work.run = [this, stage](std::int64_t task) {
      if (stage > 0 && finished_[stage - 1] != 1) ++too_early_;
      // The last one takes long enough for others to run ahead, if they may.
      const bool is_last = task + 1 == static_cast<std::int64_t>(runs_[stage].size());
      if (is_last) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++runs_[stage].at(static_cast<std::size_t>(task));
    };
    work.finish = [this, stage] {
      for (const std::atomic<int>& runs : runs_[stage]) too_early_ += runs != 1;
      ++finished_[stage];
    };
    if (stage + 1 < runs_.size()) work.next = std::make_shared<Work>(this->work(stage + 1));
    return work;
  }

  bool is_complete() const {
    const auto once = [](const std::atomic<int>& count) { return count == 1; };
    return too_early_ == 0 && std::all_of(finished_.begin(), finished_.end(), once) &&
           std::all_of(runs_.begin(), runs_.end(),
                       [&](const auto& runs) { return std::all_of(runs.begin(), runs.end(), once); });
  }

 private:
  std::vector<std::vector<std::atomic<int>>> runs_;
  std::vector<std::atomic<int>> finished_;
  std::atomic<int> too_early_{0};
};

const std::vector<std::vector<int>> kStages = {{0}, {1}, {2}, {3}, {7}, {64}, {1000}, {0, 5}, {5, 0}, {3, 200, 1, 2}};

void test_each_task_once() {
  for (const std::vector<int>& tasks : kStages) {
    for (int threads : {0, 1, 2, 3, 8}) {
      const std::string what = std::to_string(tasks[0]) + " tasks and more for " + std::to_string(threads) + " threads";
      for (int only = 0; only < std::max(threads, 1); ++only) {
        Record record(tasks);
        {
          OneThreadPool pool(threads, only);
          const auto outcome = pool.run(record.work());
          expect(outcome->is_ready && outcome->error.empty(), what + ", waiting for nobody");
          const int most = *std::max_element(tasks.begin(), tasks.end());
          expect(pool.scheduled() == std::max(std::min(threads, most), 1) - 1, what + ": no more helpers than tasks");
        }
        expect(record.is_complete(), what + ", all done by number " + std::to_string(only));
      }
      for (int repetition = 0; repetition < 20; ++repetition) {
        Record record(tasks);
        ParallelPool pool(threads);
        expect(pool.run(record.work())->wait().empty() && record.is_complete(), what);
      }
    }
  }
}

// A thread begins with neighbours of its own, and goes on with the next one's.
void test_order() {
  for (int threads : {1, 2, 3, 5}) {
    for (int tasks : {5, 6, 100}) {
      for (int only = 0; only < threads; ++only) {
        std::vector<std::int64_t> order;
        Work work;
        work.tasks = tasks;
        work.cost = kWorthSharing;
        work.run = [&](std::int64_t task) { order.push_back(task); };
        OneThreadPool(threads, only).run(std::move(work));
        std::vector<std::int64_t> wanted(static_cast<std::size_t>(tasks));
        std::iota(wanted.begin(), wanted.end(), 0);
        std::rotate(wanted.begin(), wanted.begin() + tasks * only / threads, wanted.end());
        expect(order == wanted, "the order of thread " + std::to_string(only) + " of " + std::to_string(threads));
      }
    }
  }
}

// One of the tasks throws: the others are counted, and nothing comes after them.
void test_failures() {
  for (int threads : {1, 2, 8}) {
    for (int bad : {0, 5, 49}) {
      std::atomic<int> runs_after{0};
      Work work;
      work.tasks = 50;
      work.cost = kWorthSharing;
      work.run = [&](std::int64_t task) {
        if (task == bad) throw std::runtime_error("a bad task");
      };
      work.finish = [&] { ++runs_after; };
      work.next = std::make_shared<Work>();
      work.next->tasks = 50;
      work.next->run = [&](std::int64_t) { ++runs_after; };
      ParallelPool pool(threads);
      expect(pool.run(std::move(work))->wait() == "fedfuse: a bad task", "the task's own words");
      expect(runs_after == 0, "nothing runs on what a failure left");
    }
    Record after({4});
    Work work;
    work.tasks = 3;
    work.cost = kWorthSharing;
    work.run = [](std::int64_t) {};
    work.finish = [] { throw std::runtime_error("a bad end"); };
    work.next = std::make_shared<Work>(after.work());
    ParallelPool pool(threads);
    expect(pool.run(std::move(work))->wait() == "fedfuse: a bad end" && !after.is_complete(), "a failure at the end");
  }
  // What XLA is told, at the handlers' edge as in a task.
  using xla::ffi::ErrorCode;
  const std::pair<std::function<void()>, ErrorCode> failures[] = {
      {[] { throw std::bad_alloc(); }, ErrorCode::kResourceExhausted},
      {[] { std::vector<int>().reserve(std::vector<int>().max_size() + 1); }, ErrorCode::kResourceExhausted},
      {[] { throw std::invalid_argument("blocks"); }, ErrorCode::kInvalidArgument},
      {[] { throw std::runtime_error("a bad task"); }, ErrorCode::kInternal},
  };
  for (const auto& [fail, code] : failures) {
    Work work;
    work.tasks = 1;
    work.run = [fail = fail](std::int64_t) { fail(); };
    const auto outcome = ParallelPool(1).run(std::move(work));
    outcome->wait();
    expect(outcome->code == code, "the code of a failure: " + outcome->error);
  }
  std::vector<std::int64_t> order;
  Work work;
  work.tasks = 9;
  work.run = [&](std::int64_t task) {
    order.push_back(task);
    if (task == 3) throw std::runtime_error("stop");
  };
  ParallelPool(1).run(std::move(work));
  expect(order == std::vector<std::int64_t>({0, 1, 2, 3}), "no task after one that failed");
}

void test_small_work_stays_with_the_caller() {
  Record record({8, 8});
  Work work = record.work();
  work.cost = work.next->cost = 1000;
  OneThreadPool pool(8, 0);
  const auto outcome = pool.run(std::move(work));
  expect(outcome->is_ready && record.is_complete() && pool.scheduled() == 0, "small work");
}

// What tasks refer to lives as long as somebody may come for them, and no longer.
void test_nothing_is_kept() {
  auto problem = std::make_shared<int>(0);
  {
    OneThreadPool pool(4, 0);
    Work work;
    work.tasks = 4;
    work.cost = kWorthSharing;
    work.run = [problem](std::int64_t) {};
    pool.run(std::move(work));
    expect(problem.use_count() > 1, "three threads are still to come");
  }
  expect(problem.use_count() == 1, "nobody is still to come");
}

}  // namespace
}  // namespace fedfuse

int main() {
  using namespace fedfuse;
  alarm(kMostSeconds);
  test_each_task_once();
  test_order();
  test_failures();
  test_small_work_stays_with_the_caller();
  test_nothing_is_kept();
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
