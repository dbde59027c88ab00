// The library of operators for processors, as ONNX Runtime loads it.
#include "ort_operators.h"

#include <atomic>
#include <cstdlib>
#include <type_traits>

#include "ort_caches.h"
#include "ort_library.h"
#include "pages.h"

namespace sambay::ort {
namespace {

template <class Scale>
struct MatMulNBits {
  static constexpr const char* kName = "MatMulNBits";
  static constexpr const char* kInputs[] = {"A", "B", "scales"};
  static constexpr ElementType kInputTypes[] = {kFloat, kUint8, element_type<Scale>()};
  static constexpr ElementType kOutputTypes[] = {kFloat};
  static constexpr int64_t kLargest = int64_t{1} << 31;

  explicit MatMulNBits(const Attributes& attributes)
      : K(attributes.integer("K")),
        N(attributes.integer("N")),
        bits(attributes.integer("bits")),
        block_size(attributes.integer("block_size")),
        exact(attributes.integer("accuracy_level") != 4) {
    const bool sized = block_size == 32 || block_size == 64 || block_size == 128 || block_size == 256;
    if (K < 1 || K > kLargest || N < 1 || N > kLargest || (bits != 4 && bits != 8) || !sized) {
      throw Fault{"MatMulNBits has K " + std::to_string(K) + ", N " + std::to_string(N) + ", bits " +
                  std::to_string(bits) + ", block_size " + std::to_string(block_size) +
                  "; expected K and N of 1 or more, bits 4 or 8, block_size 32, 64, 128 or 256. "
                  "Export the model again"};
    }
  }

  template <class Device>
  void run(const Context& context, const Device& device) const {
    std::vector<int64_t> shape = context.shape(0, kFloat);
    if (shape.empty() || shape.back() != K) {
      throw context.fault(0, "has shape " + text(shape), "a last size of " + std::to_string(K));
    }
    const int64_t blocks = (K + block_size - 1) / block_size;
    sambay::MatMulNBits op{1,       K,       N,       static_cast<int>(bits), block_size, exact,
                           nullptr, nullptr, nullptr, nullptr,                nullptr};
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) op.tokens *= shape[axis];
    op.x = context.data_of<float>(0);
    op.weight = context.input<uint8_t>(1, {N, blocks, block_size * bits / 8});
    if (!mapped.exchange(true, std::memory_order_relaxed)) {
      map_large_pages(op.weight, static_cast<size_t>(N * blocks * (block_size * bits / 8)), context.pool());
    }
    const Scale* scales = context.input<Scale>(2, {N, blocks});
    if constexpr (std::is_same_v<Scale, Half>) {
      op.half_scales = scales;
    } else {
      op.scales = scales;
    }
    shape.back() = N;
    op.y = context.output<float>(0, shape);
    if (op.tokens > 0) device.run(op, context);
  }

  int64_t K, N, bits, block_size;
  bool exact;
  mutable std::atomic<bool> mapped{false};  // in large pages: before the weight is first read
};

const Kernels* chosen_kernels() {
  const char* isa = std::getenv("SAMBAY_ISA");
  if (const Kernels* kernels = find_kernels(isa)) return kernels;
  throw Fault{std::string("SAMBAY_ISA is ") + isa + ", which this machine or this build lacks; the best here is " +
              find_kernels(nullptr)->isa + ": unset SAMBAY_ISA"};
}

// Where operators run: on the CPU, with the kernels for this machine.
struct Processor {
  static constexpr const char* kProvider = nullptr;
  static constexpr bool kReadable = true;

  void run(const CausalConv& op, const Context& context) const {
    kernels->causal_conv_with_state(op, context.pool());
  }
  void run(const Scan& op, const Context& context) const { kernels->selective_scan(op, context.pool()); }
  void run(const GatedMemory& op, const Context& context) const {
    kernels->gated_memory_unit(op, context.pool());
  }
  void run(const Append<float>& op, const Context& context) const {
    kernels->append_key_value(op, context.pool());
  }
  void run(const Append<Half>& op, const Context& context) const {
    kernels->append_key_value_half(op, context.pool());
  }
  void run(const Append<int8_t>& op, const Context& context) const {
    kernels->append_quantized_key_value(op, context.pool());
  }
  void run(const WindowAttention<float>& op, const Context& context) const {
    kernels->differential_attention(op, context.pool());
  }
  void run(const WindowAttention<Half>& op, const Context& context) const {
    kernels->differential_attention_half(op, context.pool());
  }
  void run(const WindowAttention<int8_t>& op, const Context& context) const {
    kernels->quantized_differential_attention(op, context.pool());
  }
  void run(const CrossAttention<float>& op, const Context& context) const {
    kernels->differential_cross_attention(op, context.pool());
  }
  void run(const CrossAttention<Half>& op, const Context& context) const {
    kernels->differential_cross_attention_half(op, context.pool());
  }
  void run(const CrossAttention<int8_t>& op, const Context& context) const {
    kernels->quantized_differential_cross_attention(op, context.pool());
  }
  void run(const sambay::MatMulNBits& op, const Context& context) const {
    kernels->matmul_nbits(op, context.pool());
  }

  const Kernels* kernels = chosen_kernels();
};

}  // namespace
}  // namespace sambay::ort

// What ONNX Runtime calls when a session registers this library.
SAMBAY_EXPORT sambay::ort::Status* SAMBAY_ORT_CALL RegisterCustomOps(sambay::ort::SessionOptions* options,
                                                                     const sambay::ort::ApiBase* base) {
  using namespace sambay;
  using namespace sambay::ort;
  return register_operators(options, base, kApiVersion,
                            {
                                describe<Processor, CausalConvWithState<>>(),
                                describe<Processor, SelectiveScan<>>(),
                                describe<Processor, GatedMemoryUnit<>>(),
                                describe<Processor, AppendKeyValue<Half>>(),
                                describe<Processor, AppendKeyValue<float>>(),
                                describe<Processor, DifferentialAttention<Half>>(),
                                describe<Processor, DifferentialAttention<float>>(),
                                describe<Processor, DifferentialCrossAttention<Half>>(),
                                describe<Processor, DifferentialCrossAttention<float>>(),
                                describe<Processor, AppendKeyValue<int8_t>>(),
                                describe<Processor, DifferentialAttention<int8_t>>(),
                                describe<Processor, DifferentialCrossAttention<int8_t>>(),
                                describe<Processor, ort::MatMulNBits<Half>>(),
                                describe<Processor, ort::MatMulNBits<float>>(),
                            });
}
