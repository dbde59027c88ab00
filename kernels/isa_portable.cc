// The operators in plain C++, for any processor.
#include "standard.h"

#define SAMBAY_ISA portable
#include "operators.h"
