// The operators for x86-64 with AVX-512.
#include "standard.h"

#if defined(SAMBAY_X86)
SAMBAY_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SAMBAY_ISA avx512
#define SAMBAY_AVX512 1
#include "operators.h"
SAMBAY_TARGET_END
#endif
