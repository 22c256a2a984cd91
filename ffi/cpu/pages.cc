#include "cpu/pages.h"

#include <algorithm>
#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <string>
#endif

namespace fedfuse {
namespace {

constexpr std::uintptr_t kPage = std::uintptr_t{1} << 12;
constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;

// Adds to spans in the order of their addresses. The allocator has a few bytes of its own between two arrays.
void join(const Span& span, std::vector<Span>* spans) {
  if (!spans->empty() && span.begin < spans->back().end + kPage) {
    spans->back().end = std::max(spans->back().end, span.end);
  } else {
    spans->push_back(span);
  }
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1: newer than many a C library's headers

// One thread makes huge pages for all, and the system has it wait for them one by one; more threads than these (a
// guess: two were tried) would sooner have faulted in small ones, side by side.
constexpr std::int64_t kMostThreadsToWait = 8;

void advise(const Span& span, int advice) {
  madvise(reinterpret_cast<void*>(span.begin), span.end - span.begin, advice);
}

// Huge pages of which some small ones are there, but fewer than half.
std::vector<Span> begun_pages(const Span& span) {
  constexpr std::ptrdiff_t kSmallPages = kHugePage / kPage;
  std::vector<unsigned char> is_there((span.end - span.begin) / kPage);
  if (sysconf(_SC_PAGESIZE) != static_cast<long>(kPage) ||
      mincore(reinterpret_cast<void*>(span.begin), span.end - span.begin, is_there.data()) != 0) {
    return {};
  }
  std::vector<Span> begun;
  auto small = is_there.begin();
  for (std::uintptr_t page = span.begin; page < span.end; page += kHugePage, small += kSmallPages) {
    const auto there = std::count_if(small, small + kSmallPages, [](unsigned char flags) { return (flags & 1) != 0; });
    if (there > 0 && there < kSmallPages / 2) join({page, page + kHugePage}, &begun);
  }
  return begun;
}

#endif

}  // namespace

bool huge_pages_are_off() {
#if defined(__linux__)
  static const bool are_off = [] {
    std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string modes;
    return std::getline(setting, modes) && modes.find("[never]") != std::string::npos;
  }();
  return are_off;
#else
  return true;
#endif
}

std::vector<Span> huge_pages(const std::vector<Buffer>& results) {
  std::uintptr_t bytes = 0;
  for (const Buffer& result : results) bytes += bytes_of(result);
  if (bytes < kHugePage) return {};
  std::vector<Span> sorted;
  for (const Buffer& result : results) {
    const auto begin = reinterpret_cast<std::uintptr_t>(result.data);
    sorted.push_back({begin, begin + bytes_of(result)});
  }
  std::sort(sorted.begin(), sorted.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<Span> joined;
  for (const Span& result : sorted) join(result, &joined);
  std::vector<Span> whole;
  for (const Span& span : joined) {
    const std::uintptr_t begin = (span.begin + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t end = span.end / kHugePage * kHugePage;
    if (begin < end) whole.push_back({begin, end});
  }
  return whole;
}

void prefer_huge_pages([[maybe_unused]] const std::vector<Buffer>& results, [[maybe_unused]] std::int64_t threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  for (const Span& span : huge_pages(results)) {
    advise(span, MADV_HUGEPAGE);
    // The allocator has written its few bytes between two arrays already. Where one small page is there, the system
    // gives out small ones only, unless it is told to make a huge one of them, which it does whatever its settings.
    if (threads > kMostThreadsToWait || huge_pages_are_off()) continue;
    for (const Span& begun : begun_pages(span)) advise(begun, kCollapse);
  }
#endif
}

}  // namespace fedfuse
