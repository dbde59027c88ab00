// The operators of domain ai.sambay: plain functions over pointers and sizes.
//
// Nothing here knows ONNX Runtime, so the functions can be tested, sanitised and timed without it.
// Callers check every size and length; the functions trust them. Arrays are row-major and dense.
// A past and its present may be the same memory (equal pointers) or disjoint, never anything else.
//
// T is the element type of activations, float or Half. The kernels for processors take float, which is
// what the names without "Of" stand for; kernels/cuda takes both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace sambay {

// A float16, by its bits.
struct Half {
  uint16_t bits;
};

// Some slots of a cache. Cells are float, Half or int8_t; with int8_t every head and slot has a scale, and
// a value is cell * scale. The others have none.
template <class Cell>
struct Slots {
  using Scale = std::conditional_t<std::is_const_v<Cell>, const Half, Half>;

  Cell* cells;
  Scale* scales;
};

// Keys and values: cells [batch, kv_heads, capacity, head_size], scales [batch, kv_heads, capacity].
template <class Cell>
struct Cache {
  Slots<Cell> key, value;
};

// Runs task(0) .. task(count - 1), maybe at the same time, and returns when all are done.
// Which tasks there are never depends on the number of threads, so neither do results.
class Pool {
 public:
  using Task = void (*)(void* data, size_t index);
  using Run = void (*)(void* self, Task task, size_t count, void* data);

  Pool(Run run, void* self) : run_(run), self_(self) {}

  template <class Body>
  void operator()(int64_t count, const Body& body) const {
    if (count == 1) {
      body(int64_t{0});
    } else if (count > 1) {
      run_(self_, [](void* data, size_t index) {
        (*static_cast<const Body*>(data))(static_cast<int64_t>(index));
      }, static_cast<size_t>(count), const_cast<Body*>(&body));
    }
  }

 private:
  Run run_;
  void* self_;
};

// Shapes as in export/ops/causal_conv_with_state.py.
template <class T>
struct CausalConvOf {
  int64_t batch, tokens, channels, taps;
  const T *x, *weight, *bias, *past_state;
  const int64_t* lengths;  // 0 .. tokens
  T *y, *present_state;
};
using CausalConv = CausalConvOf<float>;

// Shapes as in export/ops/selective_scan.py.
template <class T>
struct ScanOf {
  int64_t batch, tokens, channels, states;
  const T *x, *dt, *B, *C;
  const float *dt_bias, *A, *D, *past_state;
  const int64_t* lengths;  // 0 .. tokens
  T* y;
  float* present_state;
};
using Scan = ScanOf<float>;

template <class T>
struct GatedMemoryOf {
  int64_t size;
  const T *gate, *memory;
  T* output;
};
using GatedMemory = GatedMemoryOf<float>;

// Shapes as in export/ops/append_key_value.py, for int8_t as in append_quantized_key_value.py.
template <class Cell, class T = float>
struct Append {
  int64_t batch, tokens, kv_heads, capacity, head_size;
  Cache<const Cell> past;
  const T *k, *v;
  const int64_t* past_lengths;  // past_length + tokens <= capacity
  Cache<Cell> present;
};

// What both attention operators share. Query heads are a multiple of key heads, those are even.
template <class T>
struct HeadsOf {
  int64_t batch, queries, heads, kv_heads, capacity, head_size;
  const T* q;
  const float *lambda, *norm_weight;
  float lambda_init;
  T* output;
};
using Heads = HeadsOf<float>;

// Shapes as in export/ops/differential_attention.py, for int8_t with `quantized_` before the name.
template <class Cell, class T = float>
struct WindowAttention {
  HeadsOf<T> heads;
  int64_t window;
  const T *k, *v;
  Cache<const Cell> past;
  const int64_t *past_lengths, *lengths;  // lengths: 0 .. queries
  Cache<Cell> present;
};

// Shapes as in export/ops/differential_cross_attention.py, for int8_t with `quantized_` before the name.
template <class Cell, class T = float>
struct CrossAttention {
  HeadsOf<T> heads;
  Cache<const Cell> cache;
  const int64_t* positions;  // 0 .. capacity - 1
};

// y [tokens, outputs] = x [tokens, inputs] times the transpose of a weight in blocks along its rows, stored as
// com.microsoft.MatMulNBits has it: a value is (stored - 8) * scale, or (stored - 128) * scale.
struct MatMulNBits {
  int64_t tokens, inputs, outputs;
  int bits;            // 4 or 8
  int64_t block_size;  // neighbours in a row that share a scale, a multiple of 32
  bool exact;          // no input is rounded to 8 bits, however many tokens there are
  const float* x;
  const uint8_t* weight;  // [outputs, blocks, block_size * bits / 8]; of 4-bit values the first is in the low half
  const float* scales;    // [outputs, blocks], or null, and then
  const Half* half_scales;
  float* y;
};

// The operators, compiled for one instruction set.
struct Kernels {
  const char* isa;
  void (*causal_conv_with_state)(const CausalConv&, const Pool&);
  void (*selective_scan)(const Scan&, const Pool&);
  void (*gated_memory_unit)(const GatedMemory&, const Pool&);
  void (*append_key_value)(const Append<float>&, const Pool&);
  void (*append_key_value_half)(const Append<Half>&, const Pool&);
  void (*differential_attention)(const WindowAttention<float>&, const Pool&);
  void (*differential_attention_half)(const WindowAttention<Half>&, const Pool&);
  void (*differential_cross_attention)(const CrossAttention<float>&, const Pool&);
  void (*differential_cross_attention_half)(const CrossAttention<Half>&, const Pool&);
  void (*append_quantized_key_value)(const Append<int8_t>&, const Pool&);
  void (*quantized_differential_attention)(const WindowAttention<int8_t>&, const Pool&);
  void (*quantized_differential_cross_attention)(const CrossAttention<int8_t>&, const Pool&);
  void (*matmul_nbits)(const MatMulNBits&, const Pool&);
};

// The kernels for a named instruction set: "portable", "neon", "neon_dot", "avx2", "avx2_vnni", "avx512" or
// "avx512_vnni"; for null or "" the best this machine has. Null where the machine or the build lacks the
// one named.
const Kernels* find_kernels(const char* isa);

}  // namespace sambay
