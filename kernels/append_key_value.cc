// Writes new keys and values into the shared cache. Compiled once for each instruction set, by isa_*.cc.

namespace sambay::SAMBAY_ISA {

template <class Cell>
void append_key_value(const Append<Cell>& op, const Pool& pool) {
  const int64_t heads = op.batch * op.kv_heads, size = op.head_size;
  // One token in place is a few kilobytes: not worth waking a thread.
  const int64_t tasks = is_same_memory(op.past, op.present) && op.tokens == 1 ? 1 : heads;
  pool(tasks, [&](int64_t task) {
    const int64_t end = tasks == 1 ? heads : task + 1;
    for (int64_t head = task; head < end; ++head) {
      const int64_t row = head / op.kv_heads;
      const auto write = [&](Slots<const Cell> past, const float* fresh, Slots<Cell> present) {
        const int64_t start = head * op.capacity;
        copy_slots(from_slot(past, start, size), from_slot(present, start, size), op.capacity, size);
        for (int64_t t = 0; t < op.tokens; ++t) {
          const int64_t from = (row * op.tokens + t) * op.kv_heads + head % op.kv_heads;
          write_slot(from_slot(present, start + op.past_lengths[row] + t, size), fresh + from * size, size);
        }
      };
      write(op.past.key, op.k, op.present.key);
      write(op.past.value, op.v, op.present.value);
    }
  });
}

}  // namespace sambay::SAMBAY_ISA
