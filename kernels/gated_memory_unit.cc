// output = silu(gate) * memory. Compiled once for each instruction set, by isa_*.cc.

namespace sambay::SAMBAY_ISA {

void gated_memory_unit(const GatedMemory& op, const Pool& pool) {
  constexpr int64_t kBlock = 16384;  // values of one task: some ten microseconds
  pool((op.size + kBlock - 1) / kBlock, [&](int64_t task) {
    const int64_t start = task * kBlock;
    const int64_t size = op.size - start < kBlock ? op.size - start : kBlock;
    for_vectors(size, [&](int64_t i, int64_t count) {
      const Vec gate = load_some(op.gate + start + i, count);
      const Vec memory = load_some(op.memory + start + i, count);
      store_some(op.output + start + i, silu(gate) * memory, count);
    });
  });
}

}  // namespace sambay::SAMBAY_ISA
