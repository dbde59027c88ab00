// The few entries of ONNX Runtime's C interface that we call, so that building needs none of its files.
//
// The interface is append-only: an entry keeps its place in OrtApi for ever, so a library that asks for
// version 17 (the first with ParallelFor for custom operators) runs in every later ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define SAMBAY_ORT_CALL __stdcall
#define SAMBAY_EXPORT extern "C" __declspec(dllexport)
#else
#define SAMBAY_ORT_CALL
#define SAMBAY_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace sambay::ort {

constexpr uint32_t kApiVersion = 17;
constexpr uint32_t kScratchApiVersion = 18;  // the first with KernelContext_GetScratchBuffer

// Opaque types of the interface.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct CustomOp;
struct MemoryInfo;

constexpr int kInvalidArgument = 2;  // OrtErrorCode
constexpr int kFail = 1;
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10 };  // ONNXTensorElementDataType

// OrtApi is a table of function pointers; a slot is an entry's place in it, and its signature.
template <size_t kIndex, class Function>
struct Slot;
template <size_t kIndex, class Result, class... Args>
struct Slot<kIndex, Result(Args...)> {
  static constexpr size_t index = kIndex;
  using Pointer = Result(SAMBAY_ORT_CALL*)(Args...);
};

struct Api;  // OrtApi

template <class Entry, class... Args>
auto call(const Api* api, Args... args) {
  const auto entry = reinterpret_cast<const typename Entry::Pointer*>(api)[Entry::index];
  return entry(args...);
}

struct Allocator {  // OrtAllocator as of version 17
  uint32_t version;
  void*(SAMBAY_ORT_CALL* Alloc)(Allocator*, size_t bytes);
  void(SAMBAY_ORT_CALL* Free)(Allocator*, void* memory);
  const MemoryInfo*(SAMBAY_ORT_CALL* Info)(const Allocator*);
};

using CreateStatus = Slot<0, Status*(int code, const char* message)>;
using CreateCustomOpDomain = Slot<26, Status*(const char* domain, CustomOpDomain** out)>;
using CustomOpDomain_Add = Slot<27, Status*(CustomOpDomain* domain, const CustomOp* op)>;
using AddCustomOpDomain = Slot<28, Status*(SessionOptions* options, CustomOpDomain* domain)>;
using GetTensorMutableData = Slot<51, Status*(Value* value, void** out)>;
using GetTensorElementType = Slot<60, Status*(const TensorInfo* info, int* out)>;
using GetDimensionsCount = Slot<61, Status*(const TensorInfo* info, size_t* out)>;
using GetDimensions = Slot<62, Status*(const TensorInfo* info, int64_t* out, size_t count)>;
using GetTensorTypeAndShape = Slot<65, Status*(const Value* value, TensorInfo** out)>;
using KernelInfoGetAttribute_float = Slot<85, Status*(const KernelInfo*, const char* name, float*)>;
using KernelInfoGetAttribute_int64 = Slot<86, Status*(const KernelInfo*, const char* name, int64_t*)>;
using KernelContext_GetInput = Slot<90, Status*(const KernelContext*, size_t index, const Value**)>;
using KernelContext_GetOutput =
    Slot<91, Status*(KernelContext*, size_t index, const int64_t* shape, size_t rank, Value** out)>;
using ReleaseStatus = Slot<93, void(Status*)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(TensorInfo*)>;
using ReleaseAllocator = Slot<132, void(Allocator*)>;
using KernelContext_GetGPUComputeStream = Slot<193, Status*(const KernelContext*, void** out)>;
using GetTensorMemoryInfo = Slot<194, Status*(const Value* value, const MemoryInfo** out)>;
using KernelContext_GetAllocator = Slot<253, Status*(const KernelContext*, const MemoryInfo*, Allocator** out)>;
using KernelContext_ParallelFor =
    Slot<274, Status*(const KernelContext*, void (*task)(void* data, size_t index), size_t count,
                      size_t batches, void* data)>;
using KernelContext_GetScratchBuffer =
    Slot<277, Status*(const KernelContext*, const MemoryInfo*, size_t bytes, void** out)>;

struct ApiBase {  // OrtApiBase
  const Api*(SAMBAY_ORT_CALL* GetApi)(uint32_t version);
  const char*(SAMBAY_ORT_CALL* GetVersionString)();
};

struct CustomOp {  // OrtCustomOp as of version 17
  uint32_t version;
  void*(SAMBAY_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(SAMBAY_ORT_CALL* GetName)(const CustomOp*);
  const char*(SAMBAY_ORT_CALL* GetExecutionProviderType)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetInputType)(const CustomOp*, size_t index);
  size_t(SAMBAY_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetOutputType)(const CustomOp*, size_t index);
  size_t(SAMBAY_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(SAMBAY_ORT_CALL* KernelCompute)(void* kernel, KernelContext*);
  void(SAMBAY_ORT_CALL* KernelDestroy)(void* kernel);
  int(SAMBAY_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t index);
  int(SAMBAY_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t index);
  int(SAMBAY_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t index);
  int(SAMBAY_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(SAMBAY_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status*(SAMBAY_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*);
  Status*(SAMBAY_ORT_CALL* InferOutputShapeFn)(const CustomOp*, void* context);
  int(SAMBAY_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(SAMBAY_ORT_CALL* GetEndVersion)(const CustomOp*);
};

}  // namespace sambay::ort
