// Causal depthwise convolution with silu.
//
// A thread takes one channel through a chunk of tokens; neighbours read neighbouring channels. The thread
// with a channel's first chunk alone reads the past state and writes the present one, so both may be one
// memory: chunks are no shorter than the state.
#include "device.cuh"
#include "operators.h"

namespace sambay::cuda {
namespace {

constexpr int64_t kThreads = 128, kChunk = 16;

// kTaps: taps of the filter, whose weights then stay in registers; 0: any number.
template <int kTaps, class T>
__global__ void convolve(const CausalConvOf<T> op, int64_t chunk) {
  const int64_t across = (op.channels + kThreads - 1) / kThreads;
  const int64_t chunks = op.tokens > chunk ? (op.tokens + chunk - 1) / chunk : 1;
  const int64_t block = blockIdx.x, row = block / across / chunks, first = block / across % chunks * chunk;
  const int64_t channel = block % across * kThreads + threadIdx.x;
  if (channel >= op.channels) return;
  const int64_t taps = kTaps ? kTaps : op.taps, kept = taps - 1;
  const T* const x = op.x + row * op.tokens * op.channels + channel;
  const T* const past = op.past_state + (row * op.channels + channel) * kept;
  const T* const weight = op.weight + channel * taps;
  const auto input = [&](int64_t i) {  // the i-th of past and new inputs
    return to_float(i < kept ? past[i] : x[(i - kept) * op.channels]);
  };
  float weights[kTaps ? kTaps : 1], seen[kTaps ? kTaps : 1];  // seen: the inputs under the filter
  for (int j = 0; j < kTaps; ++j) weights[j] = to_float(weight[j]);
  for (int j = 1; j < kTaps; ++j) seen[j] = input(first + j - 1);
  const float bias = to_float(op.bias[channel]);
  const int64_t end = first + chunk < op.tokens ? first + chunk : op.tokens;
  T* y = op.y + (row * op.tokens + first) * op.channels + channel;
  for (int64_t t = first; t < end; ++t, y += op.channels) {
    float mixed = bias;
    if (kTaps) {
      for (int j = 0; j + 1 < kTaps; ++j) seen[j] = seen[j + 1];
      seen[kTaps ? kTaps - 1 : 0] = input(t + kept);
      for (int j = 0; j < kTaps; ++j) mixed += weights[j] * seen[j];
    } else {
      for (int64_t j = 0; j < taps; ++j) mixed += to_float(weight[j]) * input(t + j);
    }
    store(y, silu(mixed));
  }
  if (first > 0) return;
  T* const present = op.present_state + (row * op.channels + channel) * kept;
  const int64_t length = clamped(op.lengths[row], 0, op.tokens);
  for (int64_t j = 0; j < kept; ++j) {  // upwards: what is read was not written yet
    const int64_t from = length + j;
    present[j] = from < kept ? past[from] : x[(from - kept) * op.channels];
  }
}

}  // namespace

template <class T>
void causal_conv_with_state(const CausalConvOf<T>& op, const Stream& stream) {
  const int64_t chunk = op.taps > kChunk ? op.taps : kChunk;
  const int64_t chunks = op.tokens > chunk ? (op.tokens + chunk - 1) / chunk : 1;
  const int64_t blocks = op.batch * chunks * ((op.channels + kThreads - 1) / kThreads);
  stream.launch(op.taps == 4 ? convolve<4, T> : convolve<0, T>, blocks, kThreads, 0, op, chunk);
}

template void causal_conv_with_state(const CausalConvOf<float>&, const Stream&);
template void causal_conv_with_state(const CausalConvOf<Half>&, const Stream&);

}  // namespace sambay::cuda
