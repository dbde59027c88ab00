// The operators without caches as ONNX Runtime sees them: names, types, checks, and the call of the kernel.
//
// Everything that comes from a model or a caller is checked here; the kernels trust their arguments. T is
// the element type of activations; a Device runs a checked operator (see ort_library.h).
#pragma once

#include <string>
#include <vector>

#include "ort_context.h"

namespace sambay::ort {

template <class T = float>
struct CausalConvWithState {
  static constexpr const char* kName = "CausalConvWithState";
  static constexpr ElementType kValue = element_type<T>();
  static constexpr const char* kInputs[] = {"x", "weight", "bias", "past_state", "lengths"};
  static constexpr ElementType kInputTypes[] = {kValue, kValue, kValue, kValue, kInt64};
  static constexpr ElementType kOutputTypes[] = {kValue, kValue};

  explicit CausalConvWithState(const Attributes&) {}

  template <class Device>
  void run(const Context& context, const Device& device) const {
    CausalConvOf<T> op{-1, -1, -1, -1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    op.x = context.input<T>(0, {op.batch, op.tokens, op.channels});
    op.weight = context.input<T>(1, {op.channels, int64_t{1}, op.taps});
    if (op.taps < 1) throw context.fault(1, "has no taps", "one or more");
    op.bias = context.input<T>(2, {op.channels});
    op.past_state = context.input<T>(3, {op.batch, op.channels, op.taps - 1});
    op.lengths = context.input<int64_t>(4, {op.batch});
    context.check_range(4, op.lengths, op.batch, 0, op.tokens);
    op.y = context.output<T>(0, {op.batch, op.tokens, op.channels});
    op.present_state = context.output<T>(1, {op.batch, op.channels, op.taps - 1});
    device.run(op, context);
  }
};

template <class T = float>
struct SelectiveScan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr ElementType kValue = element_type<T>();
  static constexpr const char* kInputs[] = {"x", "dt", "dt_bias", "A",      "B",
                                            "C", "D",  "past_state", "lengths"};
  static constexpr ElementType kInputTypes[] = {kValue, kValue, kFloat, kFloat, kValue,
                                                kValue, kFloat, kFloat, kInt64};
  static constexpr ElementType kOutputTypes[] = {kValue, kFloat};

  explicit SelectiveScan(const Attributes&) {}

  template <class Device>
  void run(const Context& context, const Device& device) const {
    ScanOf<T> op{-1,      -1,      -1,      -1,      nullptr, nullptr, nullptr, nullptr,
            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    op.x = context.input<T>(0, {op.batch, op.tokens, op.channels});
    op.dt = context.input<T>(1, {op.batch, op.tokens, op.channels});
    op.dt_bias = context.input<float>(2, {op.channels});
    op.A = context.input<float>(3, {op.channels, op.states});
    op.B = context.input<T>(4, {op.batch, op.tokens, op.states});
    op.C = context.input<T>(5, {op.batch, op.tokens, op.states});
    op.D = context.input<float>(6, {op.channels});
    op.past_state = context.input<float>(7, {op.batch, op.channels, op.states});
    op.lengths = context.input<int64_t>(8, {op.batch});
    context.check_range(8, op.lengths, op.batch, 0, op.tokens);
    op.y = context.output<T>(0, {op.batch, op.tokens, op.channels});
    op.present_state = context.output<float>(1, {op.batch, op.channels, op.states});
    device.run(op, context);
  }
};

template <class T = float>
struct GatedMemoryUnit {
  static constexpr const char* kName = "GatedMemoryUnit";
  static constexpr ElementType kValue = element_type<T>();
  static constexpr const char* kInputs[] = {"gate", "memory"};
  static constexpr ElementType kInputTypes[] = {kValue, kValue};
  static constexpr ElementType kOutputTypes[] = {kValue};

  explicit GatedMemoryUnit(const Attributes&) {}

  template <class Device>
  void run(const Context& context, const Device& device) const {
    const std::vector<int64_t> shape = context.shape(0, kValue), memory = context.shape(1, kValue);
    if (memory != shape) throw context.fault(1, "has shape " + text(memory), "that of gate, " + text(shape));
    GatedMemoryOf<T> op{1, nullptr, nullptr, nullptr};
    for (int64_t size : shape) op.size *= size;
    op.gate = context.data_of<T>(0);
    op.memory = context.data_of<T>(1);
    op.output = context.output<T>(0, shape);
    device.run(op, context);
  }
};

}  // namespace sambay::ort
