// CUDA as far as kernels/cuda uses it, on one thread of a processor: every statement of the kernels runs
// where there is no GPU.
//
// Blocks run one after the other. The threads of a block are contexts of their own that give way to each
// other where they must wait: at __syncthreads and in shuffles. In between each runs alone, in odd
// launches from the last to the first, so a missing barrier shows as a wrong result. Shared memory starts
// as NaN. Device memory is the process's, so a sanitizer sees what is touched.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sambay::cuda {
constexpr size_t kSharedBytes = 48 * 1024;  // what every device grants a block unasked
alignas(16) inline float shared_memory[kSharedBytes / sizeof(float)];
}  // namespace sambay::cuda

namespace cuda_on_host {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned waiting = 0, passed = 0;
};

struct Thread {
  ucontext_t start;
  jmp_buf state;
  bool began, ended;
  unsigned shuffles;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Block {
  std::vector<Thread> threads{kMostThreads};
  std::vector<Barrier> warps{kMostThreads / kWarp};
  Barrier all;
  float exchanged[2][kMostThreads];
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned size, current, moved;
};
inline Block block;

inline void give_way() {
  if (!_setjmp(block.threads[block.current].state)) _longjmp(block.scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned count) {
  ++block.moved;
  const unsigned passed = barrier.passed;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == passed) give_way();
  ++block.moved;
}

inline void run_thread() {
  block.body();
  block.threads[block.current].ended = true;
  ++block.moved;
  _longjmp(block.scheduler, 1);
}

inline void resume(unsigned index) {
  Thread& thread = block.threads[index];
  block.current = threadIdx.x = index;
  if (_setjmp(block.scheduler)) return;
  if (thread.began) _longjmp(thread.state, 1);
  thread.began = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, run_thread, 0);
  setcontext(&thread.start);
}

inline void run_block(bool backwards) {
  block.all = {};
  for (Barrier& warp : block.warps) warp = {};
  for (Thread& thread : block.threads) thread.began = thread.ended = false, thread.shuffles = 0;
  for (float& x : sambay::cuda::shared_memory) x = std::numeric_limits<float>::quiet_NaN();
  for (unsigned ended = 0; ended < block.size;) {
    block.moved = ended = 0;
    for (unsigned i = 0; i < block.size; ++i) {
      const unsigned index = backwards ? block.size - 1 - i : i;
      if (!block.threads[index].ended) resume(index);
      ended += block.threads[index].ended;
    }
    if (!block.moved) {
      std::fputs("the threads of a block wait for each other for ever\n", stderr);
      std::abort();
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block.all, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  using namespace cuda_on_host;
  const unsigned index = block.current;
  float* const exchanged = block.exchanged[block.threads[index].shuffles++ % 2];
  exchanged[index] = x;
  wait(block.warps[index / kWarp], kWarp);
  return exchanged[index ^ static_cast<unsigned>(mask)];
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_host;
  static std::mutex one_at_a_time;
  static unsigned launches = 0;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const unsigned threads = config->blockDim.x;
  if (threads % kWarp || threads > kMostThreads || config->dynamicSmemBytes > sambay::cuda::kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config->gridDim, blockDim = config->blockDim;
  block.size = threads;
  block.body = [&] { kernel(arguments...); };
  ++launches;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(launches % 2);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration";
}
