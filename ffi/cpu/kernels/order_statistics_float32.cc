// Order statistics of float32, for the instruction set FEDFUSE_ISA.
#include "cpu/kernels/order_statistics_impl.h"

namespace fedfuse {
namespace FEDFUSE_ISA {

extern const OrderStatisticKernels order_statistics_float32 = OrderStatistics<Type::kFloat32>::kKernels;

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
