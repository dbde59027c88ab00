// What both attention operators hand to the sweep that they share, differential_sweep.cu.
#pragma once

#include "cache_slots.cuh"
#include "device.cuh"
#include "stream.h"

namespace sambay::cuda {

constexpr int64_t kMostPositions = int64_t{1} << 40;  // as the caller takes them

template <class Cell, class T>
struct Sweep {
  HeadsOf<T> heads;
  int64_t window;
  Cache<const Cell> cache;      // [batch, kv_heads, capacity]; position p in slot p % capacity
  Cache<const Cell> fresh;      // [batch, queries, kv_heads] of this call; null: they are in the cache
  const int64_t* past_lengths;  // [batch]; where there are none,
  const int64_t* positions;     // [batch, queries]
  bool aligned;                 // all cells can be read in packs; this and the rest attend sets
  int64_t splits;
  float* parts;  // [tiles, splits, 2 * rows * (2 + 2 * head_size)]

  __device__ int64_t past(int64_t row) const {
    return past_lengths ? clamped(past_lengths[row], 0, kMostPositions) : kMostPositions + heads.capacity;
  }
  __device__ int64_t position(int64_t row, int64_t query) const {
    return past_lengths ? past(row) + query
                        : clamped(positions[row * heads.queries + query], 0, heads.capacity - 1);
  }
};

template <class Cell, class T>
void attend(Sweep<Cell, T> op, const Stream& stream);

}  // namespace sambay::cuda
