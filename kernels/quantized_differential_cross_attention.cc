// Differential attention over the shared cache of 8 bits. Compiled once for each instruction set, by
// isa_*.cc. The sweep converts cells on the way and weighs scores and weights by their slots' scales.

namespace sambay::SAMBAY_ISA {

inline void quantized_differential_cross_attention(const CrossAttention<int8_t>& op, const Pool& pool) {
  differential_cross_attention(op, pool);
}

}  // namespace sambay::SAMBAY_ISA
