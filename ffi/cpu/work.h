// A problem cut into stages of tasks that do not depend on each other. Who runs them, and on how many threads, is not
// known here.
#ifndef FEDFUSE_CPU_WORK_H_
#define FEDFUSE_CPU_WORK_H_

#include <cstdint>
#include <functional>
#include <memory>

namespace fedfuse {

struct Work {
  std::int64_t tasks = 0;
  std::function<void(std::int64_t)> run;  // one task; from any thread, in any order
  std::function<void()> finish;           // once, after all of them; may be empty
  // Roughly what the tasks cost in all, in bytes streamed: too little is not worth a second thread.
  std::int64_t cost = 0;
  // What begins only when all of this is finished; may be null.
  std::shared_ptr<Work> next;
};

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_WORK_H_
