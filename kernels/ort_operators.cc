// The operators as ONNX Runtime sees them: names, types, checks, and the call of the kernel.
//
// Everything that comes from a model or a caller is checked here; the kernels trust their arguments.
#include <cstdlib>
#include <exception>

#include "ort_context.h"

namespace sambay::ort {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 40;  // sums of positions stay far from overflow

// Attributes of the attention operators, checked when the session is made.
struct HeadCounts {
  int64_t heads, kv_heads;
  float lambda_init;

  explicit HeadCounts(const Attributes& attributes)
      : heads(attributes.integer("num_heads")),
        kv_heads(attributes.integer("num_kv_heads")),
        lambda_init(attributes.real("lambda_init")) {
    if (kv_heads < 2 || kv_heads % 2 || heads < 1 || heads % kv_heads) {
      throw Fault{"num_heads is " + std::to_string(heads) + " and num_kv_heads " + std::to_string(kv_heads) +
                  "; expected an even number of key heads and a multiple of it of query heads. " +
                  "Export the model again"};
    }
  }

  // Takes q [batch, queries, heads * head_size] and the cache's sizes from input `cache`.
  template <class Cell>
  Heads sizes(const Context& context, size_t q, size_t cache, size_t lambda) const {
    Heads sizes{-1, -1, heads, kv_heads, -1, -1, nullptr, nullptr, nullptr, lambda_init, nullptr};
    context.input<Cell>(cache, {sizes.batch, kv_heads, sizes.capacity, sizes.head_size});
    if (sizes.capacity < 1 || sizes.head_size < 1) {
      throw context.fault(cache, "has no slots or no columns", "a capacity and a head size of 1 or more");
    }
    sizes.q = context.input<float>(q, {sizes.batch, sizes.queries, heads * sizes.head_size});
    sizes.lambda = context.input<float>(lambda, {int64_t{1}});
    sizes.norm_weight = context.input<float>(lambda + 1, {2 * sizes.head_size});
    sizes.output = context.output<float>(0, {sizes.batch, sizes.queries, heads * sizes.head_size});
    return sizes;
  }
};

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

void run_kernel(const Kernels& kernels, const Append<float>& op, const Pool& pool) {
  kernels.append_key_value(op, pool);
}
void run_kernel(const Kernels& kernels, const Append<Half>& op, const Pool& pool) {
  kernels.append_key_value_half(op, pool);
}
void run_kernel(const Kernels& kernels, const WindowAttention<float>& op, const Pool& pool) {
  kernels.differential_attention(op, pool);
}
void run_kernel(const Kernels& kernels, const WindowAttention<Half>& op, const Pool& pool) {
  kernels.differential_attention_half(op, pool);
}
void run_kernel(const Kernels& kernels, const CrossAttention<float>& op, const Pool& pool) {
  kernels.differential_cross_attention(op, pool);
}
void run_kernel(const Kernels& kernels, const CrossAttention<Half>& op, const Pool& pool) {
  kernels.differential_cross_attention_half(op, pool);
}

template <class Cell>
struct AppendKeyValue {
  static constexpr ElementType kCell = element_type<Cell>();
  static constexpr const char* kName = "AppendKeyValue";
  static constexpr const char* kInputs[] = {"past_key", "past_value", "k", "v", "past_lengths"};
  static constexpr ElementType kInputTypes[] = {kCell, kCell, kFloat, kFloat, kInt64};
  static constexpr ElementType kOutputTypes[] = {kCell, kCell};

  explicit AppendKeyValue(const Attributes&) {}

  void run(const Context& context, const Kernels& kernels) const {
    Append<Cell> op{-1, -1, -1, -1, -1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    op.past_key = context.input<Cell>(0, {op.batch, op.kv_heads, op.capacity, op.head_size});
    op.past_value = context.input<Cell>(1, {op.batch, op.kv_heads, op.capacity, op.head_size});
    op.k = context.input<float>(2, {op.batch, op.tokens, op.kv_heads * op.head_size});
    op.v = context.input<float>(3, {op.batch, op.tokens, op.kv_heads * op.head_size});
    op.past_lengths = context.input<int64_t>(4, {op.batch});
    if (op.tokens > op.capacity) {
      throw context.fault(2, "holds " + std::to_string(op.tokens) + " tokens",
                          "at most the capacity of the cache, " + std::to_string(op.capacity));
    }
    context.check_range(4, op.past_lengths, op.batch, 0, op.capacity - op.tokens);
    op.present_key = context.output<Cell>(0, {op.batch, op.kv_heads, op.capacity, op.head_size});
    op.present_value = context.output<Cell>(1, {op.batch, op.kv_heads, op.capacity, op.head_size});
    run_kernel(kernels, op, context.pool());
  }
};

template <class Cell>
struct DifferentialAttention {
  static constexpr ElementType kCell = element_type<Cell>();
  static constexpr const char* kName = "DifferentialAttention";
  static constexpr const char* kInputs[] = {"q",      "k",           "v",            "past_key", "past_value",
                                            "lambda", "norm_weight", "past_lengths", "lengths"};
  static constexpr ElementType kInputTypes[] = {kFloat, kFloat, kFloat, kCell, kCell,
                                                kFloat, kFloat, kInt64, kInt64};
  static constexpr ElementType kOutputTypes[] = {kFloat, kCell, kCell};

  explicit DifferentialAttention(const Attributes& attributes)
      : counts(attributes), window(attributes.integer("window")) {
    if (window < 1 || window > kMostTokens) {
      throw Fault{"window is " + std::to_string(window) + "; expected 1 or more. Export the model again"};
    }
  }

  void run(const Context& context, const Kernels& kernels) const {
    WindowAttention<Cell> op{};
    op.heads = counts.template sizes<Cell>(context, 0, 3, 5);
    op.window = window;
    Heads& sizes = op.heads;
    op.k = context.input<float>(1, {sizes.batch, sizes.queries, sizes.kv_heads * sizes.head_size});
    op.v = context.input<float>(2, {sizes.batch, sizes.queries, sizes.kv_heads * sizes.head_size});
    op.past_key = context.input<Cell>(3, {sizes.batch, sizes.kv_heads, sizes.capacity, sizes.head_size});
    op.past_value = context.input<Cell>(4, {sizes.batch, sizes.kv_heads, sizes.capacity, sizes.head_size});
    op.past_lengths = context.input<int64_t>(7, {sizes.batch});
    op.lengths = context.input<int64_t>(8, {sizes.batch});
    context.check_range(7, op.past_lengths, sizes.batch, 0, kMostTokens);
    context.check_range(8, op.lengths, sizes.batch, 0, sizes.queries);
    const std::vector<int64_t> cache = {sizes.batch, sizes.kv_heads, sizes.capacity, sizes.head_size};
    op.present_key = context.output<Cell>(1, cache);
    op.present_value = context.output<Cell>(2, cache);
    run_kernel(kernels, op, context.pool());
  }

  HeadCounts counts;
  int64_t window;
};

template <class Cell>
struct DifferentialCrossAttention {
  static constexpr ElementType kCell = element_type<Cell>();
  static constexpr const char* kName = "DifferentialCrossAttention";
  static constexpr const char* kInputs[] = {"q", "key", "value", "lambda", "norm_weight", "positions"};
  static constexpr ElementType kInputTypes[] = {kFloat, kCell, kCell, kFloat, kFloat, kInt64};
  static constexpr ElementType kOutputTypes[] = {kFloat};

  explicit DifferentialCrossAttention(const Attributes& attributes) : counts(attributes) {}

  void run(const Context& context, const Kernels& kernels) const {
    CrossAttention<Cell> op{};
    op.heads = counts.template sizes<Cell>(context, 0, 1, 3);
    Heads& sizes = op.heads;
    op.key = context.input<Cell>(1, {sizes.batch, sizes.kv_heads, sizes.capacity, sizes.head_size});
    op.value = context.input<Cell>(2, {sizes.batch, sizes.kv_heads, sizes.capacity, sizes.head_size});
    op.positions = context.input<int64_t>(5, {sizes.batch, sizes.queries});
    context.check_range(5, op.positions, sizes.batch * sizes.queries, 0, sizes.capacity - 1);
    run_kernel(kernels, op, context.pool());
  }

  HeadCounts counts;
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
