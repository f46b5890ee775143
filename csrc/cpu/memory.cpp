// Large tensors in large pages: a fresh one costs a page fault for each page that is first written.
#include "../pyft.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

pyft_status pyft_cpu_use_huge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Advice: where it cannot be followed nothing is lost.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
  return PYFT_OK;
}
