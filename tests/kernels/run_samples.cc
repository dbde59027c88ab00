// Runs kernels without ONNX Runtime and Python, so that an emulator of another processor can:
//
//     run_samples ISA < samples > outputs
//
// A sample is a name of 40 bytes, four numbers (float64), 1 if past and present are one memory (int64), the
// number of inputs and, for each of them, its number of sizes, its sizes, its number of bytes (int64) and
// its bytes. Outputs follow each other as bytes. The name of the instruction set goes to stderr.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

#include "../../kernels/kernels.h"

namespace {

using namespace sambay;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(2);
}

template <class T>
T read() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) fail("a sample ends too early");
  return value;
}

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

Tensor read_tensor() {
  Tensor tensor;
  tensor.shape.resize(static_cast<size_t>(read<int64_t>()));
  for (int64_t& size : tensor.shape) size = read<int64_t>();
  tensor.bytes.resize(static_cast<size_t>(read<int64_t>()));
  if (std::fread(tensor.bytes.data(), 1, tensor.bytes.size(), stdin) != tensor.bytes.size()) {
    fail("a tensor ends too early");
  }
  return tensor;
}

// The last task first: none may count on another.
void run_backwards(void*, Pool::Task task, size_t count, void* data) {
  while (count > 0) task(data, --count);
}

class Sample {
 public:
  explicit Sample(const Kernels& kernels) : kernels_(kernels) {
    for (double& number : numbers_) number = read<double>();
    in_place_ = read<int64_t>() != 0;
    inputs_.resize(static_cast<size_t>(read<int64_t>()));
    for (Tensor& input : inputs_) input = read_tensor();
  }

  void run(const std::string& name) {
    if (name == "CausalConvWithState") return convolution();
    if (name == "SelectiveScan") return scan();
    if (name == "GatedMemoryUnit") return gate();
    if (name == "MatMulNBits") return product();
    if (name.rfind("Quantized", 0) == 0 || name == "AppendQuantizedKeyValue") return with_caches<int8_t>(name);
    const bool half = std::any_of(inputs_.begin(), inputs_.end(), is_half);
    return half ? with_caches<Half>(name) : with_caches<float>(name);
  }

  void write() const {
    for (const std::vector<char>* bytes : outputs_) {
      if (std::fwrite(bytes->data(), 1, bytes->size(), stdout) != bytes->size()) fail("cannot write outputs");
    }
  }

 private:
  // Of what these operators take, only cells of caches have two bytes.
  static bool is_half(const Tensor& tensor) {
    size_t count = 1;
    for (int64_t size : tensor.shape) count *= static_cast<size_t>(size);
    return count > 0 && tensor.bytes.size() == 2 * count;
  }

  template <class T>
  const T* in(size_t i) {
    return reinterpret_cast<const T*>(inputs_.at(i).bytes.data());
  }
  int64_t size(size_t i, size_t axis) const { return inputs_.at(i).shape.at(axis); }

  // An output like input i; for a state in place, that very memory.
  template <class T>
  T* out(size_t i, bool state = false) {
    std::vector<char>& bytes = inputs_.at(i).bytes;
    if (!state || !in_place_) return fresh<T>(bytes.size());
    outputs_.push_back(&bytes);
    return reinterpret_cast<T*>(bytes.data());
  }
  template <class T>
  T* fresh(size_t bytes) {
    owned_.emplace_back(bytes, '\x5A');  // what a kernel leaves out shows
    outputs_.push_back(&owned_.back());
    return reinterpret_cast<T*>(owned_.back().data());
  }

  void convolution() {
    CausalConv op{size(0, 0), size(0, 1), size(0, 2), size(1, 2), in<float>(0), in<float>(1), in<float>(2), in<float>(3),
                  in<int64_t>(4), nullptr, nullptr};
    op.y = out<float>(0);
    op.present_state = out<float>(3, true);
    kernels_.causal_conv_with_state(op, pool_);
  }

  void scan() {
    Scan op{};
    op.batch = size(0, 0), op.tokens = size(0, 1), op.channels = size(0, 2), op.states = size(3, 1);
    op.x = in<float>(0), op.dt = in<float>(1), op.dt_bias = in<float>(2), op.A = in<float>(3);
    op.B = in<float>(4), op.C = in<float>(5), op.D = in<float>(6), op.past_state = in<float>(7);
    op.lengths = in<int64_t>(8);
    op.y = out<float>(0);
    op.present_state = out<float>(7, true);
    kernels_.selective_scan(op, pool_);
  }

  void gate() {
    const GatedMemory op{size(0, 0) * size(0, 1) * size(0, 2), in<float>(0), in<float>(1), out<float>(0)};
    kernels_.gated_memory_unit(op, pool_);
  }

  // Numbers: bits, block_size, exact. The scales are float or float16.
  void product() {
    MatMulNBits op{};
    op.tokens = size(0, 0), op.inputs = size(0, 1), op.outputs = size(1, 0);
    op.bits = static_cast<int>(numbers_[0]), op.block_size = static_cast<int64_t>(numbers_[1]);
    op.exact = numbers_[2] != 0;
    op.x = in<float>(0), op.weight = in<uint8_t>(1);
    if (is_half(inputs_.at(2))) {
      op.half_scales = in<Half>(2);
    } else {
      op.scales = in<float>(2);
    }
    op.y = fresh<float>(static_cast<size_t>(op.tokens * op.outputs) * sizeof(float));
    kernels_.matmul_nbits(op, pool_);
  }

  // Inputs from `i` on: key, value and, of int8_t, their scales.
  template <class Cell>
  Cache<const Cell> past(size_t i) {
    if constexpr (std::is_same_v<Cell, int8_t>) {
      return {{in<Cell>(i), in<Half>(i + 2)}, {in<Cell>(i + 1), in<Half>(i + 3)}};
    } else {
      return {{in<Cell>(i), nullptr}, {in<Cell>(i + 1), nullptr}};
    }
  }
  template <class Cell>
  Cache<Cell> present(size_t i) {
    Cache<Cell> cache{{out<Cell>(i, true), nullptr}, {out<Cell>(i + 1, true), nullptr}};
    if constexpr (std::is_same_v<Cell, int8_t>) {
      cache.key.scales = out<Half>(i + 2, true);
      cache.value.scales = out<Half>(i + 3, true);
    }
    return cache;
  }

  // Numbers: num_heads, num_kv_heads, lambda_init, window.
  Heads heads(size_t cache, size_t mixing) {
    const auto count = static_cast<int64_t>(numbers_[0]), kv_heads = static_cast<int64_t>(numbers_[1]);
    return {size(0, 0), size(0, 1), count, kv_heads, size(cache, 2), size(cache, 3), in<float>(0), in<float>(mixing),
            in<float>(mixing + 1), static_cast<float>(numbers_[2]), out<float>(0)};
  }

  template <class Cell>
  void with_caches(const std::string& name) {
    constexpr size_t kCaches = std::is_same_v<Cell, int8_t> ? 4 : 2;
    if (name.rfind("Append", 0) == 0) {
      const size_t k = kCaches;
      Append<Cell> op{size(0, 0), size(k, 1), size(0, 1), size(0, 2), size(0, 3), past<Cell>(0), in<float>(k),
                      in<float>(k + 1), in<int64_t>(k + 2), present<Cell>(0)};
      return pick<Cell>(kernels_.append_key_value, kernels_.append_key_value_half,
                        kernels_.append_quantized_key_value)(op, pool_);
    }
    if (name.find("Cross") != std::string::npos) {
      const CrossAttention<Cell> op{heads(1, 1 + kCaches), past<Cell>(1), in<int64_t>(3 + kCaches)};
      return pick<Cell>(kernels_.differential_cross_attention, kernels_.differential_cross_attention_half,
                        kernels_.quantized_differential_cross_attention)(op, pool_);
    }
    if (name.find("DifferentialAttention") == std::string::npos) fail("no operator " + name);
    const size_t mixing = 3 + kCaches;
    WindowAttention<Cell> op{heads(3, mixing), static_cast<int64_t>(numbers_[3]), in<float>(1), in<float>(2),
                             past<Cell>(3), in<int64_t>(mixing + 2), in<int64_t>(mixing + 3), present<Cell>(3)};
    pick<Cell>(kernels_.differential_attention, kernels_.differential_attention_half,
               kernels_.quantized_differential_attention)(op, pool_);
  }

  template <class Cell, class Plain, class Halves, class Bytes>
  static auto pick(Plain plain, Halves halves, Bytes bytes) {
    if constexpr (std::is_same_v<Cell, float>) {
      return (void)halves, (void)bytes, plain;
    } else if constexpr (std::is_same_v<Cell, Half>) {
      return (void)plain, (void)bytes, halves;
    } else {
      return (void)plain, (void)halves, bytes;
    }
  }

  const Kernels& kernels_;
  const Pool pool_{run_backwards, nullptr};
  double numbers_[4];
  bool in_place_ = false;
  std::vector<Tensor> inputs_;
  std::deque<std::vector<char>> owned_;
  std::vector<const std::vector<char>*> outputs_;
};

}  // namespace

int main(int count, char** arguments) {
  const char* const isa = count > 1 ? arguments[1] : "";
  const Kernels* const kernels = find_kernels(isa);
  if (!kernels) fail(std::string("no kernels for ") + isa);
  std::fprintf(stderr, "%s", kernels->isa);
  char name[40];
  while (std::fread(name, sizeof name, 1, stdin) == 1) {
    Sample sample(*kernels);
    sample.run(name);
    sample.write();
  }
  return std::fflush(stdout);
}
