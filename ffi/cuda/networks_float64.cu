#include "cuda/network_kernels.h"

namespace fedfuse {
namespace cuda {

template OrderKernel network_kernel<Type::kFloat64>(std::int64_t clients, std::int64_t trim);

}  // namespace cuda
}  // namespace fedfuse
