// Order statistics of bfloat16 and float16, which share their networks, for the instruction set FEDFUSE_ISA.
#include "cpu/kernels/order_statistics_impl.h"

namespace fedfuse {
namespace FEDFUSE_ISA {

extern const OrderStatisticKernels order_statistics_bfloat16 = OrderStatistics<Type::kBFloat16>::kKernels;
extern const OrderStatisticKernels order_statistics_float16 = OrderStatistics<Type::kFloat16>::kKernels;

}  // namespace FEDFUSE_ISA
}  // namespace fedfuse
