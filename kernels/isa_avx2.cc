// The operators for x86-64 with AVX2, FMA and F16C: every one since about 2013.
#include "standard.h"

#if defined(SAMBAY_X86)
SAMBAY_TARGET("avx2,fma,f16c")
#define SAMBAY_ISA avx2
#define SAMBAY_AVX2 1
#include "operators.h"
SAMBAY_TARGET_END
#endif
