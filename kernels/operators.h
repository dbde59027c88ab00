// All operators, for the instruction set that the including file chose.

// clang-format off: the later ones use the earlier ones
#include "vector.h"
#include "vector_math.h"
#include "gated_memory_unit.cc"
#include "causal_conv_with_state.cc"
#include "selective_scan.cc"
#include "cache_slots.h"
#include "append_key_value.cc"
#include "append_quantized_key_value.cc"
#include "differential_sweep.h"
#include "differential_cross_attention.cc"
#include "differential_attention.cc"
#include "quantized_differential_cross_attention.cc"
#include "quantized_differential_attention.cc"
#include "bytes.h"
#include "matmul_nbits.cc"
// clang-format on

#define SAMBAY_TEXT(name) #name
#define SAMBAY_NAME_OF(isa) SAMBAY_TEXT(isa)

namespace sambay::SAMBAY_ISA {

const Kernels& kernels() {
  static const Kernels all = {
      SAMBAY_NAME_OF(SAMBAY_ISA),
      &causal_conv_with_state,
      &selective_scan,
      &gated_memory_unit,
      &append_key_value<float>,
      &append_key_value<Half>,
      &differential_attention<float>,
      &differential_attention<Half>,
      &differential_cross_attention<float>,
      &differential_cross_attention<Half>,
      &append_quantized_key_value,
      &quantized_differential_attention,
      &quantized_differential_cross_attention,
      &matmul_nbits,
  };
  return all;
}

}  // namespace sambay::SAMBAY_ISA
