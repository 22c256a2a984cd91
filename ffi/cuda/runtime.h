// What the CUDA runtime says of itself and of the machine.
#ifndef FEDFUSE_CUDA_RUNTIME_H_
#define FEDFUSE_CUDA_RUNTIME_H_

#include <string>

namespace fedfuse {
namespace cuda {

// The versions compiled with and found here, such as "13.0"; "none" where there is no driver. None of these needs a
// GPU.
std::string compiler_version();
std::string runtime_version();
std::string driver_version();

// The compute capabilities that there is machine code for, such as "80 90"; there is PTX for the last.
std::string targets();

}  // namespace cuda
}  // namespace fedfuse

#endif  // FEDFUSE_CUDA_RUNTIME_H_
