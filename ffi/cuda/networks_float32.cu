#include "cuda/network_kernels.h"

namespace fedfuse {
namespace cuda {

template <>
OrderKernel network_kernel<Type::kFloat32>(std::int64_t clients, std::int64_t trim) {
  using Sort = NetworkSizes<4, 8, 12, 16, 24, 32, 48, 64, 96, 128>;
  using Median = NetworkSizes<8, 16, 32, 48, 64, 80, 96, 112, 128>;
  using TrimmedMean = NetworkSizes<10, 16, 20, 32, 48, 64, 80, 96, 112, 128>;
  return choose_network_kernel<Type::kFloat32, Sort, Median, TrimmedMean>(clients, trim);
}

}  // namespace cuda
}  // namespace fedfuse
