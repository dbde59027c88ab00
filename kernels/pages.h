// Memory as the system maps it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sambay {

// Reads [begin, begin + bytes) of a mapped file into memory, if it is not there, in large pages where the file
// system has them: cores find more of their addresses at once, and read them a sixth faster. Asking is not enough,
// for what cores touch in turn is read ahead in small ones. What was in memory before stays as it is, and so does
// everything on other systems.
inline void map_large_pages(const void* begin, size_t bytes, const Pool& pool) {
#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_READ)
  constexpr uintptr_t kPage = 4096, kPiece = 8 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(begin) + bytes;
  if (madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) != 0) return;
  pool(static_cast<int64_t>((end - first + kPiece - 1) / kPiece), [&](int64_t piece) {
    const uintptr_t start = first + static_cast<uintptr_t>(piece) * kPiece;
    madvise(reinterpret_cast<void*>(start), end - start < kPiece ? end - start : kPiece, MADV_POPULATE_READ);
  });
#else
  static_cast<void>(begin);
  static_cast<void>(bytes);
  static_cast<void>(pool);
#endif
}

}  // namespace sambay
