// Chooses the kernels that this machine can run.
#include "kernels.h"
#include "standard.h"

#if defined(SAMBAY_X86)
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(SAMBAY_ARM)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif
#endif

namespace sambay {

#define SAMBAY_DECLARE_KERNELS(isa) \
  namespace isa {                   \
  const Kernels& kernels();         \
  }
#define SAMBAY_DECLARE_PRODUCT(isa)                     \
  namespace isa {                                       \
  void matmul_nbits(const MatMulNBits&, const Pool&);   \
  }

SAMBAY_DECLARE_KERNELS(portable)
#if defined(SAMBAY_X86)
SAMBAY_DECLARE_KERNELS(avx2)
SAMBAY_DECLARE_KERNELS(avx512)
SAMBAY_DECLARE_PRODUCT(avx2_vnni)
SAMBAY_DECLARE_PRODUCT(avx512_vnni)
#elif defined(SAMBAY_ARM)
SAMBAY_DECLARE_KERNELS(neon)
SAMBAY_DECLARE_PRODUCT(neon_dot)
#endif

namespace {

#if defined(SAMBAY_X86)

struct Features {
  bool avx2 = false, avx2_vnni = false, avx512 = false, avx512_vnni = false;

  Features() {
    unsigned leaf[4];
    read(leaf, 0, 0);
    if (leaf[0] < 7) return;
    read(leaf, 1, 0);
    const bool fma = leaf[2] >> 12 & 1, saves = leaf[2] >> 27 & 1, f16c = leaf[2] >> 29 & 1;
    if (!saves) return;
    const unsigned kept = kept_registers();
    read(leaf, 7, 0);
    avx2 = fma && f16c && (leaf[1] >> 5 & 1) && (kept & 0x6) == 0x6;
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    avx512 = avx2 && (leaf[1] & wanted) == wanted && (kept & 0xE6) == 0xE6;
    avx512_vnni = avx512 && (leaf[2] >> 11 & 1);
    if (leaf[0] < 1) return;
    read(leaf, 7, 1);
    avx2_vnni = avx2 && (leaf[0] >> 4 & 1);
  }

  static void read(unsigned (&leaf)[4], int number, int part) {
#if defined(_MSC_VER) && !defined(__clang__)
    int found[4];
    __cpuidex(found, number, part);
    for (int i = 0; i < 4; ++i) leaf[i] = static_cast<unsigned>(found[i]);
#else
    __cpuid_count(number, part, leaf[0], leaf[1], leaf[2], leaf[3]);
#endif
  }

  // Those that the system saves when it switches tasks.
  static unsigned kept_registers() {
#if defined(_MSC_VER) && !defined(__clang__)
    return static_cast<unsigned>(_xgetbv(0));
#else
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
  }
};

#elif defined(SAMBAY_ARM)

bool has_dot_product() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
  return false;
#endif
}

#endif

// All the kernels of this machine, the best first.
struct Found {
  const Kernels* kernels[5] = {};
  Kernels own[2] = {};  // those that share all but the product
  int used = 0, made = 0;

  void add(const Kernels& all) { kernels[used++] = &all; }

  void add(const Kernels& others, const char* isa, decltype(Kernels::matmul_nbits) product) {
    own[made] = others;
    own[made].isa = isa;
    own[made].matmul_nbits = product;
    add(own[made++]);
  }

  Found() {
#if defined(SAMBAY_X86)
    const Features features;
    if (features.avx512_vnni) add(avx512::kernels(), "avx512_vnni", &avx512_vnni::matmul_nbits);
    if (features.avx512) add(avx512::kernels());
#if defined(SAMBAY_COMPILES_AVX_VNNI)
    if (features.avx2_vnni) add(avx2::kernels(), "avx2_vnni", &avx2_vnni::matmul_nbits);
#endif
    if (features.avx2) add(avx2::kernels());
#elif defined(SAMBAY_ARM)
    if (has_dot_product()) add(neon::kernels(), "neon_dot", &neon_dot::matmul_nbits);
    add(neon::kernels());
#endif
    add(portable::kernels());
  }
};

}  // namespace

const Kernels* find_kernels(const char* isa) {
  static const Found found;
  if (!isa || !*isa) return found.kernels[0];
  for (int i = 0; i < found.used; ++i) {
    if (!std::strcmp(isa, found.kernels[i]->isa)) return found.kernels[i];
  }
  return nullptr;
}

}  // namespace sambay
