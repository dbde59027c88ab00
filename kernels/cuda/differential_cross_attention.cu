// Differential attention over the shared cache.
#include "differential_sweep.cuh"
#include "operators.h"

namespace sambay::cuda {

template <class Cell, class T>
void differential_cross_attention(const CrossAttention<Cell, T>& op, const Stream& stream) {
  Sweep<Cell, T> sweep{};
  sweep.heads = op.heads;
  sweep.window = op.heads.capacity;
  sweep.cache = op.cache;
  sweep.positions = op.positions;
  attend(sweep, stream);
}

#define SAMBAY_INSTANTIATE(Cell, T) \
  template void differential_cross_attention(const CrossAttention<Cell, T>&, const Stream&);
SAMBAY_FOR_CACHES(SAMBAY_INSTANTIATE)

}  // namespace sambay::cuda
