// Writes new keys and values into the shared cache. Compiled once for each instruction set, by isa_*.cc.

namespace sambay::SAMBAY_ISA {

template <class Cell>
inline void write_head(Cell* to, const float* from, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t count) {
    store_some(to + i, load_some(from + i, count), count);
  });
}

template <class Cell>
void append_key_value(const Append<Cell>& op, const Pool& pool) {
  const bool in_place = op.present_key == op.past_key && op.present_value == op.past_value;
  const int64_t heads = op.batch * op.kv_heads, cells = op.capacity * op.head_size;
  // One token in place is a few kilobytes: not worth waking a thread.
  const int64_t tasks = in_place && op.tokens == 1 ? 1 : heads;
  pool(tasks, [&](int64_t task) {
    const int64_t end = tasks == 1 ? heads : task + 1;
    for (int64_t head = task; head < end; ++head) {
      const int64_t row = head / op.kv_heads;
      const auto write = [&](const Cell* past, const float* fresh, Cell* present) {
        present += head * cells;
        if (present != past + head * cells) {
          std::memcpy(present, past + head * cells, static_cast<size_t>(cells) * sizeof(Cell));
        }
        for (int64_t t = 0; t < op.tokens; ++t) {
          const int64_t from = (row * op.tokens + t) * op.kv_heads + head % op.kv_heads;
          write_head(present + (op.past_lengths[row] + t) * op.head_size,
                     fresh + from * op.head_size, op.head_size);
        }
      };
      write(op.past_key, op.k, op.present_key);
      write(op.past_value, op.v, op.present_value);
    }
  });
}

}  // namespace sambay::SAMBAY_ISA
