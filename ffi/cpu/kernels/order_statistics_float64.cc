// Order statistics of float64, for the instruction set FEDFUSE_ISA.
#include "cpu/kernels/order_statistics_impl.h"

namespace fedfuse {
namespace FEDFUSE_ISA {

extern const OrderStatisticKernels order_statistics_float64 = OrderStatistics<Type::kFloat64>::kKernels;

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
