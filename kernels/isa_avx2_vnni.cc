// The product for x86-64 with AVX-VNNI: laptops since 2021, most of which have no AVX-512.
#include "standard.h"

#if defined(SAMBAY_COMPILES_AVX_VNNI)
SAMBAY_TARGET("avxvnni,avx2,fma,f16c")
#define SAMBAY_ISA avx2_vnni
#define SAMBAY_AVX2 1
#define SAMBAY_DOT 1
#include "vector.h"
#include "bytes.h"
#include "matmul_nbits.cc"
SAMBAY_TARGET_END
#endif
