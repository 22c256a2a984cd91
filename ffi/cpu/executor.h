// Runs work on XLA's own thread pool.
#ifndef FEDFUSE_CPU_EXECUTOR_H_
#define FEDFUSE_CPU_EXECUTOR_H_

#include "cpu/work.h"
#include "xla/ffi/api/ffi.h"

namespace fedfuse {

// Starts `work` and returns at once, or when it is done if it is too small to share. The calling thread takes its part
// of the tasks. It may itself be one of the pool's threads, so nobody ever waits for a task that is not running yet:
// between two stages, only until other threads have done the ones they are at.
xla::ffi::Future execute(xla::ffi::ThreadPool& pool, Work work);

// A future that has failed already.
xla::ffi::Future failed(xla::ffi::Error error);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_EXECUTOR_H_
