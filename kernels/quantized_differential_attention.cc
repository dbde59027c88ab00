// Sliding-window differential attention over a ring of 8 bits. Compiled once for each instruction set, by
// isa_*.cc.

namespace sambay::SAMBAY_ISA {

// The new tokens in 8 bits, laid out as a cache: [batch, kv_heads, tokens, head_size].
template <>
struct AsCells<int8_t> {
  AsCells(const Heads& op, const float* fresh)
      : cells(op.batch * op.kv_heads * op.queries * op.head_size),
        scales(op.batch * op.kv_heads * op.queries),
        slots{cells.data(), scales.data()},
        slot_stride(op.head_size),
        head_stride(op.queries * op.head_size),
        scale_stride(op.queries) {
    for (int64_t row = 0; row < op.batch; ++row) {
      for (int64_t t = 0; t < op.queries; ++t) {
        for (int64_t head = 0; head < op.kv_heads; ++head, fresh += op.head_size) {
          const int64_t slot = (row * op.kv_heads + head) * op.queries + t;
          write_slot(from_slot(Slots<int8_t>{cells.data(), scales.data()}, slot, op.head_size), fresh,
                     op.head_size);
        }
      }
    }
  }

  Scratch<int8_t> cells;
  Scratch<Half> scales;
  Slots<const int8_t> slots;
  int64_t slot_stride, head_stride, scale_stride;
};

inline void quantized_differential_attention(const WindowAttention<int8_t>& op, const Pool& pool) {
  differential_attention(op, pool);
}

}  // namespace sambay::SAMBAY_ISA
