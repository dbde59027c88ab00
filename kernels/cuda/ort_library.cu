// The library of operators for CUDA devices, as ONNX Runtime loads it.
#include "../ort_library.h"

#include "../ort_caches.h"
#include "../ort_operators.h"
#include "operators.h"

#ifndef SAMBAY_CUDA_PROVIDER  // the tests that run the kernels on a processor say null
#define SAMBAY_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace sambay::cuda {
namespace {

// Where operators run: on the device and the stream that ONNX Runtime chose.
struct Device {
  static constexpr const char* kProvider = SAMBAY_CUDA_PROVIDER;
  static constexpr bool kReadable = false;

  template <class T>
  void run(const CausalConvOf<T>& op, const ort::Context& context) const {
    causal_conv_with_state(op, Stream(context));
  }
  template <class T>
  void run(const ScanOf<T>& op, const ort::Context& context) const {
    selective_scan(op, Stream(context));
  }
  template <class T>
  void run(const GatedMemoryOf<T>& op, const ort::Context& context) const {
    gated_memory_unit(op, Stream(context));
  }
  template <class Cell, class T>
  void run(const Append<Cell, T>& op, const ort::Context& context) const {
    append_key_value(op, Stream(context));
  }
  template <class Cell, class T>
  void run(const WindowAttention<Cell, T>& op, const ort::Context& context) const {
    differential_attention(op, Stream(context));
  }
  template <class Cell, class T>
  void run(const CrossAttention<Cell, T>& op, const ort::Context& context) const {
    differential_cross_attention(op, Stream(context));
  }
};

template <class Operator>
const ort::CustomOp* describe() {
  return ort::describe<Device, Operator>();
}

}  // namespace
}  // namespace sambay::cuda

// What ONNX Runtime calls when a session registers this library.
SAMBAY_EXPORT sambay::ort::Status* SAMBAY_ORT_CALL RegisterCustomOps(sambay::ort::SessionOptions* options,
                                                                     const sambay::ort::ApiBase* base) {
  using namespace sambay::ort;
  using sambay::Half;
  using sambay::cuda::describe;
#define SAMBAY_DESCRIBE(Cell, T)                                                          \
  describe<AppendKeyValue<Cell, T>>(), describe<DifferentialAttention<Cell, T>>(),        \
      describe<DifferentialCrossAttention<Cell, T>>(),
  return register_operators(options, base, kScratchApiVersion,
                            {
                                describe<CausalConvWithState<float>>(),
                                describe<CausalConvWithState<Half>>(),
                                describe<SelectiveScan<float>>(),
                                describe<SelectiveScan<Half>>(),
                                describe<GatedMemoryUnit<float>>(),
                                describe<GatedMemoryUnit<Half>>(),
                                SAMBAY_FOR_CACHES(SAMBAY_DESCRIBE)
                            });
}
