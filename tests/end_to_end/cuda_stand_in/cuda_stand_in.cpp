// CUDA's libraries without a device, as far as ONNX Runtime's CUDA provider calls them.
//
// Device memory is the processor's, kernels do nothing, copies copy. Every call that a stream must not see
// while it is captured, or whose replay would read memory of others, is a line of the file CUDA_STAND_IN_LOG
// names, and so are captures, replays and graphs given back:
//
//     capture | captured LAUNCHES | replay GRAPH | release GRAPH | forbidden WHAT | reads pinned BYTES
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#undef cudaGetDeviceProperties

namespace {

constexpr size_t kAlignment = 256;  // as CUDA's

enum Kind { kPageable, kDevice, kPinned };

struct Block {
  size_t bytes;
  Kind kind;
};

std::recursive_mutex mutex;
std::map<char*, Block> blocks;
cudaStream_t captured_stream = nullptr;
bool capturing = false;
long launches = 0;

void tell(const char* format, ...) {
  static FILE* const log = std::fopen(std::getenv("CUDA_STAND_IN_LOG"), "w");
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(log, format, arguments);
  va_end(arguments);
  std::fputc('\n', log);
  std::fflush(log);
}

cudaError_t forbid(const char* what) {
  if (capturing) tell("forbidden %s", what);
  return cudaSuccess;
}

Kind kind_of(const void* memory) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  auto after = blocks.upper_bound(static_cast<char*>(const_cast<void*>(memory)));
  if (after == blocks.begin()) return kPageable;
  --after;
  return static_cast<const char*>(memory) < after->first + after->second.bytes ? after->second.kind : kPageable;
}

cudaError_t allocate(void** memory, size_t bytes, Kind kind) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const size_t aligned = (bytes / kAlignment + 1) * kAlignment;
  *memory = std::memset(std::aligned_alloc(kAlignment, aligned), 0, aligned);
  blocks[static_cast<char*>(*memory)] = {bytes, kind};
  return forbid("allocation");
}

cudaError_t release(void* memory) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  blocks.erase(static_cast<char*>(memory));
  std::free(memory);
  return memory ? forbid("release") : cudaSuccess;
}

cudaError_t launch(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (!capturing) return cudaSuccess;
  ++launches;
  return stream == captured_stream ? cudaSuccess : forbid("launch on another stream");
}

cudaError_t copy(void* to, const void* from, size_t bytes, bool waits) {
  if (capturing) {
    const Kind source = kind_of(from), target = kind_of(to);
    if (waits) forbid("copy that waits");
    if (source == kPageable || target != kDevice) forbid("copy from or to memory of the program");
    if (source == kPinned) tell("reads pinned %zu", bytes);
  }
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

template <class Handle>
cudaError_t make(Handle* handle) {
  *handle = static_cast<Handle>(static_cast<void*>(std::calloc(1, 4096)));
  return cudaSuccess;
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    default: return 1;
  }
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) { return allocate(memory, bytes, kDevice); }
cudaError_t cudaMallocFromPoolAsync(void** memory, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return allocate(memory, bytes, kDevice);
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return allocate(memory, bytes, kPinned); }
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return allocate(memory, bytes, kPinned); }
cudaError_t cudaFree(void* memory) { return release(memory); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return release(memory); }
cudaError_t cudaFreeHost(void* memory) { return release(memory); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return make(pool); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t{1} << 36;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* told, const void* memory) {
  *told = {};
  const cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeHost};
  told->type = types[kind_of(memory)];
  told->devicePointer = told->hostPointer = const_cast<void*>(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return copy(to, from, bytes, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes, false);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) {
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width, false);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void*, size_t bytes, size_t, cudaMemcpyKind) {
  std::memset(to, 0, bytes);
  return forbid("copy that waits");
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return forbid("fill that waits");
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make(stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return forbid("wait for a stream"); }
cudaError_t cudaDeviceSynchronize() { return forbid("wait for the device"); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return make(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make(event); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return forbid("wait for an event"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return forbid("call of the program");
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  captured_stream = stream;
  capturing = true;
  launches = 0;
  tell("capture");
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = false;
  tell("captured %ld", launches);
  return make(graph);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool this_one = capturing && stream == captured_stream;
  *status = this_one ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) { return make(graph); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  tell("replay %p", static_cast<void*>(graph));
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  tell("release %p", static_cast<void*>(graph));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return launch(stream); }
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch(config->stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) { return make(kernel); }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) { return make(kernel); }
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  return make(library);
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
thread_local cudaStream_t pushed_stream;
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t stream) {
  pushed_stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3(1);
  *shared = 0;
  *static_cast<cudaStream_t*>(stream) = pushed_stream;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* told, const void*) {
  *told = {};
  told->maxThreadsPerBlock = 1024;
  told->binaryVersion = told->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* told, int) {
  std::memset(told, 0, sizeof *told);
  std::strcpy(told->name, "stand-in");
  told->major = attribute(cudaDevAttrComputeCapabilityMajor);
  told->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  told->warpSize = attribute(cudaDevAttrWarpSize);
  told->maxThreadsPerBlock = told->maxThreadsDim[0] = attribute(cudaDevAttrMaxThreadsPerBlock);
  told->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  told->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  told->maxGridSize[1] = told->maxGridSize[2] = 65535;
  told->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  told->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  told->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  told->regsPerBlock = told->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  told->totalGlobalMem = size_t{1} << 36;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "no error"; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
const char* cublasGetStatusName(int) { return "no error"; }
const char* cublasGetStatusString(int) { return "no error"; }
int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}

// What gives a handle. All others that the libraries ask for do nothing: the test makes them.
#define SAMBAY_MAKES(name) \
  int name(void** handle) { return make(handle); }

SAMBAY_MAKES(cublasCreate_v2)
SAMBAY_MAKES(cublasLtCreate)
SAMBAY_MAKES(cublasLtMatmulDescCreate)
SAMBAY_MAKES(cublasLtMatmulPreferenceCreate)
SAMBAY_MAKES(cublasLtMatrixLayoutCreate)
SAMBAY_MAKES(cublasLtMatrixTransformDescCreate)
SAMBAY_MAKES(cudnnCreate)
SAMBAY_MAKES(cudnnCreateReduceTensorDescriptor)
SAMBAY_MAKES(cudnnCreateTensorDescriptor)

}  // extern "C"
