// Gated memory unit: silu(gate) * memory, a thread an element.
#include "device.cuh"
#include "operators.h"

namespace sambay::cuda {
namespace {

constexpr int64_t kThreads = 256;

template <class T>
__global__ void gate(const GatedMemoryOf<T> op) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < op.size) store(op.output + i, silu(to_float(op.gate[i])) * to_float(op.memory[i]));
}

}  // namespace

template <class T>
void gated_memory_unit(const GatedMemoryOf<T>& op, const Stream& stream) {
  stream.launch(gate<T>, (op.size + kThreads - 1) / kThreads, kThreads, 0, op);
}

template void gated_memory_unit(const GatedMemoryOf<float>&, const Stream&);
template void gated_memory_unit(const GatedMemoryOf<Half>&, const Stream&);

}  // namespace sambay::cuda
