// The instruction set chosen for this process, and its kernels.
#ifndef FEDFUSE_CPU_ISA_H_
#define FEDFUSE_CPU_ISA_H_

#include <string>
#include <vector>

#include "contract/types.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/noise.h"
#include "cpu/kernels/order_statistics.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/server.h"

namespace fedfuse {

struct Kernels {
  const char* name;
  // By Type, floating types only.
  const LinearKernels* linear[kNumTypes];
  const OrderStatisticKernels* order_statistics[kNumTypes];
  const NoiseKernels* noise;
  const ServerKernels* server_rules;
  // By the accumulator (float32, float64), each by Codes.
  const QuantizedKernels* quantized[2];
};

// The best set this processor supports, unless choose_isa() said otherwise.
const Kernels& kernels();

// Forces a set by name, for tests. False if there is none of that name here.
bool choose_isa(const std::string& name);

// The sets that are compiled in and that this processor supports, best first.
std::vector<std::string> supported_isas();

inline const LinearKernels& linear_kernels(Type type) { return *kernels().linear[static_cast<int>(type)]; }

inline const OrderStatisticKernels& order_statistic_kernels(Type type) {
  return *kernels().order_statistics[static_cast<int>(type)];
}

inline const QuantizedKernels& quantized_kernels(Type accumulator, Codes codes) {
  return kernels().quantized[accumulator == Type::kFloat64][static_cast<int>(codes)];
}

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_ISA_H_
