// The operators over caches as ONNX Runtime sees them: names, types, checks, and the call of the kernel.
//
// With int8_t cells an operator has another name, and each cache's scales beside it. T is the element type
// of activations; a Device runs a checked operator (see ort_library.h).
#pragma once

#include <string>
#include <vector>

#include "ort_context.h"

namespace sambay::ort {

constexpr int64_t kMostTokens = int64_t{1} << 40;  // sums of positions stay far from overflow
constexpr int64_t kMostHeads = int64_t{1} << 20;   // and so do products of sizes

// Of an operator with these cells: names and types of inputs and outputs.
template <class Cell, class T>
struct CacheTypes {
  static constexpr bool kScaled = false;
  static constexpr ElementType kCell = element_type<Cell>(), kValue = element_type<T>();
  static constexpr const char* kAppend = "AppendKeyValue";
  static constexpr const char* kWindow = "DifferentialAttention";
  static constexpr const char* kCross = "DifferentialCrossAttention";
  static constexpr const char* kAppendInputs[] = {"past_key", "past_value", "k", "v", "past_lengths"};
  static constexpr ElementType kAppendInputTypes[] = {kCell, kCell, kValue, kValue, kInt64};
  static constexpr ElementType kAppendOutputTypes[] = {kCell, kCell};
  static constexpr const char* kWindowInputs[] = {
      "q", "k", "v", "past_key", "past_value", "lambda", "norm_weight", "past_lengths", "lengths"};
  static constexpr ElementType kWindowInputTypes[] = {kValue, kValue, kValue, kCell, kCell,
                                                      kFloat, kFloat, kInt64, kInt64};
  static constexpr ElementType kWindowOutputTypes[] = {kValue, kCell, kCell};
  static constexpr const char* kCrossInputs[] = {"q", "key", "value", "lambda", "norm_weight", "positions"};
  static constexpr ElementType kCrossInputTypes[] = {kValue, kCell, kCell, kFloat, kFloat, kInt64};
};
template <class T>
struct CacheTypes<int8_t, T> {
  static constexpr bool kScaled = true;
  static constexpr ElementType kValue = element_type<T>();
  static constexpr const char* kAppend = "AppendQuantizedKeyValue";
  static constexpr const char* kWindow = "QuantizedDifferentialAttention";
  static constexpr const char* kCross = "QuantizedDifferentialCrossAttention";
  static constexpr const char* kAppendInputs[] = {
      "past_key", "past_value", "past_key_scale", "past_value_scale", "k", "v", "past_lengths"};
  static constexpr ElementType kAppendInputTypes[] = {kInt8,  kInt8,  kFloat16, kFloat16,
                                                      kValue, kValue, kInt64};
  static constexpr ElementType kAppendOutputTypes[] = {kInt8, kInt8, kFloat16, kFloat16};
  static constexpr const char* kWindowInputs[] = {
      "q",      "k",           "v",            "past_key", "past_value", "past_key_scale", "past_value_scale",
      "lambda", "norm_weight", "past_lengths", "lengths"};
  static constexpr ElementType kWindowInputTypes[] = {kValue,   kValue, kValue, kInt8,  kInt8, kFloat16,
                                                      kFloat16, kFloat, kFloat, kInt64, kInt64};
  static constexpr ElementType kWindowOutputTypes[] = {kValue, kInt8, kInt8, kFloat16, kFloat16};
  static constexpr const char* kCrossInputs[] = {"q",      "key",         "value",    "key_scale", "value_scale",
                                                 "lambda", "norm_weight", "positions"};
  static constexpr ElementType kCrossInputTypes[] = {kValue,   kInt8,  kInt8,  kFloat16,
                                                     kFloat16, kFloat, kFloat, kInt64};
};

// Inputs, and outputs, that one cache takes.
template <class Cell>
constexpr bool kScaled = CacheTypes<Cell, float>::kScaled;
template <class Cell>
constexpr size_t kParts = kScaled<Cell> ? 4 : 2;

struct CacheShape {
  int64_t batch = -1, kv_heads = -1, capacity = -1, head_size = -1;
};

// The cache whose key is input `index`; sizes of `shape` that are still negative are taken from it.
template <class Cell>
Cache<const Cell> read_cache(const Context& context, size_t index, CacheShape& shape) {
  Cache<const Cell> cache{};
  for (const size_t part : {0, 1}) {
    Slots<const Cell>& slots = part ? cache.value : cache.key;
    slots.cells = context.input<Cell>(index + part,
                                      {shape.batch, shape.kv_heads, shape.capacity, shape.head_size});
    if constexpr (kScaled<Cell>) {
      slots.scales = context.input<Half>(index + 2 + part, {shape.batch, shape.kv_heads, shape.capacity});
    }
  }
  if (shape.capacity < 1 || shape.head_size < 1) {
    throw context.fault(index, "has no slots or no columns", "a capacity and a head size of 1 or more");
  }
  if (shape.kv_heads > kMostHeads || shape.head_size > kMostHeads) {
    throw context.fault(index, "has too many heads or columns", std::to_string(kMostHeads) + " at most");
  }
  return cache;
}

// The cache whose key is output `index`.
template <class Cell>
Cache<Cell> make_cache(const Context& context, size_t index, const CacheShape& shape) {
  Cache<Cell> cache{};
  for (const size_t part : {0, 1}) {
    Slots<Cell>& slots = part ? cache.value : cache.key;
    slots.cells = context.output<Cell>(index + part,
                                       {shape.batch, shape.kv_heads, shape.capacity, shape.head_size});
    if constexpr (kScaled<Cell>) {
      slots.scales = context.output<Half>(index + 2 + part, {shape.batch, shape.kv_heads, shape.capacity});
    }
  }
  return cache;
}

// Attributes of the attention operators, checked when the session is made.
struct HeadCounts {
  int64_t heads, kv_heads;
  float lambda_init;

  explicit HeadCounts(const Attributes& attributes)
      : heads(attributes.integer("num_heads")),
        kv_heads(attributes.integer("num_kv_heads")),
        lambda_init(attributes.real("lambda_init")) {
    if (kv_heads < 2 || kv_heads % 2 || heads < 1 || heads > kMostHeads || heads % kv_heads) {
      throw Fault{"num_heads is " + std::to_string(heads) + " and num_kv_heads " + std::to_string(kv_heads) +
                  "; expected an even number of key heads and a multiple of it of query heads, " +
                  std::to_string(kMostHeads) + " at most. Export the model again"};
    }
  }

  // The inputs that all attention has: q is the first, `lambda` the index of lambda.
  template <class T>
  HeadsOf<T> read(const Context& context, const CacheShape& shape, size_t lambda) const {
    HeadsOf<T> sizes{shape.batch, -1,      heads,   kv_heads, shape.capacity, shape.head_size,
                     nullptr,     nullptr, nullptr, lambda_init, nullptr};
    sizes.q = context.input<T>(0, {sizes.batch, sizes.queries, heads * sizes.head_size});
    sizes.lambda = context.input<float>(lambda, {int64_t{1}});
    sizes.norm_weight = context.input<float>(lambda + 1, {2 * sizes.head_size});
    sizes.output = context.output<T>(0, {sizes.batch, sizes.queries, heads * sizes.head_size});
    return sizes;
  }
};

template <class Cell, class T = float>
struct AppendKeyValue {
  using Types = CacheTypes<Cell, T>;
  static constexpr const char* kName = Types::kAppend;
  static constexpr auto& kInputs = Types::kAppendInputs;
  static constexpr auto& kInputTypes = Types::kAppendInputTypes;
  static constexpr auto& kOutputTypes = Types::kAppendOutputTypes;

  explicit AppendKeyValue(const Attributes&) {}

  template <class Device>
  void run(const Context& context, const Device& device) const {
    constexpr size_t k = kParts<Cell>, lengths = k + 2;
    CacheShape shape;
    Append<Cell, T> op{};
    op.past = read_cache<Cell>(context, 0, shape);
    op.batch = shape.batch, op.kv_heads = shape.kv_heads;
    op.capacity = shape.capacity, op.head_size = shape.head_size;
    op.tokens = -1;
    op.k = context.input<T>(k, {op.batch, op.tokens, op.kv_heads * op.head_size});
    op.v = context.input<T>(k + 1, {op.batch, op.tokens, op.kv_heads * op.head_size});
    op.past_lengths = context.input<int64_t>(lengths, {op.batch});
    if (op.tokens > op.capacity) {
      throw context.fault(k, "holds " + std::to_string(op.tokens) + " tokens",
                          "at most the capacity of the cache, " + std::to_string(op.capacity));
    }
    context.check_range(lengths, op.past_lengths, op.batch, 0, op.capacity - op.tokens);
    op.present = make_cache<Cell>(context, 0, shape);
    device.run(op, context);
  }
};

template <class Cell, class T = float>
struct DifferentialAttention {
  using Types = CacheTypes<Cell, T>;
  static constexpr const char* kName = Types::kWindow;
  static constexpr auto& kInputs = Types::kWindowInputs;
  static constexpr auto& kInputTypes = Types::kWindowInputTypes;
  static constexpr auto& kOutputTypes = Types::kWindowOutputTypes;

  explicit DifferentialAttention(const Attributes& attributes)
      : counts(attributes), window(attributes.integer("window")) {
    if (window < 1 || window > kMostTokens) {
      throw Fault{"window is " + std::to_string(window) + "; expected 1 or more. Export the model again"};
    }
  }

  template <class Device>
  void run(const Context& context, const Device& device) const {
    constexpr size_t lambda = 3 + kParts<Cell>, past_lengths = lambda + 2, lengths = lambda + 3;
    CacheShape shape{-1, counts.kv_heads, -1, -1};
    WindowAttention<Cell, T> op{};
    op.past = read_cache<Cell>(context, 3, shape);
    op.heads = counts.read<T>(context, shape, lambda);
    op.window = window;
    const HeadsOf<T>& sizes = op.heads;
    op.k = context.input<T>(1, {sizes.batch, sizes.queries, sizes.kv_heads * sizes.head_size});
    op.v = context.input<T>(2, {sizes.batch, sizes.queries, sizes.kv_heads * sizes.head_size});
    op.past_lengths = context.input<int64_t>(past_lengths, {sizes.batch});
    op.lengths = context.input<int64_t>(lengths, {sizes.batch});
    context.check_range(past_lengths, op.past_lengths, sizes.batch, 0, kMostTokens);
    context.check_range(lengths, op.lengths, sizes.batch, 0, sizes.queries);
    op.present = make_cache<Cell>(context, 1, shape);
    device.run(op, context);
  }

  HeadCounts counts;
  int64_t window;
};

template <class Cell, class T = float>
struct DifferentialCrossAttention {
  using Types = CacheTypes<Cell, T>;
  static constexpr const char* kName = Types::kCross;
  static constexpr auto& kInputs = Types::kCrossInputs;
  static constexpr auto& kInputTypes = Types::kCrossInputTypes;
  static constexpr ElementType kOutputTypes[] = {element_type<T>()};

  explicit DifferentialCrossAttention(const Attributes& attributes) : counts(attributes) {}

  template <class Device>
  void run(const Context& context, const Device& device) const {
    constexpr size_t lambda = 1 + kParts<Cell>, positions = lambda + 2;
    CacheShape shape{-1, counts.kv_heads, -1, -1};
    CrossAttention<Cell, T> op{};
    op.cache = read_cache<Cell>(context, 1, shape);
    op.heads = counts.read<T>(context, shape, lambda);
    const HeadsOf<T>& sizes = op.heads;
    op.positions = context.input<int64_t>(positions, {sizes.batch, sizes.queries});
    context.check_range(positions, op.positions, sizes.batch * sizes.queries, 0, sizes.capacity - 1);
    device.run(op, context);
  }

  HeadCounts counts;
};

}  // namespace sambay::ort
