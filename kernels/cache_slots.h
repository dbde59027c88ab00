// Slots of a cache: where they stand, and how a head is written into one.

namespace sambay::SAMBAY_ISA {

template <class Cell>
constexpr bool kScaled = std::is_same_v<std::remove_const_t<Cell>, int8_t>;

// From slot `index` on, of slots of `size` cells.
template <class Cell>
inline Slots<Cell> from_slot(Slots<Cell> slots, int64_t index, int64_t size) {
  slots.cells += index * size;
  if constexpr (kScaled<Cell>) slots.scales += index;
  return slots;
}

template <class Cell>
inline void copy_slots(Slots<const Cell> from, Slots<Cell> to, int64_t count, int64_t size) {
  if (to.cells != from.cells) {
    std::memcpy(to.cells, from.cells, static_cast<size_t>(count * size) * sizeof(Cell));
  }
  if constexpr (kScaled<Cell>) {
    if (to.scales != from.scales) {
      std::memcpy(to.scales, from.scales, static_cast<size_t>(count) * sizeof(Half));
    }
  }
}

template <class Cell>
inline bool is_same_memory(const Cache<const Cell>& past, const Cache<Cell>& present) {
  return past.key.cells == present.key.cells && past.value.cells == present.value.cells &&
         past.key.scales == present.key.scales && past.value.scales == present.value.scales;
}

// One head of one token into the first of the slots.
template <class Cell>
inline void write_slot(Slots<Cell> to, const float* from, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t count) {
    store_some(to.cells + i, load_some(from + i, count), count);
  });
}

// As in export/ops/quantized_cells.py, to the bit: scale = max|x| / 127 in float16, NaN for what is not
// finite; cell = round(x / scale).
inline void write_slot(Slots<int8_t> to, const float* from, int64_t size) {
  constexpr float kMost = 127.0f, kLargestScale = 65504.0f;
  Vec most = set(0.0f), poison = set(0.0f);
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vec x = load_some(from + i, count);
    most = max(max(x, set(0.0f) - x), most);
    poison = fma(x, set(0.0f), poison);  // NaN for NaN and infinity
  });
  const float wanted = largest(most) / kMost;
  const float finite = wanted < kLargestScale ? wanted : kLargestScale;
  Half scales[kWidth];
  store(scales, set(finite + sum(poison)));
  to.scales[0] = scales[0];
  const Vec step = load(scales);
  if (!(sum(step) > 0.0f)) {
    std::memset(to.cells, 0, static_cast<size_t>(size));
    return;
  }
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vec scaled = load_some(from + i, count) / step;
    store_some(to.cells + i, max(set(-kMost), min(set(kMost), scaled)), count);
  });
}

}  // namespace sambay::SAMBAY_ISA
