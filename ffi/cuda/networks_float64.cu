#include "cuda/network_kernels.h"

namespace fedfuse {
namespace cuda {

template <>
OrderKernel network_kernel<Type::kFloat64>(std::int64_t clients, std::int64_t trim) {
  // Values take two registers each and a comparison six instructions: few networks, and none for more clients.
  using Sort = NetworkSizes<4, 8, 16, 24, 32, 48, 64, 96>;
  using Median = NetworkSizes<64, 96>;
  using TrimmedMean = NetworkSizes<64, 96>;
  return choose_network_kernel<Type::kFloat64, Sort, Median, TrimmedMean>(clients, trim);
}

}  // namespace cuda
}  // namespace fedfuse
