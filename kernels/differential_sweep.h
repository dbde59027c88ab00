// Differential attention in one sweep over keys and values: what both attention operators share.
//
//     a_s = softmax(q_s k_s^T / sqrt(D)) [v_0 ; v_1]     s = 0, 1
//     out = (1 - lambda_init) * rms_norm(a_0 - lambda a_1) * norm_weight
//
// A tile is a few queries of one pair of key heads: both sides and all query heads that read the pair
// are its rows, so a key or value is loaded once for all of them. Softmax is online (running maximum
// and sum), so slots pass in blocks and scores are never stored whole. With few tiles the slots are
// split over tasks as well, and the parts merged.
//
// Source: Differential Transformer (arXiv 2410.05258); FlashAttention (arXiv 2205.14135) for the
// online form.

namespace sambay::SAMBAY_ISA {

constexpr int64_t kBlock = 64;         // slots whose scores are held at a time
constexpr int64_t kTileRows = 16;      // rows of one side that a tile aims at
constexpr int64_t kSplitSlots = 512;   // slots of one task where the slots are split
constexpr int64_t kEnoughTiles = 64;   // from here on tiles alone keep the threads busy
constexpr float kEps = 1e-5f;          // of the norm over a pair of heads

// Slots that stand at one stride and hold consecutive positions.
template <class Cell>
struct Source {
  Slots<const Cell> key, value;  // of key head 0
  int64_t slot_stride, head_stride;  // in cells
  int64_t scale_stride;              // from head to head; a head's scales are neighbours
  int64_t first, count;              // position of the first slot, slots
};

template <class Cell>
struct Sources {
  Source<Cell> list[3];
  int64_t used = 0;

  void add(const Source<Cell>& source) {
    if (source.count > 0) list[used++] = source;
  }
  int64_t slots() const {
    int64_t total = 0;
    for (int64_t i = 0; i < used; ++i) total += list[i].count;
    return total;
  }
};

// Asks for what stands at a slot's `offset` one block of slots further on, where a line begins there. Of a head
// of few queries every cell is read once, from four places in turn: no processor sees that coming.
template <bool kAhead, class Cell>
inline void ask_ahead(const Cell* slot, int64_t offset, int64_t stride) {
  if (kAhead && offset * static_cast<int64_t>(sizeof(Cell)) % kLine == 0) {
    keep_order();
    prefetch_far(slot + offset + kBlock * stride);
  }
}

// scores[r][s] = query[r] . key[s] for kRows rows; kWidth sums are formed at once.
template <int kRows, bool kAhead, class Cell>
inline void dot_products(const float* query, int64_t padded, const Cell* key, int64_t stride,
                         int64_t slots, int64_t size, float* scores) {
  constexpr int kSlots = kWidth / kRows;
  for (int64_t slot = 0; slot < slots; slot += kSlots) {
    const Cell* keys[kSlots];
    for (int s = 0; s < kSlots; ++s) {  // beyond the end: the last one again, masked afterwards
      keys[s] = key + (slot + s < slots ? slot + s : slots - 1) * stride;
    }
    Vec products[kWidth];
    for (Vec& product : products) product = set(0.0f);
    const auto columns = [&](int64_t d, int64_t count) {
      Vec rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = load(query + r * padded + d);
      for (int s = 0; s < kSlots; ++s) {
        ask_ahead<kAhead>(keys[s], d, stride);
        const Vec values = load_some(keys[s] + d, count);
        for (int r = 0; r < kRows; ++r) {
          products[r * kSlots + s] = fma(rows[r], values, products[r * kSlots + s]);
        }
      }
    };
    for_vectors(size, columns);
    alignas(64) float summed[kWidth];
    store(summed, sums(products));
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(scores + r * kBlock + slot, summed + r * kSlots, kSlots * sizeof(float));
    }
  }
}

// sums[r] += weights[r] . values for kRows rows and kVectors vectors of columns.
template <int kRows, int kVectors, bool kAhead, class Cell>
inline void weigh_stripe(const float* weights, const Cell* value, int64_t stride, int64_t slots,
                         int64_t count, float* sums, int64_t sums_stride) {
  Vec total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) total[r][c] = load(sums + r * sums_stride + c * kWidth);
  }
  for (int64_t slot = 0; slot < slots; ++slot, value += stride) {
    Vec values[kVectors];
    for (int c = 0; c < kVectors; ++c) {
      ask_ahead<kAhead>(value, c * kWidth, stride);
      values[c] = kVectors > 1 ? load(value + c * kWidth) : load_some(value, count);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set(weights[r * kBlock + slot]);
      for (int c = 0; c < kVectors; ++c) total[r][c] = fma(weight, values[c], total[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store(sums + r * sums_stride + c * kWidth, total[r][c]);
  }
}

template <int kRows, bool kAhead, class Cell>
inline void weigh_values(const float* weights, const Cell* value, int64_t stride, int64_t slots,
                         int64_t size, float* sums, int64_t sums_stride) {
  int64_t d = 0;
  for (; d + kStripe * kWidth <= size; d += kStripe * kWidth) {
    weigh_stripe<kRows, kStripe, kAhead>(weights, value + d, stride, slots, kWidth, sums + d, sums_stride);
  }
  for (; d < size; d += kWidth) {
    const int64_t count = size - d < kWidth ? size - d : kWidth;
    weigh_stripe<kRows, 1, kAhead>(weights, value + d, stride, slots, count, sums + d, sums_stride);
  }
}

// to[r] = from[r] * scales for `rows` rows of kBlock slots; beyond `slots` anything.
inline void scale_rows(const float* from, const Half* scales, int64_t slots, int64_t rows, float* to) {
  for_vectors(slots, [&](int64_t i, int64_t count) {
    const Vec scale = load_some(scales + i, count);
    for (int64_t r = 0; r < rows; ++r) {
      store(to + r * kBlock + i, load(from + r * kBlock + i) * scale);
    }
  });
}

// The running result of a tile, or of a part of its slots: for each row the largest score, the sum of
// exp(score - largest) and the values weighted so, both heads' columns padded to whole vectors.
struct Partial {
  int64_t rows, padded;
  float *largest, *total, *values;

  static int64_t floats(int64_t rows, int64_t padded) { return rows * (2 + 2 * padded); }
  Partial(float* memory, int64_t rows_, int64_t padded_)
      : rows(rows_), padded(padded_), largest(memory), total(memory + rows_), values(memory + 2 * rows_) {}

  void clear() {
    for (int64_t r = 0; r < rows; ++r) {
      largest[r] = -FLT_MAX;  // finite: a first block of masked slots must not give inf - inf
      total[r] = 0.0f;
    }
    std::memset(values, 0, static_cast<size_t>(rows * 2 * padded) * sizeof(float));
  }

  void rescale(int64_t row, float factor) {
    total[row] *= factor;
    float* const of_row = values + row * 2 * padded;
    for (int64_t i = 0; i < 2 * padded; i += kWidth) store(of_row + i, load(of_row + i) * set(factor));
  }

  // Scores [kBlock] of a row become weights relative to its largest score so far.
  void weigh_scores(int64_t row, float* scores) {
    Vec most = set(largest[row]);
    for (int64_t i = 0; i < kBlock; i += kWidth) most = max(load(scores + i), most);
    const float top = sambay::SAMBAY_ISA::largest(most);
    if (top > largest[row]) {
      rescale(row, first(exp(set(largest[row] - top))));
      largest[row] = top;
    }
    Vec added = set(0.0f);
    for (int64_t i = 0; i < kBlock; i += kWidth) {
      const Vec weight = exp(load(scores + i) - set(largest[row]));
      store(scores + i, weight);
      added = added + weight;
    }
    total[row] += sum(added);
  }

  void merge(const Partial& other) {
    for (int64_t r = 0; r < rows; ++r) {
      const float top = other.largest[r] > largest[r] ? other.largest[r] : largest[r];
      rescale(r, first(exp(set(largest[r] - top))));
      const float factor = first(exp(set(other.largest[r] - top)));
      largest[r] = top;
      total[r] += factor * other.total[r];
      float* const mine = values + r * 2 * padded;
      const float* const theirs = other.values + r * 2 * padded;
      for (int64_t i = 0; i < 2 * padded; i += kWidth) {
        store(mine + i, fma(set(factor), load(theirs + i), load(mine + i)));
      }
    }
  }

 private:
  static float first(Vec a) {
    alignas(64) float lanes[kWidth];
    store(lanes, a);
    return lanes[0];
  }
};

// Which queries and heads a tile stands for. Row (side, member, query): member of the group of query
// pairs that read this pair of key heads.
struct Tile {
  int64_t row, pair, first_query, queries, group;

  int64_t side_rows() const { return group * queries; }
};

// Sweeps slots [begin, end) of the sources, counted from the first.
// position(row, query) gives a query's position; it sees positions above it by less than `window`. kAhead: cells are
// asked for before their turn.
template <bool kAhead, class Cell, class PositionOf>
void sweep(const Heads& op, const Tile& tile, const Sources<Cell>& sources, int64_t begin, int64_t end,
           int64_t window, const PositionOf& position, Partial& result) {
  const int64_t size = op.head_size, padded = result.padded, side_rows = tile.side_rows();
  const Scratch<float> memory(2 * side_rows * (padded + (kScaled<Cell> ? 2 : 1) * kBlock));
  float* const queries = memory.data();                    // [2, side_rows, padded]
  float* const scores = queries + 2 * side_rows * padded;  // [2, side_rows, kBlock]
  // Weights times the scales of one head's values, where there are such: [2, side_rows, kBlock].
  float* const weights = kScaled<Cell> ? scores + 2 * side_rows * kBlock : scores;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (int64_t side = 0; side < 2; ++side) {
    for (int64_t member = 0; member < tile.group; ++member) {
      const int64_t head = 2 * (tile.pair * tile.group + member) + side;
      for (int64_t i = 0; i < tile.queries; ++i) {
        const int64_t query = tile.row * op.queries + tile.first_query + i;
        const float* from = op.q + (query * op.heads + head) * size;
        float* to = queries + (side * side_rows + member * tile.queries + i) * padded;
        for (int64_t d = 0; d < padded; ++d) to[d] = d < size ? from[d] * scale : 0.0f;
      }
    }
  }

  int64_t before = 0;  // slots of earlier sources
  for (int64_t index = 0; index < sources.used; before += sources.list[index++].count) {
    const Source<Cell>& source = sources.list[index];
    const int64_t last = end - before < source.count ? end - before : source.count;
    for (int64_t slot = begin > before ? begin - before : 0; slot < last; slot += kBlock) {
      const int64_t slots = last - slot < kBlock ? last - slot : kBlock;
      const auto head = [&](Slots<const Cell> slots_of, int64_t side) {
        return slots_of.cells + (2 * tile.pair + side) * source.head_stride + slot * source.slot_stride;
      };
      const auto scales = [&](Slots<const Cell> slots_of, int64_t side) {
        return slots_of.scales + (2 * tile.pair + side) * source.scale_stride + slot;
      };
      for (int64_t side = 0; side < 2; ++side) {
        int64_t r = side * side_rows;
        const int64_t stop = r + side_rows;
        const auto dots = [&](auto rows) {
          for (; r + rows.value <= stop; r += rows.value) {
            dot_products<rows.value, kAhead>(queries + r * padded, padded, head(source.key, side),
                                             source.slot_stride, slots, size, scores + r * kBlock);
          }
        };
        dots(std::integral_constant<int, 4>{});
        dots(std::integral_constant<int, 2>{});
        dots(std::integral_constant<int, 1>{});
        if constexpr (kScaled<Cell>) {
          float* const of_side = scores + side * side_rows * kBlock;
          scale_rows(of_side, scales(source.key, side), slots, side_rows, of_side);
        }
      }
      for (int64_t r = 0; r < 2 * side_rows; ++r) {
        const int64_t at = position(tile.row, tile.first_query + r % tile.queries);
        const int64_t from = at - window + 1 - (source.first + slot), to = at + 1 - (source.first + slot);
        float* const of_row = scores + r * kBlock;
        for (int64_t i = 0; i < from && i < slots; ++i) of_row[i] = -INFINITY;
        for (int64_t i = to < slots ? (to > 0 ? to : 0) : slots; i < kBlock; ++i) of_row[i] = -INFINITY;
        result.weigh_scores(r, of_row);
      }
      for (int64_t side = 0; side < 2; ++side) {
        if constexpr (kScaled<Cell>) {
          scale_rows(scores, scales(source.value, side), slots, 2 * side_rows, weights);
        }
        int64_t r = 0;
        const auto weigh = [&](auto rows) {
          for (; r + rows.value <= 2 * side_rows; r += rows.value) {
            weigh_values<rows.value, kAhead>(weights + r * kBlock, head(source.value, side),
                                             source.slot_stride, slots, size,
                                             result.values + r * 2 * padded + side * padded, 2 * padded);
          }
        };
        weigh(std::integral_constant<int, 4>{});
        weigh(std::integral_constant<int, 2>{});
      }
    }
  }
}

// The difference of the two sides, normalised, into the output.
inline void write_output(const Heads& op, const Tile& tile, const Partial& result) {
  const int64_t size = op.head_size, padded = result.padded, side_rows = tile.side_rows();
  for (int64_t r = 0; r < side_rows; ++r) {
    const int64_t query = tile.row * op.queries + tile.first_query + r % tile.queries;
    const int64_t head = 2 * (tile.pair * tile.group + r / tile.queries);
    float* const output = op.output + (query * op.heads + head) * size;
    const Vec first = set(1.0f / result.total[r]);
    const Vec second = set(-op.lambda[0] / result.total[side_rows + r]);
    Vec squares = set(0.0f);
    for (int64_t half = 0; half < 2; ++half) {
      const float* a = result.values + r * 2 * padded + half * padded;
      const float* b = a + side_rows * 2 * padded;
      for_vectors(size, [&](int64_t d, int64_t count) {
        const Vec difference = fma(load(a + d), first, load(b + d) * second);
        squares = fma(difference, difference, squares);  // padded columns are zeros
        store_some(output + half * size + d, difference, count);
      });
    }
    const float mean = sum(squares) / static_cast<float>(2 * size);
    const Vec scale = set((1.0f - op.lambda_init) / std::sqrt(mean + kEps));
    for_vectors(2 * size, [&](int64_t d, int64_t count) {
      const Vec weight = scale * load_some(op.norm_weight + d, count);
      store_some(output + d, load_some(output + d, count) * weight, count);
    });
  }
}

// Runs all tiles. sources(row, first_position, last_position) lists the slots that queries at these
// positions may see.
template <class SourcesOf, class PositionOf>
void attend(const Heads& op, int64_t window, const SourcesOf& sources, const PositionOf& position,
            const Pool& pool) {
  const int64_t pairs = op.kv_heads / 2, group = op.heads / op.kv_heads;
  const int64_t queries = group < kTileRows ? kTileRows / group : 1;  // of a tile
  const int64_t across = (op.queries + queries - 1) / queries;
  const int64_t tiles = op.batch * pairs * across;
  const int64_t padded = (op.head_size + kWidth - 1) / kWidth * kWidth;
  const auto tile_at = [&](int64_t index) {
    const int64_t first = index % across * queries;
    const int64_t count = op.queries - first < queries ? op.queries - first : queries;
    return Tile{index / across / pairs, index / across % pairs, first, count, group};
  };
  const auto sources_of = [&](const Tile& tile) {
    int64_t low = position(tile.row, tile.first_query), high = low;
    for (int64_t i = 1; i < tile.queries; ++i) {
      const int64_t at = position(tile.row, tile.first_query + i);
      low = at < low ? at : low;
      high = at > high ? at : high;
    }
    return sources(tile.row, low, high);
  };
  const auto sweep_tile = [&](const Tile& tile, const auto& seen, int64_t begin, int64_t end, Partial& result) {
    if (tile.queries == 1) {
      sweep<true>(op, tile, seen, begin, end, window, position, result);
    } else {
      sweep<false>(op, tile, seen, begin, end, window, position, result);
    }
  };

  int64_t splits = 1;
  if (tiles < kEnoughTiles) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t needed = (sources_of(tile_at(i)).slots() + kSplitSlots - 1) / kSplitSlots;
      splits = needed > splits ? needed : splits;
    }
  }
  if (splits == 1) {
    pool(tiles, [&](int64_t index) {
      const Tile tile = tile_at(index);
      const auto seen = sources_of(tile);
      const int64_t rows = 2 * tile.side_rows();
      const Scratch<float> memory(Partial::floats(rows, padded));
      Partial result(memory.data(), rows, padded);
      result.clear();
      sweep_tile(tile, seen, 0, seen.slots(), result);
      write_output(op, tile, result);
    });
    return;
  }
  const int64_t most = Partial::floats(2 * group * queries, padded);
  const Scratch<float> memory(tiles * splits * most);
  const auto partial_at = [&](const Tile& tile, int64_t index, int64_t split) {
    return Partial(memory.data() + (index * splits + split) * most, 2 * tile.side_rows(), padded);
  };
  pool(tiles * splits, [&](int64_t task) {
    const int64_t index = task / splits, split = task % splits;
    const Tile tile = tile_at(index);
    Partial part = partial_at(tile, index, split);
    part.clear();
    sweep_tile(tile, sources_of(tile), split * kSplitSlots, (split + 1) * kSplitSlots, part);
  });
  pool(tiles, [&](int64_t index) {
    const Tile tile = tile_at(index);
    Partial result = partial_at(tile, index, 0);
    for (int64_t split = 1; split < splits; ++split) result.merge(partial_at(tile, index, split));
    write_output(op, tile, result);
  });
}

}  // namespace sambay::SAMBAY_ISA
