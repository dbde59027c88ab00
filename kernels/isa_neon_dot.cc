// The product for 64-bit Arm with the dot product of ARMv8.2: since about 2018.
#include "standard.h"

#if defined(SAMBAY_ARM)
#if defined(__clang__)
SAMBAY_TARGET("dotprod")
#else
SAMBAY_TARGET("arch=armv8.2-a+dotprod")
#endif
#define SAMBAY_ISA neon_dot
#define SAMBAY_NEON 1
#define SAMBAY_DOT 1
#include "vector.h"
#include "bytes.h"
#include "matmul_nbits.cc"
SAMBAY_TARGET_END
#endif
