// What the kernels share: element types, sums over warps and blocks, lengths that nobody checked.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace sambay::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

extern __shared__ float shared_memory[];  // of a block, as large as its launch says

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(int8_t x) { return static_cast<float>(x); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(Half* to, float x) { to->bits = __half_as_ushort(__float2half_rn(x)); }

// A float rounded to an element type and back.
template <class T>
__device__ float rounded(float x) {
  T stored;
  store(&stored, x);
  return to_float(stored);
}

// Sixteen bytes of cells; their address is a multiple of sixteen.
template <class Cell>
struct Pack {
  static constexpr int kCount = 16 / sizeof(Cell);
  Cell cells[kCount];
};

template <class Cell>
__device__ Pack<Cell> load_pack(const Cell* from) {
  const int4 bytes = *reinterpret_cast<const int4*>(from);
  Pack<Cell> pack;
  memcpy(&pack, &bytes, sizeof pack);
  return pack;
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }
// Above 20 as in torch: there the difference is less than a float32 holds.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

__host__ __device__ inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Over the lanes of a warp; every lane takes part and gets the result. NaN is not seen by warp_largest.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ inline float warp_largest(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

}  // namespace sambay::cuda
