// What an operator's launches need of ONNX Runtime and of CUDA: the run's stream, scratch memory, launches.
//
// Nothing here waits for the device or allocates outside ONNX Runtime's arena, so a CUDA graph can be
// captured over all of it: the same sizes give the same launches at the same addresses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "../ort_context.h"

namespace sambay::cuda {

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of one launch

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw ort::Fault{std::string(what) + " failed on the CUDA device: " + cudaGetErrorString(error)};
}

// The stream of one run of one node.
class Stream {
 public:
  explicit Stream(const ort::Context& context) : context_(context) {
    void* handle = nullptr;
    ort::pass_on(ort::call<ort::KernelContext_GetGPUComputeStream>(
        context.api(), static_cast<const ort::KernelContext*>(context.raw()), &handle));
    handle_ = static_cast<cudaStream_t>(handle);
  }

  const ort::Context& context() const { return context_; }
  bool is_default() const { return handle_ == nullptr; }

  // Runs `kernel` on `blocks` blocks of `threads` threads with `floats` floats of shared memory each.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t floats,
              const Parameters&... arguments) const {
    if (blocks < 1) return;
    if (blocks > kMostBlocks) {
      throw ort::Fault{"the inputs need " + std::to_string(blocks) + " blocks on the CUDA device; expected " +
                       std::to_string(kMostBlocks) + " at most. Feed fewer rows or tokens at a time"};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(floats) * sizeof(float);
    config.stream = handle_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "a launch");
  }

  // `count` elements from `from` to `to`, unless they are there already.
  template <class T>
  void copy(const T* from, T* to, int64_t count) const {
    if (from == to || count < 1) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, handle_), "a copy");
  }

  int64_t multiprocessors() const {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "asking for the device");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking the device");
    return count;
  }

 private:
  const ort::Context& context_;
  cudaStream_t handle_ = nullptr;
};

// Memory of ONNX Runtime's arena beside input 0, for the launches of one run. Given back at once: what
// takes it next runs later on the same stream.
template <class T>
class Scratch {
 public:
  Scratch(const Stream& stream, int64_t count) : api_(stream.context().api()) {
    if (count < 1) return;
    const ort::KernelContext* context = stream.context().raw();
    const ort::Value* value = nullptr;
    const ort::MemoryInfo* place = nullptr;
    ort::pass_on(ort::call<ort::KernelContext_GetInput>(api_, context, size_t{0}, &value));
    ort::pass_on(ort::call<ort::GetTensorMemoryInfo>(api_, value, &place));
    ort::pass_on(ort::call<ort::KernelContext_GetAllocator>(api_, context, place, &allocator_));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    void* memory = nullptr;
    ort::Status* status = nullptr;
    if (stream.is_default()) {  // nothing that other streams could take while it is in use
      memory = allocator_->Alloc(allocator_, bytes);
    } else {
      status = ort::call<ort::KernelContext_GetScratchBuffer>(api_, context, place, bytes, &memory);
    }
    data_ = static_cast<T*>(memory);
    if (data_) return;
    ort::call<ort::ReleaseAllocator>(api_, allocator_);
    ort::pass_on(status);
    throw ort::Fault{std::to_string(bytes) + " bytes of scratch memory cannot be had on the CUDA device"};
  }
  ~Scratch() {
    if (!data_) return;
    allocator_->Free(allocator_, data_);
    ort::call<ort::ReleaseAllocator>(api_, allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  const ort::Api* api_;
  ort::Allocator* allocator_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace sambay::cuda
