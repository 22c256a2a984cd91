#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace fedfuse {
namespace cuda {
namespace {

std::string to_text(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string compiler_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
}

std::string runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return to_text(version);
}

std::string driver_version() {
  int version = 0;
  // Without a driver this fails or gives 0: both mean that there is none.
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  return to_text(version);
}

std::string targets() { return FEDFUSE_CUDA_TARGETS; }

}  // namespace cuda
}  // namespace fedfuse
