// How a library of operators enters ONNX Runtime: descriptions of operators, errors as statuses, the domain.
//
// A Device says where operators run: Device::kProvider, the execution provider it belongs to, null for the
// CPU; Device::kReadable, whether tensors stand in the processor's memory; a constructor without arguments,
// called for every node; and run(op, context) for every operator struct of kernels.h.
#pragma once

#include <cstddef>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <string>

#include "ort_context.h"

namespace sambay::ort {

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

// A node of the graph: the operator's attributes, and where it runs.
template <class Operator, class Device>
struct Node {
  Operator op;
  Device device;
  const Api* api;
};

template <class Device, class Operator>
const CustomOp* describe() {
  static const CustomOp described = [] {
    CustomOp op{};
    op.version = kApiVersion;
    op.GetName = [](const CustomOp*) { return Operator::kName; };
    op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return Device::kProvider; };
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
        *kernel = new Node<Operator, Device>{Operator(Attributes(api, info)), Device(), api};
      });
    };
    op.KernelComputeV2 = [](void* kernel, KernelContext* run) {
      const auto& node = *static_cast<const Node<Operator, Device>*>(kernel);
      return guarded(node.api, Operator::kName, [&] {
        const Context context(node.api, run, Operator::kName, Operator::kInputs, Device::kReadable);
        node.op.run(context, node.device);
      });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Node<Operator, Device>*>(kernel); };
    op.GetStartVersion = [](const CustomOp*) { return 1; };
    op.GetEndVersion = [](const CustomOp*) { return 1; };
    return op;
  }();
  return &described;
}

// Body of RegisterCustomOps: adds the operators to a session's options.
inline Status* register_operators(SessionOptions* options, const ApiBase* base, uint32_t version,
                                  std::initializer_list<const CustomOp*> operators) {
  const Api* api = base->GetApi(version);
  if (!api) {  // there is no table to make a status with
    const std::string message = "the operators need ONNX Runtime 1." + std::to_string(version) + " or newer";
    return call<CreateStatus>(base->GetApi(1), kFail, message.c_str());
  }
  static CustomOpDomain* domain = nullptr;  // one a library, never released: sessions refer to it
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

}  // namespace sambay::ort
