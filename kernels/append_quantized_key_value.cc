// Writes new keys and values into the shared cache in 8 bits. Compiled once for each instruction set, by
// isa_*.cc.

namespace sambay::SAMBAY_ISA {

inline void append_quantized_key_value(const Append<int8_t>& op, const Pool& pool) {
  append_key_value(op, pool);
}

}  // namespace sambay::SAMBAY_ISA
