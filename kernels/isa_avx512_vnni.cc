// The product for x86-64 with AVX-512 and its VNNI.
#include "standard.h"

#if defined(SAMBAY_X86)
SAMBAY_TARGET("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SAMBAY_ISA avx512_vnni
#define SAMBAY_AVX512 1
#define SAMBAY_DOT 1
#include "vector.h"
#include "bytes.h"
#include "matmul_nbits.cc"
SAMBAY_TARGET_END
#endif
