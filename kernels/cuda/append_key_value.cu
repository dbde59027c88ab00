// Keys and values of new tokens into the shared cache, of any element type.
#include "cache_slots.cuh"
#include "operators.h"

namespace sambay::cuda {

template <class Cell, class T>
void append_key_value(const Append<Cell, T>& op, const Stream& stream) {
  copy_cache(stream, op.past, op.present, op.batch * op.kv_heads * op.capacity, op.head_size);
  const Place place{Place::kAppended, op.tokens, op.kv_heads, op.capacity, op.past_lengths, nullptr};
  write_new(stream, Writes<Cell, T>{
                        place, op.batch, op.head_size, {op.k, op.v}, {op.present.key, op.present.value}});
}

#define SAMBAY_INSTANTIATE(Cell, T) template void append_key_value(const Append<Cell, T>&, const Stream&);
SAMBAY_FOR_CACHES(SAMBAY_INSTANTIATE)

}  // namespace sambay::cuda
