// Between floating types, rounding once.
#ifndef FEDFUSE_CPU_CONVERT_H_
#define FEDFUSE_CPU_CONVERT_H_

#include <cstdint>

#include "contract/types.h"

namespace fedfuse {

// `from` is any floating type when `to` is an accumulator type, and an accumulator type otherwise.
void convert(Type from_type, const void* from, Type to_type, void* to, std::int64_t count);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_CONVERT_H_
