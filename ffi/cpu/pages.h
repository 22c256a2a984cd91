// Memory that is about to be written for the first time.
#ifndef FEDFUSE_CPU_PAGES_H_
#define FEDFUSE_CPU_PAGES_H_

#include <cstdint>
#include <vector>

#include "contract/buffers.h"

namespace fedfuse {

// Addresses from `begin` to before `end`.
struct Span {
  std::uintptr_t begin;
  std::uintptr_t end;
};

// Whether whoever runs this machine wants no huge pages.
bool huge_pages_are_off();

// The huge pages that lie within one result, or within several that follow each other with next to nothing in between.
std::vector<Span> huge_pages(const std::vector<Buffer>& results);

// Asks for huge pages under large results, which `threads` threads will write. XLA hands out fresh memory, and faulting
// it in 4 KB at a time costs many times what writing it does. A hint: where the system does not take it, nothing
// changes.
void prefer_huge_pages(const std::vector<Buffer>& results, std::int64_t threads);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_PAGES_H_
