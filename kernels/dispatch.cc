// Chooses the kernels that this machine can run.
#include "kernels.h"
#include "standard.h"

#if defined(SAMBAY_X86) && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace sambay {

namespace portable {
const Kernels& kernels();
}
#if defined(SAMBAY_ARM)
namespace neon {
const Kernels& kernels();
}
#endif
#if defined(SAMBAY_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

namespace {

#if defined(_MSC_VER) && !defined(__clang__)
struct Features {
  bool avx2 = false, avx512 = false;

  Features() {
    int leaf[4];
    __cpuid(leaf, 0);
    if (leaf[0] < 7) return;
    __cpuid(leaf, 1);
    const bool fma = leaf[2] >> 12 & 1, saves = leaf[2] >> 27 & 1, f16c = leaf[2] >> 29 & 1;
    if (!saves) return;
    const unsigned long long kept = _xgetbv(0);  // registers that the system saves
    __cpuidex(leaf, 7, 0);
    const unsigned bits = static_cast<unsigned>(leaf[1]);
    avx2 = fma && f16c && (bits >> 5 & 1) && (kept & 0x6) == 0x6;
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    avx512 = avx2 && (bits & wanted) == wanted && (kept & 0xE6) == 0xE6;
  }
};
#else
struct Features {
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
};
#endif

}  // namespace
#endif

const Kernels* find_kernels(const char* isa) {
  const Kernels* best_first[3] = {};
  int used = 0;
#if defined(SAMBAY_X86)
  static const Features features;
  if (features.avx512) best_first[used++] = &avx512::kernels();
  if (features.avx2) best_first[used++] = &avx2::kernels();
#elif defined(SAMBAY_ARM)
  best_first[used++] = &neon::kernels();
#endif
  best_first[used++] = &portable::kernels();
  if (!isa || !*isa) return best_first[0];
  for (int i = 0; i < used; ++i) {
    if (!std::strcmp(isa, best_first[i]->isa)) return best_first[i];
  }
  return nullptr;
}

}  // namespace sambay
