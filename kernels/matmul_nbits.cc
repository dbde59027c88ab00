// Products with weights in blocks that share a scale. Compiled once for each instruction set, by isa_*.cc.
//
// The weights are read where they lie, as the file has them: a process keeps no second copy. Inputs are
// quantized in blocks of 32, products of integers are exact, and every such block's sum is scaled and
// added in float32; a larger block of weights is as many of 32 with the same scale. An input is taken as
// one signed byte, or as two, 256 * high + low: 16 bits, next to exact. One token is bound by reading the
// weights, so its second byte costs nothing.

namespace sambay::SAMBAY_ISA {

constexpr int64_t kQuantBlock = 32;    // inputs that share a scale
constexpr int kGroup = kWidth / 4;     // blocks of 4-bit weights in a vector
constexpr int kChunk = 16;             // blocks unpacked at once: the tile and the inputs stay in L1
constexpr int kTile = 2;               // vectors of outputs that a task computes
constexpr int kTileTokens = 4;           // tokens whose sums are in registers at once
constexpr int64_t kExactTokens = 8;    // up to here inputs have 16 bits in any case
constexpr int64_t kTaskBytes = 65536;  // weights that a task of one token reads, at least

inline int64_t round_up(int64_t count, int64_t group) { return (count + group - 1) / group * group; }

// Blocks of kQuantBlock in a row of weights.
inline int64_t row_blocks(const MatMulNBits& op) { return round_up(op.inputs, op.block_size) / kQuantBlock; }

// Scales of kWidth blocks of kQuantBlock, or of `count` < kWidth, as they are stored from place `first` on, each
// for `each` blocks. One that is not stored is 0.
template <class Scale>
inline Vec scales_of(const Scale* stored, int64_t first, int64_t count, int each) {
  if (each == 1) return load_some(stored + first, count);
  return spread(load(stored + first, (count + each - 1) / each), 0, each);
}

// Scales of `count` blocks of kQuantBlock in a row, from block `first` on; both are multiples of what a larger
// block holds. `room` has space for them, and is used unless the weight has them just so.
inline const float* read_scales(const MatMulNBits& op, int64_t row, int64_t first, int64_t count, float* room) {
  const int each = static_cast<int>(op.block_size / kQuantBlock);
  const int64_t start = (row * row_blocks(op) + first) / each;
  const auto read = [&](const auto* stored) {
    prefetch(stored + start + count / each);
    for_vectors(count, [&](int64_t b, int64_t some) {
      store_some(room + b, scales_of(stored, start + b / each, some, each), some);
    });
  };
  if (op.scales && each == 1) return op.scales + start;
  if (op.scales) {
    read(op.scales);
  } else {
    read(op.half_scales);
  }
  return room;
}

// Inputs as integers. A block's 32 bytes stand as its weights do: of 4-bit weights the even inputs
// come first (low halves), then the odd ones. kGrouped blocks have their first halves side by side.
template <int kBits, int kPlanes, int64_t kGrouped>
struct QuantizedInputs {
  explicit QuantizedInputs(const MatMulNBits& op)
      : blocks(round_up(row_blocks(op), kGroup)),
        plane_size(blocks * kQuantBlock),
        bytes(op.tokens * kPlanes * plane_size),
        scales(op.tokens * blocks),
        offsets(op.tokens * blocks) {}

  void quantize_token(const MatMulNBits& op, int64_t token) const {
    const float* x = op.x + token * op.inputs;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t left = op.inputs - b * kQuantBlock;
      const int64_t place = b / kGrouped * kGrouped * kQuantBlock + b % kGrouped * (kQuantBlock / 2);
      quantize_block(x + b * kQuantBlock, left < 0 ? 0 : left < kQuantBlock ? left : kQuantBlock,
                     bytes.data() + token * kPlanes * plane_size + place,
                     scales.data() + token * blocks + b, offsets.data() + token * blocks + b);
    }
  }

  void quantize_block(const float* x, int64_t count, int8_t* out, float* scale, int32_t* offset) const;

  int64_t blocks;            // whole groups
  int64_t plane_size;        // bytes of one plane of one token
  Scratch<int8_t> bytes;     // [tokens, planes, plane_size], the high plane first
  Scratch<float> scales;     // [tokens, blocks]
  Scratch<int32_t> offsets;  // [tokens, blocks]: what to add to a block's sum for its centre
};

// One block of `count` inputs; a NaN or an infinity makes its scale NaN.
template <int kBits, int kPlanes, int64_t kGrouped>
inline void QuantizedInputs<kBits, kPlanes, kGrouped>::quantize_block(const float* x, int64_t count,
                                                                      int8_t* out, float* scale,
                                                                      int32_t* offset) const {
  constexpr float kLimit = kPlanes == 2 ? 257.0f * kLargestInput : 1.0f * kLargestInput;
  constexpr int kHalf = kQuantBlock / 2;
  alignas(64) float block[kQuantBlock];
  if (count < kQuantBlock) {
    std::memset(block, 0, sizeof block);
    for (int64_t i = 0; i < count; ++i) block[i] = x[i];
    x = block;
  }
  Vec most = set(0.0f), zero = set(0.0f);
  for (int64_t i = 0; i < kQuantBlock; i += kWidth) {
    const Vec some = load(x + i);
    most = max(most, max(some, set(0.0f) - some));
    zero = fma(some, set(0.0f), zero);
  }
  const float top = largest(most);
  const float inverse = top > 1e-30f ? kLimit / top : 0.0f;
  *scale = (top > 1e-30f ? top / kLimit : 0.0f) + sum(zero);

  const Vec bias = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  for (int64_t i = 0; i < kQuantBlock; i += kWidth) {
    store(block + i, fma(load(x + i), set(inverse), bias));
  }
  int32_t whole[kQuantBlock];
  std::memcpy(whole, block, sizeof whole);
  int32_t total = 0;
  for (int32_t& value : whole) {
    value = static_cast<int16_t>(value);
    if (kPlanes == 2) value += (value & 255) == 128;  // no low byte is -128
    total += value;
  }
  *offset = -total * (kBits == 4 ? 8 : kByteCentre);

  for (int plane = 0; plane < kPlanes; ++plane) {
    int8_t bytes_of[kQuantBlock];
    for (int i = 0; i < kQuantBlock; ++i) {
      const int32_t high = (whole[i] + 128) >> 8;
      bytes_of[i] = static_cast<int8_t>(kPlanes == 1 ? whole[i] : plane == 0 ? high : whole[i] - high * 256);
    }
    int8_t* const first = out + plane * plane_size;
    int8_t* const second = first + kGrouped * kHalf;
    if (kBits == 8) {
      std::memcpy(first, bytes_of, kHalf);
      std::memcpy(second, bytes_of + kHalf, kHalf);
      continue;
    }
    uint16_t pairs[kHalf];  // the even one in the low half: every processor here is little-endian
    std::memcpy(pairs, bytes_of, sizeof pairs);
    for (int i = 0; i < kHalf; ++i) {
      first[i] = static_cast<int8_t>(pairs[i] & 0xFF);
      second[i] = static_cast<int8_t>(pairs[i] >> 8);
    }
  }
}

// --- one token: every row of weights is read once, from its start to its end

template <int kBits>
struct OneToken {
  explicit OneToken(const MatMulNBits& op)
      : quantized(op),
        high(quantized.bytes.data()),
        low(high + quantized.plane_size),
        blocks(round_up(quantized.blocks, kWidth)),
        scales(blocks),
        centres(blocks) {
    quantized.quantize_token(op, 0);
    for (int64_t b = 0; b < blocks; ++b) {
      const bool stored = b < quantized.blocks;
      scales.data()[b] = stored ? quantized.scales.data()[b] : 0.0f;
      centres.data()[b] = stored ? static_cast<float>(quantized.offsets.data()[b]) : 0.0f;
    }
  }

  QuantizedInputs<kBits, 2, kBits == 4 ? kGroup : 1> quantized;
  const int8_t *high, *low;
  int64_t blocks;          // whole vectors
  Scratch<float> scales;   // [blocks]
  Scratch<float> centres;  // [blocks]: what a block's stored values have too much, times its inputs
};

// Adds group g of blocks to the sum of a row. `factors` are those of the kWidth blocks that it stands among, as
// group `place` of them.
template <int kBits>
inline Vec add_group(const OneToken<kBits>& x, int64_t g, const uint8_t* weight, Vec factors, int place, Vec total) {
  constexpr int kParts = kBits / 4, kEach = kBits == 4 ? 4 : 8;  // lanes that hold a part of one block's sum
  const int8_t *const high = x.high + g * 2 * kBytes, *const low = x.low + g * 2 * kBytes;
  for (int part = 0; part < kParts; ++part) {
    const uint8_t* const here = weight + part * kBytes;
    keep_order();
    if ((place * kParts + part) * kBytes % kLine == 0) {
      prefetch_far(here + kPrefetchFar);
      prefetch(here + kPrefetch);
    }
    const Bytes stored = load_bytes(here);
    const auto dot = [&](Ints sum, const int8_t* inputs) {
      if (kBits == 8) return add_products<kBits>(sum, stored, load_bytes(inputs + part * kBytes));
      sum = add_products<kBits>(sum, low_halves(stored), load_bytes(inputs));
      return add_products<kBits>(sum, high_halves(stored), load_bytes(inputs + kBytes));
    };
    Ints sum = times_256(whole_sum<kBits>(dot(set_ints(0), high)));
    if (kSumsStartAnywhere<kBits>) {
      sum = dot(sum, low);
    } else {
      sum = sum + whole_sum<kBits>(dot(set_ints(0), low));
    }
    total = fma(to_floats(sum), spread(factors, place * kGroup + part * kWidth / kEach, kEach), total);
  }
  return total;
}

// Output n.
//
// A row at a time, so that weights are read in one stream: as many lines are on their way as a core has room
// for only if each is asked for long before its turn, first for the second cache, then for the first.
template <int kBits, class Scale>
float dot_row(const MatMulNBits& op, const Scale* stored_scales, const OneToken<kBits>& x, int64_t n) {
  constexpr int64_t kBlockBytes = kQuantBlock * kBits / 8, kGroupBytes = kGroup * kBlockBytes;
  constexpr int64_t kScalesAhead = kPrefetch / static_cast<int64_t>(sizeof(Scale));
  const int64_t blocks = row_blocks(op);
  const int each = static_cast<int>(op.block_size / kQuantBlock);
  const Scale* const scales = stored_scales + n * blocks / each;
  const uint8_t* weight = op.weight + n * blocks * kBlockBytes;
  Vec centre = set(0.0f), total = set(0.0f);
  for (int64_t b = 0; b < blocks; b += kWidth) {
    const int64_t left = blocks - b < kWidth ? blocks - b : kWidth;
    prefetch(scales + b / each + kScalesAhead);
    const Vec factors = scales_of(scales, b / each, left, each) * load(x.scales.data() + b);
    centre = fma(factors, load(x.centres.data() + b), centre);
    const int whole = static_cast<int>(left / kGroup);
    for (int place = 0; place < whole; ++place) {
      total = add_group(x, b / kGroup + place, weight, factors, place, total);
      weight += kGroupBytes;
    }
    if (left % kGroup) {
      uint8_t last[kGroupBytes] = {};
      std::memcpy(last, weight, static_cast<size_t>(left % kGroup * kBlockBytes));
      total = add_group(x, b / kGroup + whole, last, factors, whole, total);
    }
  }
  return sum(total + centre);
}

template <int kBits>
void one_token(const MatMulNBits& op, const Pool& pool) {
  const OneToken<kBits> x(op);
  const int64_t row_bytes = row_blocks(op) * kQuantBlock * kBits / 8;
  const int64_t rows = 1 + kTaskBytes / row_bytes;
  pool((op.outputs + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = (task + 1) * rows < op.outputs ? (task + 1) * rows : op.outputs;
    for (int64_t n = task * rows; n < end; ++n) {
      op.y[n] = op.scales ? dot_row(op, op.scales, x, n) : dot_row(op, op.half_scales, x, n);
    }
  });
}

// --- more tokens: a tile of weights is turned, so that lanes are outputs, and meets every token

struct WeightTile {
  int blocks = 0;
  alignas(64) uint8_t weight[kChunk * 8 * kTile * kBytes];  // [blocks, 8 fours of inputs, outputs, 4]
  alignas(64) float scales[kChunk * kTile * kWidth];        // [blocks, outputs]
};

template <int kBits>
void unpack_tile(const MatMulNBits& op, int64_t output, int64_t block, WeightTile& tile) {
  constexpr int64_t kBlockBytes = kQuantBlock * kBits / 8;
  const int64_t blocks = row_blocks(op);
  alignas(64) float room[kWidth][kChunk];
  for (int v = 0; v < kTile; ++v) {
    const uint8_t *rows[kWidth], *scales[kWidth];
    for (int i = 0; i < kWidth; ++i) {  // rows beyond the last one repeat it; nobody reads their sums
      const int64_t n = output + v * kWidth + i, row = n < op.outputs ? n : op.outputs - 1;
      rows[i] = op.weight + (row * blocks + block) * kBlockBytes;
      scales[i] = reinterpret_cast<const uint8_t*>(read_scales(op, row, block, tile.blocks, room[i]));
    }
    for (int b = 0; b < tile.blocks; ++b) {
      uint8_t* const to = tile.weight + (b * 8 * kTile + v) * kBytes;
      const auto place = [&](int four) { return to + four * kTile * kBytes; };
      for (int half = 0; half < kBits / 4; ++half) {
        Bytes turned[4];
        turn_fours(rows, turned);
        for (int j = 0; j < 4; ++j) {
          if (kBits == 4) {
            store_bytes(place(j), low_halves(turned[j]));
            store_bytes(place(4 + j), high_halves(turned[j]));
          } else {
            store_bytes(place(4 * half + j), turned[j]);
          }
        }
        for (auto& row : rows) {
          if (b % 4 == 0) prefetch(row + kChunk * kBlockBytes);
          row += 16;
        }
      }
    }
    int b = 0;
    for (; b + 4 <= tile.blocks; b += 4) {
      Bytes turned[4];
      turn_fours(scales, turned);
      for (int j = 0; j < 4; ++j) store_bytes(tile.scales + ((b + j) * kTile + v) * kWidth, turned[j]);
      for (auto& row : scales) row += 4 * sizeof(float);
    }
    for (; b < tile.blocks; ++b) {
      for (int i = 0; i < kWidth; ++i) {
        std::memcpy(tile.scales + (b * kTile + v) * kWidth + i, scales[i], sizeof(float));
        scales[i] += sizeof(float);
      }
    }
  }
}

// Adds a tile's blocks to the sums of kRows tokens from `token` on.
template <int kBits, int kPlanes, int kRows>
inline void add_tile(const QuantizedInputs<kBits, kPlanes, 1>& x, const WeightTile& tile, int64_t token, int64_t block,
                     Vec (&sums)[kTileTokens][kTile]) {
  const int64_t row_size = kPlanes * x.plane_size;
  const int8_t* inputs = x.bytes.data() + token * row_size + block * kQuantBlock;
  const float* scales = x.scales.data() + token * x.blocks + block;
  const int32_t* offsets = x.offsets.data() + token * x.blocks + block;
  const uint8_t* weight = tile.weight;
  for (int b = 0; b < tile.blocks; ++b) {
    Ints found[kRows][kTile];
    for (int m = 0; m < kRows; ++m) {
      for (Ints& part : found[m]) part = set_ints(offsets[m * x.blocks]);
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      Ints parts[kRows][kTile];
      for (auto& row : parts) {
        for (Ints& part : row) part = set_ints(0);
      }
      for (int j = 0; j < 8; ++j) {
        Bytes weights[kTile];
        for (int v = 0; v < kTile; ++v) weights[v] = load_bytes(weight + (j * kTile + v) * kBytes);
        for (int m = 0; m < kRows; ++m) {
          const Bytes input = repeat_four(inputs + m * row_size + plane * x.plane_size + 4 * j);
          for (int v = 0; v < kTile; ++v) {
            parts[m][v] = add_products<kBits>(parts[m][v], weights[v], input);
          }
        }
      }
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kTile; ++v) {
          const Ints part = whole_sum<kBits>(parts[m][v]);
          found[m][v] = found[m][v] + (plane + 1 < kPlanes ? times_256(part) : part);
        }
      }
    }
    for (int v = 0; v < kTile; ++v) {
      const Vec scale = load(tile.scales + (b * kTile + v) * kWidth);
      for (int m = 0; m < kRows; ++m) {
        sums[m][v] = fma(to_floats(found[m][v]) * scale, set(scales[m * x.blocks]), sums[m][v]);
      }
    }
    inputs += kQuantBlock;
    weight += 8 * kTile * kBytes;
    ++scales;
    ++offsets;
  }
}

template <int kBits, int kPlanes, int kRows>
void add_rows(const MatMulNBits& op, const QuantizedInputs<kBits, kPlanes, 1>& x, const WeightTile& tile, int64_t token,
              int64_t output, int64_t block) {
  Vec sums[kTileTokens][kTile];
  const auto each_part = [&](auto body) {
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kTile; ++v) {
        const int64_t n = output + v * kWidth, left = op.outputs - n;
        if (left > 0) body(op.y + (token + m) * op.outputs + n, left < kWidth ? left : kWidth, sums[m][v]);
      }
    }
  };
  for (auto& row : sums) {
    for (Vec& part : row) part = set(0.0f);
  }
  if (block > 0) each_part([](float* y, int64_t count, Vec& part) { part = load_some(y, count); });
  add_tile<kBits, kPlanes, kRows>(x, tile, token, block, sums);
  each_part([](float* y, int64_t count, Vec& part) { store_some(y, part, count); });
}

template <int kBits, int kPlanes>
void many_tokens(const MatMulNBits& op, const Pool& pool) {
  const QuantizedInputs<kBits, kPlanes, 1> x(op);
  constexpr int64_t kQuantizedTokens = 8;  // by one task
  pool((op.tokens + kQuantizedTokens - 1) / kQuantizedTokens, [&](int64_t task) {
    const int64_t end = (task + 1) * kQuantizedTokens;
    for (int64_t t = task * kQuantizedTokens; t < end && t < op.tokens; ++t) x.quantize_token(op, t);
  });
  constexpr int64_t kOutputs = kTile * kWidth;
  const int64_t blocks = row_blocks(op);
  pool((op.outputs + kOutputs - 1) / kOutputs, [&](int64_t task) {
    WeightTile tile;
    const int64_t n = task * kOutputs;
    for (int64_t b = 0; b < blocks; b += kChunk) {
      tile.blocks = static_cast<int>(blocks - b < kChunk ? blocks - b : kChunk);
      unpack_tile<kBits>(op, n, b, tile);
      int64_t t = 0;
      for (; t + kTileTokens <= op.tokens; t += kTileTokens) {
        add_rows<kBits, kPlanes, kTileTokens>(op, x, tile, t, n, b);
      }
      switch (op.tokens - t) {
        case 3: add_rows<kBits, kPlanes, 3>(op, x, tile, t, n, b); break;
        case 2: add_rows<kBits, kPlanes, 2>(op, x, tile, t, n, b); break;
        case 1: add_rows<kBits, kPlanes, 1>(op, x, tile, t, n, b); break;
        default: break;
      }
    }
  });
}

template <int kBits>
void matmul_bits(const MatMulNBits& op, const Pool& pool) {
  if (op.tokens == 1) {
    one_token<kBits>(op, pool);
  } else if (op.tokens <= kExactTokens || op.exact) {
    many_tokens<kBits, 2>(op, pool);
  } else {
    many_tokens<kBits, 1>(op, pool);
  }
}

void matmul_nbits(const MatMulNBits& op, const Pool& pool) {
  if (op.bits == 4) {
    matmul_bits<4>(op, pool);
  } else {
    matmul_bits<8>(op, pool);
  }
}

}  // namespace sambay::SAMBAY_ISA
