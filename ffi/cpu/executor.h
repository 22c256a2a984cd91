// Runs work on XLA's own thread pool.
#ifndef FEDFUSE_CPU_EXECUTOR_H_
#define FEDFUSE_CPU_EXECUTOR_H_

#include "cpu/work.h"
#include "xla/ffi/api/ffi.h"

namespace fedfuse {

// Starts `work` and returns at once, or when it is done if it is too small to share. The calling thread takes its part
// of the tasks; it never waits for others, since it may itself be one of the pool's threads.
xla::ffi::Future execute(xla::ffi::ThreadPool& pool, Work work);

// A future that has failed already.
xla::ffi::Future failed(xla::ffi::Error error);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_EXECUTOR_H_
