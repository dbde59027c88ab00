// Writing heads of new keys and values into slots of caches, in the cache's element type.
#pragma once

#include "device.cuh"
#include "stream.h"

namespace sambay::cuda {

template <class Cell>
constexpr bool kScaled = std::is_same_v<std::remove_const_t<Cell>, int8_t>;

constexpr int64_t kWriters = 128;  // threads of a block that writes

// Which slot a head of a token goes to; slots count through rows and heads.
struct Place {
  enum Kind { kInOrder, kAppended, kInRing };

  Kind kind;
  int64_t tokens, kv_heads, capacity;
  const int64_t *past_lengths, *lengths;

  // Negative where the token has no slot.
  __device__ int64_t slot(int64_t row, int64_t token, int64_t head) const {
    if (kind == kInOrder) return (row * tokens + token) * kv_heads + head;
    const int64_t start = (row * kv_heads + head) * capacity;
    // Far from overflow, and not in a slot of this cache if it was out of range.
    const int64_t past = clamped(past_lengths[row], -1, int64_t{1} << 40);
    if (past < 0 && kind == kAppended) return -1;
    if (kind == kAppended) return past + token < capacity ? start + past + token : -1;
    const int64_t length = clamped(lengths[row], 0, tokens);
    if (token >= length || token < length - capacity) return -1;
    return start + ((past < 0 ? 0 : past) + token) % capacity;
  }
};

template <class Cell, class T>
struct Writes {
  Place place;
  int64_t batch, head_size;
  const T* from[2];  // keys, values [batch, tokens, kv_heads * head_size]
  Slots<Cell> to[2];
};

// One head, by a warp.
template <class Cell, class T>
__device__ void write_slot(const T* from, Slots<Cell> to, int64_t size, int lane) {
  for (int64_t d = lane; d < size; d += kWarp) store(to.cells + d, to_float(from[d]));
}

// As in export/ops/quantized_cells.py, to the bit: scale = max|x| / 127 in float16, NaN for what is not
// finite; cell = round(x / scale).
template <class T>
__device__ void write_slot(const T* from, Slots<int8_t> to, int64_t size, int lane) {
  constexpr float kMost = 127.0f, kLargestScale = 65504.0f;
  float most = 0.0f, poison = 0.0f;
  for (int64_t d = lane; d < size; d += kWarp) {
    const float x = to_float(from[d]);
    most = fmaxf(most, fabsf(x));
    poison += x * 0.0f;  // NaN for NaN and infinity
  }
  const float wanted = warp_largest(most) / kMost;
  const float step = rounded<Half>((wanted < kLargestScale ? wanted : kLargestScale) + warp_sum(poison));
  if (lane == 0) store(to.scales, step);
  for (int64_t d = lane; d < size; d += kWarp) {
    const float scaled = step > 0.0f ? rintf(to_float(from[d]) / step) : 0.0f;
    to.cells[d] = static_cast<int8_t>(fminf(kMost, fmaxf(-kMost, scaled)));
  }
}

// A warp a head of a token, keys and values.
template <class Cell, class T>
__global__ void write_heads(const Writes<Cell, T> op) {
  const Place& place = op.place;
  const int64_t heads = op.batch * place.tokens * place.kv_heads;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (warp >= 2 * heads) return;  // whole warps
  const int64_t part = warp / heads, index = warp % heads;
  const int64_t row = index / place.kv_heads / place.tokens;
  const int64_t slot = place.slot(row, index / place.kv_heads % place.tokens, index % place.kv_heads);
  if (slot < 0) return;
  Slots<Cell> to = op.to[part];
  to.cells += slot * op.head_size;
  if constexpr (kScaled<Cell>) to.scales += slot;
  write_slot(op.from[part] + index * op.head_size, to, op.head_size, static_cast<int>(threadIdx.x % kWarp));
}

template <class Cell, class T>
void write_new(const Stream& stream, const Writes<Cell, T>& op) {
  const int64_t warps = 2 * op.batch * op.place.tokens * op.place.kv_heads;
  const int64_t of_block = kWriters / kWarp;
  stream.launch(write_heads<Cell, T>, (warps + of_block - 1) / of_block, kWriters, 0, op);
}

// What a call leaves as it was; nothing to do where past and present are one memory.
template <class Cell>
void copy_cache(const Stream& stream, const Cache<const Cell>& past, const Cache<Cell>& present, int64_t slots,
                int64_t head_size) {
  stream.copy(past.key.cells, present.key.cells, slots * head_size);
  stream.copy(past.value.cells, present.value.cells, slots * head_size);
  if constexpr (kScaled<Cell>) {
    stream.copy(past.key.scales, present.key.scales, slots);
    stream.copy(past.value.scales, present.value.scales, slots);
  }
}

}  // namespace sambay::cuda
