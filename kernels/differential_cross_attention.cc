// Differential attention over the shared cache. Compiled once for each instruction set, by isa_*.cc.

namespace sambay::SAMBAY_ISA {

template <class Cell>
void differential_cross_attention(const CrossAttention<Cell>& op, const Pool& pool) {
  const Heads& heads = op.heads;
  const int64_t cells = heads.capacity * heads.head_size;
  const auto sources = [&](int64_t row, int64_t, int64_t last) {
    const int64_t start = row * heads.kv_heads * heads.capacity;
    Sources<Cell> seen;  // slots above the last position are never touched
    seen.add({from_slot(op.cache.key, start, heads.head_size),
              from_slot(op.cache.value, start, heads.head_size), heads.head_size, cells, heads.capacity, 0,
              last + 1});
    return seen;
  };
  const auto position = [&](int64_t row, int64_t query) {
    return op.positions[row * heads.queries + query];
  };
  attend(heads, heads.capacity, sources, position, pool);
}

}  // namespace sambay::SAMBAY_ISA
