// Selective scan (Mamba-1).
//
// Four lanes share a channel: each holds a quarter of its states in registers for the whole call. Tokens
// pass in pieces: a block puts a piece of all inputs into shared memory, softplus taken, with every thread
// reading neighbouring addresses; then every channel moves on token by token. One token is one piece.
#include "device.cuh"
#include "operators.h"

namespace sambay::cuda {
namespace {

constexpr int kLanes = 4, kChannels = 32, kThreads = kLanes * kChannels;
constexpr int kPiece = 16;        // tokens
constexpr int64_t kMostStates = 64;

// kStates: states of one lane, those beyond op.states are zeros.
template <int kStates, class T>
__global__ void __launch_bounds__(kThreads) scan(const ScanOf<T> op) {
  const int states = static_cast<int>(op.states);
  float* const deltas = shared_memory;  // [kPiece, kChannels], as are the next two
  float* const drives = deltas + kPiece * kChannels;
  float* const results = drives + kPiece * kChannels;
  float* const B = results + kPiece * kChannels;  // [kPiece, states], as is C
  float* const C = B + kPiece * states;
  const int64_t across = (op.channels + kChannels - 1) / kChannels;
  const int64_t row = blockIdx.x / across, start = blockIdx.x % across * kChannels;
  const int local = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t channel = start + local, length = clamped(op.lengths[row], 0, op.tokens);
  const bool is_real = channel < op.channels;

  float rates[kStates], h[kStates];
  for (int i = 0; i < kStates; ++i) {
    const int n = lane + kLanes * i;
    const bool exists = is_real && n < states;
    rates[i] = exists ? op.A[channel * states + n] : 0.0f;
    h[i] = exists ? op.past_state[(row * op.channels + channel) * states + n] : 0.0f;
  }
  for (int64_t first = 0; first < op.tokens; first += kPiece) {
    const int tokens = static_cast<int>(op.tokens - first < kPiece ? op.tokens - first : kPiece);
    for (int i = threadIdx.x; i < tokens * kChannels; i += kThreads) {
      const int64_t t = first + i / kChannels, c = start + i % kChannels;
      if (c >= op.channels) continue;
      const int64_t at = (row * op.tokens + t) * op.channels + c;
      const float x = to_float(op.x[at]);
      deltas[i] = t < length ? softplus(to_float(op.dt[at]) + op.dt_bias[c]) : 0.0f;
      drives[i] = deltas[i] * x;
      results[i] = op.D[c] * x;
    }
    for (int i = threadIdx.x; i < tokens * states; i += kThreads) {
      const int64_t at = (row * op.tokens + first) * states + i;
      B[i] = to_float(op.B[at]);
      C[i] = to_float(op.C[at]);
    }
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      const int at = t * kChannels + local;
      const float delta = is_real ? deltas[at] : 0.0f, drive = is_real ? drives[at] : 0.0f;
      float sum = 0.0f;
      for (int i = 0; i < kStates; ++i) {
        const int n = lane + kLanes * i;
        if (n >= states) break;
        h[i] = expf(delta * rates[i]) * h[i] + drive * B[t * states + n];
        sum += h[i] * C[t * states + n];
      }
      for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane == 0 && is_real) results[at] += sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * kChannels; i += kThreads) {
      const int64_t t = first + i / kChannels, c = start + i % kChannels;
      if (c < op.channels) store(op.y + (row * op.tokens + t) * op.channels + c, results[i]);
    }
    __syncthreads();  // before the next piece takes the place
  }
  for (int i = 0; i < kStates; ++i) {
    const int n = lane + kLanes * i;
    if (is_real && n < states) op.present_state[(row * op.channels + channel) * states + n] = h[i];
  }
}

}  // namespace

template <class T>
void selective_scan(const ScanOf<T>& op, const Stream& stream) {
  if (op.states > kMostStates) {
    throw stream.context().fault(3, "has " + std::to_string(op.states) + " states",
                                 std::to_string(kMostStates) + " at most on a CUDA device");
  }
  const int64_t blocks = op.batch * ((op.channels + kChannels - 1) / kChannels);
  const int64_t floats = kPiece * (3 * kChannels + 2 * op.states);
  stream.launch(op.states <= 16 ? scan<4, T> : scan<16, T>, blocks, kThreads, floats, op);
}

template void selective_scan(const ScanOf<float>&, const Stream&);
template void selective_scan(const ScanOf<Half>&, const Stream&);

}  // namespace sambay::cuda
