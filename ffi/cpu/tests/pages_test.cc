// Tests which memory huge pages are asked for, and that asking changes nothing in it.
#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace fedfuse {
namespace {

constexpr std::int64_t kSmallPage = 1 << 12, kHugePage = 1 << 21, kSmallPages = kHugePage / kSmallPage;

int passed = 0, failures = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failures);
  if (!condition) std::printf("FAILED: %s\n", what.c_str());
}

Buffer result_at(std::int64_t address, std::int64_t bytes) {
  return {reinterpret_cast<void*>(address), Type::kFloat32, {bytes / 4}};
}

// Results are addresses and bytes, the spans first and last huge pages.
void expect_pages(const std::vector<std::pair<std::int64_t, std::int64_t>>& results,
                  const std::vector<std::pair<std::uintptr_t, std::uintptr_t>>& pages, const std::string& what) {
  std::vector<Buffer> buffers;
  for (const auto& [address, bytes] : results) buffers.push_back(result_at(address, bytes));
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> found;
  for (const Span& span : huge_pages(buffers)) found.emplace_back(span.begin / kHugePage, span.end / kHugePage - 1);
  expect(found == pages, what);
}

void test_which_pages() {
  const std::int64_t ten = 10 * kHugePage, half = kHugePage / 2;
  expect_pages({}, {}, "there are no results");
  expect_pages({{ten, kHugePage - 4}}, {}, "too short for a page");
  expect_pages({{ten, kHugePage}}, {{10, 10}}, "exactly a page");
  expect_pages({{ten + 64, kHugePage}}, {}, "parts of two pages");
  expect_pages({{ten - 64, 3 * kHugePage}}, {{10, 11}}, "no page reaches beyond the result");
  expect_pages({{ten, 2 * kHugePage}, {2 * ten, kHugePage}}, {{10, 11}, {20, 20}}, "two results far from each other");
  expect_pages({{ten, half}, {ten + half, half}}, {{10, 10}}, "neighbours");
  expect_pages({{ten + half + 64, half}, {ten + kHugePage + 128, half}, {ten, half}}, {{10, 10}},
               "neighbours in another order, with a little in between");
  expect_pages({{ten, half}, {ten + half + kSmallPage, half}}, {}, "somebody else's page in between");
  expect_pages({{0, 0}, {ten, half}, {ten + 64, 0}, {ten + half, half}}, {{10, 10}}, "some have no elements");
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

constexpr std::int64_t kPages = 4;  // huge ones, of memory as the system hands it out
constexpr int kCollapse = 25;       // MADV_COLLAPSE

class Memory {
 public:
  Memory() {
    mapped_ = mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto address = reinterpret_cast<std::int64_t>(mapped_);
    begin_ = (address + kHugePage - 1) / kHugePage * kHugePage;
    madvise(data(), kBytes, MADV_NOHUGEPAGE);
  }
  Memory(const Memory&) = delete;
  ~Memory() { munmap(mapped_, kBytes + kHugePage); }

  std::int64_t begin() const { return begin_; }
  unsigned char* data() const { return reinterpret_cast<unsigned char*>(begin_); }

  // Small pages that the system has given out for a huge one.
  std::int64_t there(std::int64_t page) const {
    std::vector<unsigned char> flags(kSmallPages);
    mincore(data() + page * kHugePage, kHugePage, flags.data());
    return std::count_if(flags.begin(), flags.end(), [](unsigned char flag) { return (flag & 1) != 0; });
  }

 private:
  static constexpr std::int64_t kBytes = kPages * kHugePage;
  void* mapped_;
  std::int64_t begin_;
};

// An emulator may say that it did, and not do it.
bool system_makes_huge_pages() {
  const Memory memory;
  *memory.data() = 1;
  madvise(memory.data(), kHugePage, MADV_HUGEPAGE);
  madvise(memory.data(), kHugePage, kCollapse);
  return memory.there(0) == kSmallPages;
}

// Four results with 64 bytes of the allocator's before each, the last of which ends within the last page.
void test_pages_that_are_begun() {
  if (huge_pages_are_off() || !system_makes_huge_pages()) {
    std::puts("not tested: this system makes no huge pages of small ones");
    return;
  }
  constexpr std::int64_t kHeader = 64, kResult = kHugePage * 7 / 8, kResults = 4;
  for (const std::int64_t threads : {1, 1000}) {
    const Memory memory;
    std::vector<Buffer> results;
    for (std::int64_t i = 0; i < kResults; ++i) {
      std::fill_n(memory.data() + i * kResult, kHeader, 'a' + i);
      results.push_back(result_at(memory.begin() + i * kResult + kHeader, kResult - kHeader));
    }
    // More than half of the second page is there.
    for (std::int64_t i = 0; i < 300; ++i) memory.data()[kHugePage + i * kSmallPage] |= 1;
    const std::vector<std::int64_t> before{memory.there(0), memory.there(1), memory.there(2), memory.there(3)};
    prefer_huge_pages(results, threads);
    const std::string with = " with " + std::to_string(threads) + " threads";
    expect(memory.there(0) == before[0], "a page that is not whole is left alone" + with);
    expect(memory.there(1) == before[1], "a page that is nearly there is left alone" + with);
    expect(memory.there(2) == (threads == 1 ? kSmallPages : before[2]), "a page that is begun" + with);
    expect(memory.there(3) == before[3], "a page that others have a part of is left alone" + with);
    bool kept = true;
    for (std::int64_t i = 0; i < kResults; ++i) {
      for (std::int64_t byte = 0; byte < kHeader; ++byte) kept &= memory.data()[i * kResult + byte] == 'a' + i;
    }
    expect(kept, "what the allocator wrote is still there" + with);
  }
}

#else

void test_pages_that_are_begun() {}

#endif

}  // namespace
}  // namespace fedfuse

int main() {
  using namespace fedfuse;
  test_which_pages();
  test_pages_that_are_begun();
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
