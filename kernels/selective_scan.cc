// Selective scan (Mamba-1). Compiled once for each instruction set, by isa_*.cc.
//
// A task takes a block of channels of one row through all tokens. A vector holds states of one
// channel, as they stand in memory; kWidth channels are summed over their states at once, which
// costs a tree of shuffles instead of a horizontal sum each. The state stays in the L1 cache.

namespace sambay::SAMBAY_ISA {

// One token of up to kWidth channels: state [channels, states] moves on, y gets scan + D x.
// kVectors: vectors a channel's states fill exactly; 0 where they do not.
template <int kVectors>
inline void scan_step(const Scan& op, int64_t channel, int64_t channels, bool moves, const float* x,
                      const float* dt, const float* B, const float* C, float* state, float* y) {
  const Vec wide = load_some(x, channels);
  Vec delta = set(0.0f);
  if (moves) delta = softplus(load_some(dt, channels) + load_some(op.dt_bias + channel, channels));
  alignas(64) float deltas[kWidth], drives[kWidth];
  store(deltas, delta);
  store(drives, delta * wide);
  Vec scanned[kWidth];
  const float* A = op.A + channel * op.states;
  for (int64_t c = 0; c < kWidth; ++c) {
    scanned[c] = set(0.0f);
    if (c >= channels) continue;
    const Vec rate = set(deltas[c]), drive = set(drives[c]);
    const auto states = [&](int64_t n, int64_t count) {
      float* const h = state + c * op.states + n;
      const Vec decay = exp(rate * load_some(A + c * op.states + n, count));
      const Vec moved = fma(decay, load_some(h, count), drive * load_some(B + n, count));
      store_some(h, moved, count);
      scanned[c] = fma(moved, load_some(C + n, count), scanned[c]);
    };
    if (kVectors > 0) {
      for (int v = 0; v < kVectors; ++v) states(v * kWidth, int64_t{kWidth});
    } else {
      for_vectors(op.states, states);
    }
  }
  store_some(y, fma(load_some(op.D + channel, channels), wide, sums(scanned)), channels);
}

template <int kVectors>
void scan_rows(const Scan& op, const Pool& pool) {
  // At one token a task must be worth the call; at many the block's state and A stay in L1.
  const int64_t width = op.tokens < 8 ? 512 : 64;
  const int64_t blocks = (op.channels + width - 1) / width;
  pool(op.batch * blocks, [&](int64_t task) {
    const int64_t row = task / blocks, start = task % blocks * width;
    const int64_t size = op.channels - start < width ? op.channels - start : width;
    const int64_t first = (row * op.channels + start) * op.states;
    float* const state = op.present_state + first;
    if (op.present_state != op.past_state) {
      std::memcpy(state, op.past_state + first, static_cast<size_t>(size * op.states) * sizeof(float));
    }
    for (int64_t t = 0; t < op.tokens; ++t) {
      const int64_t token = row * op.tokens + t, at = token * op.channels + start;
      for_vectors(size, [&](int64_t c, int64_t count) {
        scan_step<kVectors>(op, start + c, count, t < op.lengths[row], op.x + at + c, op.dt + at + c,
                            op.B + token * op.states, op.C + token * op.states,
                            state + c * op.states, op.y + at + c);
      });
    }
  });
}

void selective_scan(const Scan& op, const Pool& pool) {
  if (op.states == kWidth) {
    scan_rows<1>(op, pool);
  } else if (op.states == 2 * kWidth) {
    scan_rows<2>(op, pool);
  } else {
    scan_rows<0>(op, pool);
  }
}

}  // namespace sambay::SAMBAY_ISA
