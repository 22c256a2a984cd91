// Memory that is about to be written for the first time.
#ifndef FEDFUSE_CPU_PAGES_H_
#define FEDFUSE_CPU_PAGES_H_

#include <cstdint>

namespace fedfuse {

// Asks for huge pages under a large result. XLA hands out fresh memory, and faulting it in 4 KB at a time costs many
// times what writing it does. A hint: where the system does not take it, nothing changes.
void prefer_huge_pages(void* data, std::int64_t bytes);

}  // namespace fedfuse

#endif  // FEDFUSE_CPU_PAGES_H_
