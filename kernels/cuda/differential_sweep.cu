// Differential attention in one sweep over keys and values: what both attention operators share.
//
//     a_s = softmax(q_s k_s^T / sqrt(D)) [v_0 ; v_1]     s = 0, 1
//     out = (1 - lambda_init) * rms_norm(a_0 - lambda a_1) * norm_weight
//
// A block takes a tile: up to kRows pairs of query heads that read one pair of key heads, of one or more
// queries. Both sides of all of them are its rows, so a key or value is loaded once for all. Slots pass in
// pieces: first a thread has one slot and one side and forms the scores of all rows; then warps take the
// running softmax of rows; then a thread has one column of both value heads and adds up all rows.
//
// Where tiles do not fill the device, as for one query, blocks share out the slots of a tile; a second
// launch merges their parts. How many they are depends on sizes alone, never on lengths: these stand on
// the device, and each block finds its share of what is there.
//
// Source: Differential Transformer (arXiv 2410.05258); FlashAttention (arXiv 2205.14135) for the online
// form, Flash-Decoding for the split.
#include "differential_sweep.cuh"

#include <string>

#include "operators.h"

namespace sambay::cuda {
namespace {

constexpr float kEps = 1e-5f;             // of the norm over a pair of heads
constexpr int64_t kMostHeadSize = 256;    // two columns a thread pair, and blocks of 512 threads
constexpr int kMostThreads = 2 * kMostHeadSize;
constexpr int64_t kBlocksEach = 4;        // blocks that a multiprocessor should have

// The pairs of query heads that a block has, counted through queries and the group of a pair of key heads.
template <int kRows>
struct Tile {
  int64_t row, pair, first, count;  // batch row; pair of key heads; pairs of query heads

  template <class T>
  __device__ Tile(const HeadsOf<T>& op, int64_t index) {
    const int64_t all = op.queries * (op.heads / op.kv_heads), across = (all + kRows - 1) / kRows;
    const int64_t pairs = op.kv_heads / 2;
    row = index / across / pairs;
    pair = index / across % pairs;
    first = index % across * kRows;
    count = all - first < kRows ? all - first : kRows;
  }
  template <class T>
  __device__ int64_t query(const HeadsOf<T>& op, int64_t r) const {
    return (first + r) / (op.heads / op.kv_heads);
  }
  // Offset in q and in the output of the even head of a pair.
  template <class T>
  __device__ int64_t offset(const HeadsOf<T>& op, int64_t r) const {
    const int64_t group = op.heads / op.kv_heads, head = 2 * (pair * group + (first + r) % group);
    return ((row * op.queries + query(op, r)) * op.heads + head) * op.head_size;
  }
};

// Where a slot's cells stand; negative places are tokens of this call.
template <class Cell>
struct Columns {
  Slots<const Cell> cache, fresh;  // of one head and row
  int64_t size, stride;            // cells of a slot; from token to token, in slots

  template <class T>
  __device__ Columns(const Sweep<Cell, T>& op, int64_t row, int64_t head, int part) {
    const HeadsOf<T>& heads = op.heads;
    cache = part ? op.cache.value : op.cache.key;
    fresh = part ? op.fresh.value : op.fresh.key;
    size = heads.head_size, stride = heads.kv_heads;
    const int64_t in_cache = (row * heads.kv_heads + head) * heads.capacity;
    const int64_t in_fresh = row * heads.queries * heads.kv_heads + head;
    cache.cells += in_cache * size;
    if (fresh.cells) fresh.cells += in_fresh * size;
    if constexpr (kScaled<Cell>) {
      cache.scales += in_cache;
      if (fresh.scales) fresh.scales += in_fresh;
    }
  }
  __device__ const Cell* cells(int place) const {
    return place >= 0 ? cache.cells + place * size : fresh.cells + (-1 - int64_t{place}) * stride * size;
  }
  __device__ float scale(int place) const {
    if constexpr (!kScaled<Cell>) return 1.0f;
    else return to_float(place >= 0 ? cache.scales[place] : fresh.scales[(-1 - int64_t{place}) * stride]);
  }
};

// products[r] = queries[r] . key, queries [kRows, padded].
template <int kRows, class Cell>
__device__ void multiply(const float* queries, int padded, const Cell* key, int size, bool aligned,
                         float (&products)[kRows]) {
  if (!aligned) {
    for (int d = 0; d < size; ++d) {
      const float x = to_float(key[d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) products[r] += queries[r * padded + d] * x;
    }
    return;
  }
  for (int d = 0; d < size; d += Pack<Cell>::kCount) {
    const Pack<Cell> pack = load_pack(key + d);
#pragma unroll
    for (int i = 0; i < Pack<Cell>::kCount; i += 4) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(queries + r * padded + d + i);
        products[r] += q.x * to_float(pack.cells[i]) + q.y * to_float(pack.cells[i + 1]) +
                       q.z * to_float(pack.cells[i + 2]) + q.w * to_float(pack.cells[i + 3]);
      }
    }
  }
}

// The output of a tile. Thread c has column c of each row's values, totals [2 * kRows] stand in shared
// memory, and so does room for kRows floats a warp.
template <int kRows, class T>
__device__ void write_output(const HeadsOf<T>& op, const Tile<kRows>& tile, const float (&values)[2][kRows],
                             const float* totals, float* room) {
  const int c = threadIdx.x, lane = c % kWarp, warp = c / kWarp, warps = blockDim.x / kWarp;
  const bool has_column = c < 2 * op.head_size;
  float differences[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    differences[r] = values[0][r] / totals[r] - op.lambda[0] * (values[1][r] / totals[kRows + r]);
    const float squares = warp_sum(has_column ? differences[r] * differences[r] : 0.0f);
    if (lane == 0) room[warp * kRows + r] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += room[w * kRows + r];
    if (!has_column || r >= tile.count) continue;
    const float mean = sum / static_cast<float>(2 * op.head_size);
    const float scale = (1.0f - op.lambda_init) / sqrtf(mean + kEps);
    store(op.output + tile.offset(op, r) + c, differences[r] * scale * op.norm_weight[c]);
  }
}

// Shared memory of a sweep, in floats. All parts begin at multiples of four.
struct Layout {
  int slots, padded, rows;  // slots of a piece; floats of a query; rows of both sides

  __host__ __device__ Layout(int threads, int head_size, int side_rows)
      : slots(threads / 2), padded((head_size + 3) / 4 * 4), rows(2 * side_rows) {}
  __host__ __device__ int queries() const { return 0; }                          // [rows, padded]
  __host__ __device__ int scores() const { return rows * padded; }               // [rows, slots]
  __host__ __device__ int places() const { return scores() + rows * slots; }     // [slots], int
  __host__ __device__ int largest() const { return places() + slots; }           // [rows]
  __host__ __device__ int totals() const { return largest() + rows; }            // [rows]
  __host__ __device__ int factors() const { return totals() + rows; }            // [rows]
  __host__ __device__ int positions() const { return factors() + rows; }         // [rows], of one side, int64_t
  __host__ __device__ int floats() const { return positions() + rows; }
};

// Scores [slots] of a row become weights relative to its largest score so far; by a warp.
__device__ inline void weigh_scores(float* scores, int slots, float* largest, float* total, float* factor,
                                    int lane) {
  float top = *largest;
  const float before = top;
  for (int s = lane; s < slots; s += kWarp) top = fmaxf(top, scores[s]);
  top = warp_largest(top);
  float sum = 0.0f;
  for (int s = lane; s < slots; s += kWarp) {
    scores[s] = expf(scores[s] - top);
    sum += scores[s];
  }
  sum = warp_sum(sum);
  if (lane > 0) return;
  *factor = expf(before - top);
  *total = *total * *factor + sum;
  *largest = top;
}

template <int kRows, class Cell, class T>
__global__ void __launch_bounds__(kMostThreads) sweep(const Sweep<Cell, T> op) {
  const HeadsOf<T>& heads = op.heads;
  const int size = static_cast<int>(heads.head_size), id = threadIdx.x;
  const int lane = id % kWarp, warp = id / kWarp, warps = blockDim.x / kWarp;
  const Layout layout(blockDim.x, size, kRows);
  const int slots = layout.slots, padded = layout.padded;
  float* const queries = shared_memory + layout.queries();
  float* const scores = shared_memory + layout.scores();
  int* const places = reinterpret_cast<int*>(shared_memory + layout.places());
  float* const largest = shared_memory + layout.largest();
  float* const totals = shared_memory + layout.totals();
  float* const factors = shared_memory + layout.factors();
  int64_t* const positions = reinterpret_cast<int64_t*>(shared_memory + layout.positions());
  const int64_t split = blockIdx.x % op.splits, index = blockIdx.x / op.splits;
  const Tile<kRows> tile(heads, index);

  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (int i = id; i < 2 * kRows * padded; i += blockDim.x) {
    const int side = i / (kRows * padded), r = i / padded % kRows, d = i % padded;
    const bool exists = r < tile.count && d < size;
    queries[i] = exists ? to_float(heads.q[tile.offset(heads, r) + side * size + d]) * scale : 0.0f;
  }
  if (id < 2 * kRows) {
    largest[id] = -FLT_MAX;  // finite: a first piece of masked slots must not give inf - inf
    totals[id] = 0.0f;
  }
  if (id < kRows) positions[id] = id < tile.count ? op.position(tile.row, tile.query(heads, id)) : -1;
  __syncthreads();

  int64_t low = positions[0], high = low;  // of queries
  for (int r = 1; r < tile.count; ++r) {
    low = positions[r] < low ? positions[r] : low;
    high = positions[r] > high ? positions[r] : high;
  }
  const int64_t past = op.past(tile.row);
  int64_t oldest = low - op.window + 1;  // that any of the queries sees
  if (op.past_lengths && oldest < past - heads.capacity) oldest = past - heads.capacity;  // overwritten
  if (oldest < 0) oldest = 0;
  const int64_t pieces = (high - oldest + slots) / slots, share = (pieces + op.splits - 1) / op.splits * slots;
  const int64_t begin = oldest + split * share;
  const int64_t end = begin + share < high + 1 ? begin + share : high + 1;

  const int side = id / slots, slot = id % slots;
  const Columns<Cell> keys(op, tile.row, 2 * tile.pair + side, 0);
  const bool has_column = id < 2 * size;
  const int half = id >= size ? 1 : 0, column = id - half * size;
  const Columns<Cell> values(op, tile.row, 2 * tile.pair + (has_column ? half : 0), 1);
  float sums[2][kRows] = {};
  for (int64_t start = begin; start < end; start += slots) {
    const int64_t at = start + slot;
    float products[kRows] = {};
    if (at < end) {
      const int64_t in_ring = at < heads.capacity ? at : at % heads.capacity;
      const int place = static_cast<int>(at < past ? in_ring : past - at - 1);
      if (side == 0) places[slot] = place;
      multiply(queries + side * kRows * padded, padded, keys.cells(place), size, op.aligned, products);
      if constexpr (kScaled<Cell>) {
        const float step = keys.scale(place);
        for (int r = 0; r < kRows; ++r) products[r] *= step;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool seen = at < end && at <= positions[r] && at > positions[r] - op.window;
      scores[(side * kRows + r) * slots + slot] = seen ? products[r] : -INFINITY;
    }
    __syncthreads();
    for (int r = warp; r < 2 * kRows; r += warps) {
      weigh_scores(scores + r * slots, slots, largest + r, totals + r, factors + r, lane);
    }
    __syncthreads();
    if (has_column) {
      const int count = static_cast<int>(end - start < slots ? end - start : slots);
#pragma unroll
      for (int r = 0; r < 2 * kRows; ++r) sums[r / kRows][r % kRows] *= factors[r];
      for (int s = 0; s < count; s += 4) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool exists = s + i < count;
          const int place = exists ? places[s + i] : 0;
          value[i] = exists ? to_float(values.cells(place)[column]) * values.scale(place) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < 2 * kRows; ++r) {
          const float4 weights = *reinterpret_cast<const float4*>(scores + r * slots + s);
          sums[r / kRows][r % kRows] += weights.x * value[0] + weights.y * value[1] + weights.z * value[2] +
                                        weights.w * value[3];
        }
      }
    }
    __syncthreads();  // before the next piece takes the place
  }

  if (op.splits == 1) {
    write_output(heads, tile, sums, totals, scores);
    return;
  }
  float* const part = op.parts + (index * op.splits + split) * 2 * kRows * (2 + 2 * size);
  if (id < 2 * kRows) {
    part[id] = largest[id];
    part[2 * kRows + id] = totals[id];
  }
  if (!has_column) return;
#pragma unroll
  for (int r = 0; r < 2 * kRows; ++r) part[4 * kRows + r * 2 * size + id] = sums[r / kRows][r % kRows];
}

// Puts the parts of a tile together; a block a tile.
template <int kRows, class Cell, class T>
__global__ void __launch_bounds__(kMostThreads) merge(const Sweep<Cell, T> op) {
  const HeadsOf<T>& heads = op.heads;
  const int size = static_cast<int>(heads.head_size), id = threadIdx.x;
  const int64_t stride = 2 * kRows * (2 + 2 * size);
  const float* const parts = op.parts + blockIdx.x * op.splits * stride;
  float* const totals = shared_memory;  // [2 * kRows]
  float* const largest = totals + 2 * kRows;
  if (id < 2 * kRows) {
    float top = -FLT_MAX, total = 0.0f;
    for (int64_t i = 0; i < op.splits; ++i) top = fmaxf(top, parts[i * stride + id]);
    for (int64_t i = 0; i < op.splits; ++i) {
      total += expf(parts[i * stride + id] - top) * parts[i * stride + 2 * kRows + id];
    }
    largest[id] = top;
    totals[id] = total;
  }
  __syncthreads();
  float sums[2][kRows] = {};
  for (int64_t i = 0; i < op.splits && id < 2 * size; ++i) {
    const float* const part = parts + i * stride;
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) {
      sums[r / kRows][r % kRows] += expf(part[r] - largest[r]) * part[4 * kRows + r * 2 * size + id];
    }
  }
  write_output(heads, Tile<kRows>(heads, blockIdx.x), sums, totals, largest + 2 * kRows);
}

template <int kRows, class Cell, class T>
void run_tiles(Sweep<Cell, T> op, const Stream& stream) {
  const HeadsOf<T>& heads = op.heads;
  const int64_t threads = (2 * heads.head_size + 63) / 64 * 64;  // a piece's slots are whole warps
  const Layout layout(static_cast<int>(threads), static_cast<int>(heads.head_size), kRows);
  const int64_t all = heads.queries * (heads.heads / heads.kv_heads);
  const int64_t tiles = heads.batch * (heads.kv_heads / 2) * ((all + kRows - 1) / kRows);
  if (tiles < 1) return;
  const int64_t reach = op.past_lengths ? heads.capacity + heads.queries : heads.capacity;
  const int64_t pieces = ((op.window < reach ? op.window : reach) + layout.slots - 1) / layout.slots;
  const int64_t wanted = kBlocksEach * stream.multiprocessors() / tiles;
  op.splits = clamped(wanted, 1, pieces);
  if (op.splits == 1) {
    stream.launch(sweep<kRows, Cell, T>, tiles, threads, layout.floats(), op);
    return;
  }
  const int64_t part = 2 * kRows * (2 + 2 * heads.head_size);
  const Scratch<float> parts(stream, tiles * op.splits * part);
  op.parts = parts.data();
  stream.launch(sweep<kRows, Cell, T>, tiles * op.splits, threads, layout.floats(), op);
  stream.launch(merge<kRows, Cell, T>, tiles, threads, 4 * kRows + threads / kWarp * kRows, op);
}

}  // namespace

template <class Cell, class T>
void attend(Sweep<Cell, T> op, const Stream& stream) {
  const HeadsOf<T>& heads = op.heads;
  if (heads.head_size > kMostHeadSize || heads.capacity > INT32_MAX || heads.queries >= INT32_MAX) {
    throw stream.context().fault(0, "or its cache has heads of " + std::to_string(heads.head_size) + " columns, " +
                                        std::to_string(heads.capacity) + " slots",
                                 std::to_string(kMostHeadSize) + " columns at most, and 2^31 - 1 slots");
  }
  const auto is_aligned = [&](const Slots<const Cell>& slots) {
    return reinterpret_cast<uintptr_t>(slots.cells) % 16 == 0;
  };
  op.aligned = heads.head_size * sizeof(Cell) % 16 == 0 && is_aligned(op.cache.key) && is_aligned(op.fresh.key);
  if (heads.queries * (heads.heads / heads.kv_heads) <= 2) {
    run_tiles<2>(op, stream);
  } else {
    run_tiles<8>(op, stream);
  }
}

#define SAMBAY_INSTANTIATE(Cell, T) template void attend(Sweep<Cell, T>, const Stream&);
SAMBAY_FOR_CACHES(SAMBAY_INSTANTIATE)

}  // namespace sambay::cuda
