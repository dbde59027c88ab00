// The operators for 64-bit Arm, whose every processor has NEON.
#include "standard.h"

#if defined(SAMBAY_ARM)
#define SAMBAY_ISA neon
#define SAMBAY_NEON 1
#include "operators.h"
#endif
