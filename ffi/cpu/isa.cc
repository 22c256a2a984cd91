#include "cpu/isa.h"

namespace fedfuse {
namespace {

#define FEDFUSE_KERNELS(isa)                                                                            \
  {                                                                                                     \
      #isa,                                                                                             \
      {&isa::linear_float32, &isa::linear_float64, &isa::linear_bfloat16, &isa::linear_float16},        \
      {&isa::order_statistics_float32, &isa::order_statistics_float64, &isa::order_statistics_bfloat16, \
       &isa::order_statistics_float16},                                                                 \
      &isa::noise,                                                                                      \
      &isa::server_rules,                                                                               \
      {isa::quantized_float32, isa::quantized_float64},                                                 \
  }

struct Isa {
  Kernels kernels;
  bool supported;
};

// The one table of instruction sets, best first. CMakeLists.txt has their compiler flags: whatever a flag allows has to
// be asked for here.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> kIsas = {
#if defined(__x86_64__)
      {FEDFUSE_KERNELS(avx512), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                    __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma") &&
                                    __builtin_cpu_supports("bmi2")},
      {FEDFUSE_KERNELS(avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")},
      {FEDFUSE_KERNELS(baseline), __builtin_cpu_supports("avx")},
#else
      {FEDFUSE_KERNELS(baseline), true},
#endif
  };
  return kIsas;
}

#undef FEDFUSE_KERNELS

const Kernels* best() {
  for (const Isa& isa : isas()) {
    if (isa.supported) return &isa.kernels;
  }
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* kernels = best();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

bool choose_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (isa.supported && name == isa.kernels.name) {
      chosen() = &isa.kernels;
      return true;
    }
  }
  return false;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.emplace_back(isa.kernels.name);
  }
  return names;
}

}  // namespace fedfuse
