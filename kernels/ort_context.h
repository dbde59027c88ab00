// What an operator's glue sees of ONNX Runtime: inputs with checked types and shapes, outputs, attributes
// and the thread pool.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace sambay::ort {

// Something in the model or its inputs is wrong; becomes the status of the run.
struct Fault {
  std::string message;
};

// A status that ONNX Runtime gave us, passed on as it is.
struct Passed {
  Status* status;
};

inline void pass_on(Status* status) {
  if (status) throw Passed{status};
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::string all;
  for (int64_t size : shape) {
    all += (all.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  return "[" + all + "]";
}

// An expected size: a number, or a variable that takes the size found if it is still negative.
struct Axis {
  Axis(int64_t& variable) : variable(&variable) {}
  Axis(const int64_t& value) : value(value) {}
  Axis(int64_t&& value) : value(value) {}
  int64_t expected() const { return variable ? *variable : value; }

  int64_t* variable = nullptr;
  int64_t value = 0;
};

template <class T>
constexpr ElementType element_type();
template <>
constexpr ElementType element_type<float>() { return kFloat; }
template <>
constexpr ElementType element_type<Half>() { return kFloat16; }
template <>
constexpr ElementType element_type<int8_t>() { return kInt8; }
template <>
constexpr ElementType element_type<uint8_t>() { return kUint8; }
template <>
constexpr ElementType element_type<int64_t>() { return kInt64; }

// One run of one node.
class Context {
 public:
  // `readable`: tensors stand in the processor's memory. In a device's, values are not for us to check.
  Context(const Api* api, KernelContext* context, const char* name, const char* const* inputs, bool readable)
      : api_(api), context_(context), name_(name), inputs_(inputs), readable_(readable) {}

  const Api* api() const { return api_; }
  KernelContext* raw() const { return context_; }

  // Input `index`, its shape checked against `axes`.
  template <class T>
  const T* input(size_t index, std::initializer_list<Axis> axes) const {
    const Value* value = nullptr;
    pass_on(call<KernelContext_GetInput>(api_, static_cast<const KernelContext*>(context_), index, &value));
    if (!value) throw fault(index, "is missing", "");
    const std::vector<int64_t> shape = read_shape(value, index, element_type<T>());
    bool fits = shape.size() == axes.size();
    std::vector<int64_t> expected;
    for (const Axis& axis : axes) {
      const int64_t wanted = axis.expected();
      fits = fits && (wanted < 0 || wanted == shape[expected.size()]);
      expected.push_back(wanted);
    }
    if (!fits) throw fault(index, "has shape " + text(shape), "a shape " + text(expected));
    size_t at = 0;
    for (const Axis& axis : axes) {
      if (axis.variable) *axis.variable = shape[at];
      ++at;
    }
    return static_cast<const T*>(data(const_cast<Value*>(value)));
  }

  // The shape of input `index`, unchecked.
  std::vector<int64_t> shape(size_t index, ElementType type) const {
    const Value* value = nullptr;
    pass_on(call<KernelContext_GetInput>(api_, static_cast<const KernelContext*>(context_), index, &value));
    if (!value) throw fault(index, "is missing", "");
    return read_shape(value, index, type);
  }

  // The values of input `index`, whose shape was seen before.
  template <class T>
  const T* data_of(size_t index) const {
    const Value* value = nullptr;
    pass_on(call<KernelContext_GetInput>(api_, static_cast<const KernelContext*>(context_), index, &value));
    return static_cast<const T*>(data(const_cast<Value*>(value)));
  }

  template <class T>
  T* output(size_t index, const std::vector<int64_t>& shape) const {
    Value* value = nullptr;
    pass_on(call<KernelContext_GetOutput>(api_, context_, index, shape.data(), shape.size(), &value));
    return static_cast<T*>(data(value));
  }

  // Every one of `count` values of input `index` must lie in low .. high; checked where readable, so
  // kernels of devices must bear any.
  void check_range(size_t index, const int64_t* values, int64_t count, int64_t low, int64_t high) const {
    for (int64_t i = 0; readable_ && i < count; ++i) {
      if (values[i] >= low && values[i] <= high) continue;
      throw fault(index, "holds " + std::to_string(values[i]),
                  "values of " + std::to_string(low) + " to " + std::to_string(high));
    }
  }

  Fault fault(size_t index, const std::string& found, const std::string& expected) const {
    return {std::string(name_) + ": input " + inputs_[index] + " " + found +
            (expected.empty() ? "" : "; expected " + expected) +
            ". The model or what was fed to it is wrong: export the model again, or check the inputs"};
  }

  Pool pool() const {
    return Pool([](void* self, Pool::Task task, size_t count, void* data) {
      const auto* context = static_cast<const Context*>(self);
      Status* status = call<KernelContext_ParallelFor>(
          context->api_, static_cast<const KernelContext*>(context->context_), task, count, size_t{0}, data);
      pass_on(status);
    }, const_cast<Context*>(this));
  }

 private:
  std::vector<int64_t> read_shape(const Value* value, size_t index, ElementType type) const {
    TensorInfo* info = nullptr;
    pass_on(call<GetTensorTypeAndShape>(api_, value, &info));
    const TensorInfo* const told = info;
    int found = 0;
    size_t rank = 0;
    Status* status = call<GetTensorElementType>(api_, told, &found);
    if (!status) status = call<GetDimensionsCount>(api_, told, &rank);
    std::vector<int64_t> shape(rank);
    if (!status) status = call<GetDimensions>(api_, told, shape.data(), rank);
    call<ReleaseTensorTypeAndShapeInfo>(api_, info);
    pass_on(status);
    if (found != type) {
      throw fault(index, "has element type " + std::to_string(found),
                  "type " + std::to_string(type) + " (of ONNX TensorProto)");
    }
    return shape;
  }

  void* data(Value* value) const {
    void* memory = nullptr;
    pass_on(call<GetTensorMutableData>(api_, value, &memory));
    return memory;
  }

  const Api* api_;
  KernelContext* context_;
  const char* name_;
  const char* const* inputs_;
  bool readable_;
};

// Attributes of a node.
class Attributes {
 public:
  Attributes(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    pass_on(call<KernelInfoGetAttribute_int64>(api_, info_, name, &value));
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    pass_on(call<KernelInfoGetAttribute_float>(api_, info_, name, &value));
    return value;
  }

 private:
  const Api* api_;
  const KernelInfo* info_;
};

}  // namespace sambay::ort
