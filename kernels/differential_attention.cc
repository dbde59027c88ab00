// Sliding-window differential attention over a ring. Compiled once for each instruction set, by
// isa_*.cc.
//
// All queries read the ring as it was and the new tokens where they came in; only then the new tokens
// enter the ring. So past and present may be one memory, and no copy of the ring is made for it.

namespace sambay::SAMBAY_ISA {

// The new tokens in the cache's type: a query must see what later calls will see.
template <class Cell>
struct AsCells {
  AsCells(const float* fresh, int64_t size) : rounded(size), cells(rounded.data()) {
    write_head(rounded.data(), fresh, size);
  }
  Scratch<Cell> rounded;
  const Cell* cells;
};
template <>
struct AsCells<float> {
  AsCells(const float* fresh, int64_t) : cells(fresh) {}
  const float* cells;
};

template <class Cell>
void write_ring(const WindowAttention<Cell>& op, const Cell* past, const float* fresh, Cell* present,
                int64_t index) {
  const Heads& heads = op.heads;
  const int64_t row = index / heads.kv_heads, head = index % heads.kv_heads;
  const int64_t size = heads.head_size, cells = heads.capacity * size, length = op.lengths[row];
  if (present != past) {
    std::memcpy(present + index * cells, past + index * cells, static_cast<size_t>(cells) * sizeof(Cell));
  }
  for (int64_t t = length > heads.capacity ? length - heads.capacity : 0; t < length; ++t) {
    const int64_t slot = (op.past_lengths[row] + t) % heads.capacity;
    const int64_t from = (row * heads.queries + t) * heads.kv_heads + head;
    write_head(present + index * cells + slot * size, fresh + from * size, size);
  }
}

template <class Cell>
void differential_attention(const WindowAttention<Cell>& op, const Pool& pool) {
  const Heads& heads = op.heads;
  const int64_t size = heads.head_size, capacity = heads.capacity, cells = capacity * size;
  const int64_t width = heads.kv_heads * size, fresh_size = heads.batch * heads.queries * width;
  const AsCells<Cell> k(op.k, fresh_size), v(op.v, fresh_size);

  const auto position = [&](int64_t row, int64_t query) { return op.past_lengths[row] + query; };
  const auto sources = [&](int64_t row, int64_t first, int64_t last) {
    const int64_t past = op.past_lengths[row];
    int64_t oldest = first - op.window + 1;  // that any of the queries sees
    if (oldest < past - capacity) oldest = past - capacity;  // older ones were overwritten
    if (oldest < 0) oldest = 0;
    Sources<Cell> seen;
    if (oldest < past) {  // in the ring: up to its end, then from its start
      const Cell *const key = op.past_key + row * heads.kv_heads * cells,
                 *const value = op.past_value + row * heads.kv_heads * cells;
      const int64_t slot = oldest % capacity, in_ring = past - oldest;
      const int64_t ahead = in_ring < capacity - slot ? in_ring : capacity - slot;
      seen.add({key + slot * size, value + slot * size, size, cells, oldest, ahead});
      seen.add({key, value, size, cells, oldest + ahead, in_ring - ahead});
    }
    const int64_t skipped = oldest > past ? oldest - past : 0;
    const int64_t start = (row * heads.queries + skipped) * width;
    seen.add({k.cells + start, v.cells + start, width, size, past + skipped, last + 1 - past - skipped});
    return seen;
  };
  attend(heads, op.window, sources, position, pool);

  const bool in_place = op.present_key == op.past_key && op.present_value == op.past_value;
  const int64_t rings = heads.batch * heads.kv_heads;
  // One token in place is a few kilobytes: not worth waking a thread.
  const int64_t tasks = in_place && heads.queries == 1 ? 1 : rings;
  pool(tasks, [&](int64_t task) {
    const int64_t end = tasks == 1 ? rings : task + 1;
    for (int64_t index = task; index < end; ++index) {
      write_ring(op, op.past_key, op.k, op.present_key, index);
      write_ring(op, op.past_value, op.v, op.present_value, index);
    }
  });
}

}  // namespace sambay::SAMBAY_ISA
