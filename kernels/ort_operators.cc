// The operators as ONNX Runtime sees them: names, types, checks, and the call of the kernel.
//
// Everything that comes from a model or a caller is checked here; the kernels trust their arguments.
#include <cstdlib>
#include <exception>

#include "ort_caches.h"
#include "ort_context.h"

namespace sambay::ort {
namespace {

struct CausalConvWithState {
  static constexpr const char* kName = "CausalConvWithState";
  static constexpr const char* kInputs[] = {"x", "weight", "bias", "past_state", "lengths"};
  static constexpr ElementType kInputTypes[] = {kFloat, kFloat, kFloat, kFloat, kInt64};
  static constexpr ElementType kOutputTypes[] = {kFloat, kFloat};

  explicit CausalConvWithState(const Attributes&) {}

  void run(const Context& context, const Kernels& kernels) const {
    CausalConv op{-1, -1, -1, -1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    op.x = context.input<float>(0, {op.batch, op.tokens, op.channels});
    op.weight = context.input<float>(1, {op.channels, int64_t{1}, op.taps});
    if (op.taps < 1) throw context.fault(1, "has no taps", "one or more");
    op.bias = context.input<float>(2, {op.channels});
    op.past_state = context.input<float>(3, {op.batch, op.channels, op.taps - 1});
    op.lengths = context.input<int64_t>(4, {op.batch});
    context.check_range(4, op.lengths, op.batch, 0, op.tokens);
    op.y = context.output<float>(0, {op.batch, op.tokens, op.channels});
    op.present_state = context.output<float>(1, {op.batch, op.channels, op.taps - 1});
    kernels.causal_conv_with_state(op, context.pool());
  }
};

struct SelectiveScan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr const char* kInputs[] = {"x", "dt", "dt_bias", "A",      "B",
                                            "C", "D",  "past_state", "lengths"};
  static constexpr ElementType kInputTypes[] = {kFloat, kFloat, kFloat, kFloat, kFloat,
                                                kFloat, kFloat, kFloat, kInt64};
  static constexpr ElementType kOutputTypes[] = {kFloat, kFloat};

  explicit SelectiveScan(const Attributes&) {}

  void run(const Context& context, const Kernels& kernels) const {
    Scan op{-1,      -1,      -1,      -1,      nullptr, nullptr, nullptr, nullptr,
            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    op.x = context.input<float>(0, {op.batch, op.tokens, op.channels});
    op.dt = context.input<float>(1, {op.batch, op.tokens, op.channels});
    op.dt_bias = context.input<float>(2, {op.channels});
    op.A = context.input<float>(3, {op.channels, op.states});
    op.B = context.input<float>(4, {op.batch, op.tokens, op.states});
    op.C = context.input<float>(5, {op.batch, op.tokens, op.states});
    op.D = context.input<float>(6, {op.channels});
    op.past_state = context.input<float>(7, {op.batch, op.channels, op.states});
    op.lengths = context.input<int64_t>(8, {op.batch});
    context.check_range(8, op.lengths, op.batch, 0, op.tokens);
    op.y = context.output<float>(0, {op.batch, op.tokens, op.channels});
    op.present_state = context.output<float>(1, {op.batch, op.channels, op.states});
    kernels.selective_scan(op, context.pool());
  }
};

struct GatedMemoryUnit {
  static constexpr const char* kName = "GatedMemoryUnit";
  static constexpr const char* kInputs[] = {"gate", "memory"};
  static constexpr ElementType kInputTypes[] = {kFloat, kFloat};
  static constexpr ElementType kOutputTypes[] = {kFloat};

  explicit GatedMemoryUnit(const Attributes&) {}

  void run(const Context& context, const Kernels& kernels) const {
    const std::vector<int64_t> shape = context.shape(0, kFloat), memory = context.shape(1, kFloat);
    if (memory != shape) throw context.fault(1, "has shape " + text(memory), "that of gate, " + text(shape));
    GatedMemory op{1, nullptr, nullptr, nullptr};
    for (int64_t size : shape) op.size *= size;
    op.gate = context.data_of<float>(0);
    op.memory = context.data_of<float>(1);
    op.output = context.output<float>(0, shape);
    kernels.gated_memory_unit(op, context.pool());
  }
};

struct MatMulNBits {
  static constexpr const char* kName = "MatMulNBits";
  static constexpr const char* kInputs[] = {"A", "B", "scales"};
  static constexpr ElementType kInputTypes[] = {kFloat, kUint8, kFloat};
  static constexpr ElementType kOutputTypes[] = {kFloat};
  static constexpr int64_t kBlock = 32, kLargest = int64_t{1} << 31;

  explicit MatMulNBits(const Attributes& attributes)
      : K(attributes.integer("K")),
        N(attributes.integer("N")),
        bits(attributes.integer("bits")),
        exact(attributes.integer("accuracy_level") != 4) {
    const int64_t block_size = attributes.integer("block_size");
    if (K < 1 || K > kLargest || N < 1 || N > kLargest || (bits != 4 && bits != 8) || block_size != kBlock) {
      throw Fault{"MatMulNBits has K " + std::to_string(K) + ", N " + std::to_string(N) + ", bits " +
                  std::to_string(bits) + ", block_size " + std::to_string(block_size) +
                  "; expected K and N of 1 or more, bits 4 or 8, block_size 32. Export the model again"};
    }
  }

  void run(const Context& context, const Kernels& kernels) const {
    std::vector<int64_t> shape = context.shape(0, kFloat);
    if (shape.empty() || shape.back() != K) {
      throw context.fault(0, "has shape " + text(shape), "a last size of " + std::to_string(K));
    }
    const int64_t blocks = (K + kBlock - 1) / kBlock;
    sambay::MatMulNBits op{1, K, N, static_cast<int>(bits), exact, nullptr, nullptr, nullptr, nullptr};
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) op.tokens *= shape[axis];
    op.x = context.data_of<float>(0);
    op.weight = context.input<uint8_t>(1, {N, blocks, kBlock * bits / 8});
    op.scales = context.input<float>(2, {N, blocks});
    shape.back() = N;
    op.y = context.output<float>(0, shape);
    if (op.tokens > 0) kernels.matmul_nbits(op, context.pool());
  }

  int64_t K, N, bits;
  bool exact;
};

// Runs `body`; what it throws becomes a status.
template <class Body>
Status* guarded(const Api* api, const char* name, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Passed& passed) {
    return passed.status;
  } catch (const Fault& fault) {
    return call<CreateStatus>(api, kInvalidArgument, fault.message.c_str());
  } catch (const std::exception& error) {
    const std::string message = std::string(name) + " failed: " + error.what();
    return call<CreateStatus>(api, kFail, message.c_str());
  }
}

// A node of the graph: the operator's attributes, and the kernels for this machine.
template <class Operator>
struct Node {
  Operator op;
  const Kernels* kernels;
  const Api* api;
};

const Kernels* chosen_kernels() {
  const char* isa = std::getenv("SAMBAY_ISA");
  if (const Kernels* kernels = find_kernels(isa)) return kernels;
  throw Fault{std::string("SAMBAY_ISA is ") + isa + ", which this machine or this build lacks; the best here is " +
              find_kernels(nullptr)->isa + ": unset SAMBAY_ISA"};
}

template <class Operator>
const CustomOp* describe() {
  static const CustomOp described = [] {
    CustomOp op{};
    op.version = kApiVersion;
    op.GetName = [](const CustomOp*) { return Operator::kName; };
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
    op.GetInputType = [](const CustomOp*, size_t index) -> int { return Operator::kInputTypes[index]; };
    op.GetInputTypeCount = [](const CustomOp*) { return std::size(Operator::kInputTypes); };
    op.GetOutputType = [](const CustomOp*, size_t index) -> int { return Operator::kOutputTypes[index]; };
    op.GetOutputTypeCount = [](const CustomOp*) { return std::size(Operator::kOutputTypes); };
    op.GetInputCharacteristic = [](const CustomOp*, size_t) { return 0; };  // required
    op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };
    op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };  // the provider's own
    op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    op.CreateKernelV2 = [](const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
      return guarded(api, Operator::kName, [&] {
        *kernel = new Node<Operator>{Operator(Attributes(api, info)), chosen_kernels(), api};
      });
    };
    op.KernelComputeV2 = [](void* kernel, KernelContext* run) {
      const auto& node = *static_cast<const Node<Operator>*>(kernel);
      return guarded(node.api, Operator::kName, [&] {
        node.op.run(Context(node.api, run, Operator::kName, Operator::kInputs), *node.kernels);
      });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Node<Operator>*>(kernel); };
    op.GetStartVersion = [](const CustomOp*) { return 1; };
    op.GetEndVersion = [](const CustomOp*) { return 1; };
    return op;
  }();
  return &described;
}

}  // namespace
}  // namespace sambay::ort

// What ONNX Runtime calls when a session registers this library.
SAMBAY_EXPORT sambay::ort::Status* SAMBAY_ORT_CALL RegisterCustomOps(sambay::ort::SessionOptions* options,
                                                                     const sambay::ort::ApiBase* base) {
  using namespace sambay::ort;
  const Api* api = base->GetApi(kApiVersion);
  if (!api) {  // older than 1.17: there is no table to make a status with
    return call<CreateStatus>(base->GetApi(1), kFail, "the operators need ONNX Runtime 1.17 or newer");
  }
  const CustomOp* const operators[] = {
      describe<CausalConvWithState>(),
      describe<SelectiveScan>(),
      describe<GatedMemoryUnit>(),
      describe<AppendKeyValue<sambay::Half>>(),
      describe<AppendKeyValue<float>>(),
      describe<DifferentialAttention<sambay::Half>>(),
      describe<DifferentialAttention<float>>(),
      describe<DifferentialCrossAttention<sambay::Half>>(),
      describe<DifferentialCrossAttention<float>>(),
      describe<AppendKeyValue<int8_t>>(),
      describe<DifferentialAttention<int8_t>>(),
      describe<DifferentialCrossAttention<int8_t>>(),
      describe<MatMulNBits>(),
  };
  static CustomOpDomain* domain = nullptr;  // one a process, never released: sessions refer to it
  static Status* const failed = [&] {
    Status* status = call<CreateCustomOpDomain>(api, "ai.sambay", &domain);
    for (const CustomOp* op : operators) {
      if (!status) status = call<CustomOpDomain_Add>(api, domain, op);
    }
    return status;
  }();
  if (failed) return call<CreateStatus>(api, kFail, "domain ai.sambay could not be made");
  return call<AddCustomOpDomain>(api, options, domain);
}
