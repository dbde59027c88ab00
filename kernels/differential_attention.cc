// Sliding-window differential attention over a ring. Compiled once for each instruction set, by
// isa_*.cc.
//
// All queries read the ring as it was and the new tokens where they came in; only then the new tokens
// enter the ring. So past and present may be one memory, and no copy of the ring is made for it.

namespace sambay::SAMBAY_ISA {

// The new tokens in the cache's type: a query must see what later calls will see.
template <class Cell>
struct AsCells {
  AsCells(const Heads& op, const float* fresh)
      : rounded(op.batch * op.queries * op.kv_heads * op.head_size),
        slots{rounded.data(), nullptr},
        slot_stride(op.kv_heads * op.head_size),
        head_stride(op.head_size) {
    write_slot(Slots<Cell>{rounded.data(), nullptr}, fresh, op.batch * op.queries * slot_stride);
  }
  Scratch<Cell> rounded;
  Slots<const Cell> slots;
  int64_t slot_stride, head_stride, scale_stride = 0;
};
template <>
struct AsCells<float> {
  AsCells(const Heads& op, const float* fresh)
      : slots{fresh, nullptr}, slot_stride(op.kv_heads * op.head_size), head_stride(op.head_size) {}
  Slots<const float> slots;
  int64_t slot_stride, head_stride, scale_stride = 0;
};

template <class Cell>
void write_ring(const WindowAttention<Cell>& op, Slots<const Cell> past, const float* fresh,
                Slots<Cell> present, int64_t index) {
  const Heads& heads = op.heads;
  const int64_t row = index / heads.kv_heads, head = index % heads.kv_heads;
  const int64_t size = heads.head_size, start = index * heads.capacity, length = op.lengths[row];
  copy_slots(from_slot(past, start, size), from_slot(present, start, size), heads.capacity, size);
  for (int64_t t = length > heads.capacity ? length - heads.capacity : 0; t < length; ++t) {
    const int64_t slot = (op.past_lengths[row] + t) % heads.capacity;
    const int64_t from = (row * heads.queries + t) * heads.kv_heads + head;
    write_slot(from_slot(present, start + slot, size), fresh + from * size, size);
  }
}

template <class Cell>
void differential_attention(const WindowAttention<Cell>& op, const Pool& pool) {
  const Heads& heads = op.heads;
  const int64_t size = heads.head_size, capacity = heads.capacity, cells = capacity * size;
  const AsCells<Cell> k(heads, op.k), v(heads, op.v);

  const auto position = [&](int64_t row, int64_t query) { return op.past_lengths[row] + query; };
  const auto sources = [&](int64_t row, int64_t first, int64_t last) {
    const int64_t past = op.past_lengths[row];
    int64_t oldest = first - op.window + 1;  // that any of the queries sees
    if (oldest < past - capacity) oldest = past - capacity;  // older ones were overwritten
    if (oldest < 0) oldest = 0;
    Sources<Cell> seen;
    if (oldest < past) {  // in the ring: up to its end, then from its start
      const int64_t start = row * heads.kv_heads * capacity, slot = oldest % capacity;
      const auto key = [&](int64_t at) { return from_slot(op.past.key, start + at, size); };
      const auto value = [&](int64_t at) { return from_slot(op.past.value, start + at, size); };
      const int64_t in_ring = past - oldest;
      const int64_t ahead = in_ring < capacity - slot ? in_ring : capacity - slot;
      seen.add({key(slot), value(slot), size, cells, capacity, oldest, ahead});
      seen.add({key(0), value(0), size, cells, capacity, oldest + ahead, in_ring - ahead});
    }
    const int64_t skipped = oldest > past ? oldest - past : 0;
    const auto fresh = [&](const AsCells<Cell>& all) {
      Slots<const Cell> slots = all.slots;
      slots.cells += row * heads.queries * heads.kv_heads * size + skipped * all.slot_stride;
      if constexpr (kScaled<Cell>) slots.scales += row * heads.queries * heads.kv_heads + skipped;
      return slots;
    };
    seen.add({fresh(k), fresh(v), k.slot_stride, k.head_stride, k.scale_stride, past + skipped,
              last + 1 - past - skipped});
    return seen;
  };
  attend(heads, op.window, sources, position, pool);

  const int64_t rings = heads.batch * heads.kv_heads;
  // One token in place is a few kilobytes: not worth waking a thread.
  const int64_t tasks = is_same_memory(op.past, op.present) && heads.queries == 1 ? 1 : rings;
  pool(tasks, [&](int64_t task) {
    const int64_t end = tasks == 1 ? rings : task + 1;
    for (int64_t index = task; index < end; ++index) {
      write_ring(op, op.past.key, op.k, op.present.key, index);
      write_ring(op, op.past.value, op.v, op.present.value, index);
    }
  });
}

}  // namespace sambay::SAMBAY_ISA
