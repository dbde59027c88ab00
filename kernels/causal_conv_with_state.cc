// Causal depthwise convolution with silu. Compiled once for each instruction set, by isa_*.cc.
//
// A task takes one block of channels of one row through all tokens. Weights and past state have
// channels outermost; the block's share is turned once, so that the tokens run along channels.

namespace sambay::SAMBAY_ISA {

void causal_conv_with_state(const CausalConv& op, const Pool& pool) {
  // At one token a task must be worth the call; at many a narrow block keeps its lines in cache.
  const int64_t width = op.tokens < 16 ? 1024 : 128;
  const int64_t blocks = (op.channels + width - 1) / width;
  const int64_t taps = op.taps, kept = op.taps - 1;
  pool(op.batch * blocks, [&](int64_t task) {
    const int64_t row = task / blocks, start = task % blocks * width;
    const int64_t size = op.channels - start < width ? op.channels - start : width;
    const float* x = op.x + row * op.tokens * op.channels + start;
    float* y = op.y + row * op.tokens * op.channels + start;
    const float* past = op.past_state + (row * op.channels + start) * kept;
    float* present = op.present_state + (row * op.channels + start) * kept;

    const Scratch<float> turned((taps + kept) * size);
    float* const weight = turned.data();          // [taps, size]
    float* const history = weight + taps * size;  // [kept, size]
    for (int64_t c = 0; c < size; ++c) {
      for (int64_t j = 0; j < taps; ++j) weight[j * size + c] = op.weight[(start + c) * taps + j];
      for (int64_t j = 0; j < kept; ++j) history[j * size + c] = past[c * kept + j];
    }
    const auto input = [&](int64_t i) {  // the i-th of past and new inputs
      return i < kept ? history + i * size : x + (i - kept) * op.channels;
    };
    for (int64_t t = 0; t < op.tokens; ++t) {
      for_vectors(size, [&](int64_t c, int64_t count) {
        Vec mixed = load_some(op.bias + start + c, count);
        for (int64_t j = 0; j < taps; ++j) {
          mixed = fma(load_some(weight + j * size + c, count), load_some(input(t + j) + c, count), mixed);
        }
        store_some(y + t * op.channels + c, silu(mixed), count);
      });
    }
    for (int64_t j = 0; j < kept; ++j) {
      const float* last = input(op.lengths[row] + j);
      for (int64_t c = 0; c < size; ++c) present[c * kept + j] = last[c];
    }
  });
}

}  // namespace sambay::SAMBAY_ISA
