// Sliding-window differential attention over a ring.
//
// All queries read the ring as it was and the new tokens beside it; only the next launch writes the new
// tokens into the ring. So past and present may be one memory, and no copy of the ring is made for it.
#include "differential_sweep.cuh"
#include "operators.h"

namespace sambay::cuda {

template <class Cell, class T>
void differential_attention(const WindowAttention<Cell, T>& op, const Stream& stream) {
  const HeadsOf<T>& heads = op.heads;
  const int64_t slots = heads.batch * heads.queries * heads.kv_heads;
  Sweep<Cell, T> sweep{};
  sweep.heads = heads;
  sweep.window = op.window;
  sweep.cache = op.past;
  sweep.past_lengths = op.past_lengths;
  if constexpr (std::is_same_v<Cell, T>) {
    sweep.fresh = {{op.k, nullptr}, {op.v, nullptr}};
    attend(sweep, stream);
  } else {  // a query must see what later calls will see
    const Scratch<Cell> keys(stream, slots * heads.head_size), values(stream, slots * heads.head_size);
    const Scratch<Half> scales(stream, kScaled<Cell> ? 2 * slots : 0);
    const Cache<Cell> fresh{{keys.data(), scales.data()},
                            {values.data(), scales.data() ? scales.data() + slots : nullptr}};
    const Place in_order{Place::kInOrder, heads.queries, heads.kv_heads, 0, nullptr, nullptr};
    write_new(stream, Writes<Cell, T>{
                          in_order, heads.batch, heads.head_size, {op.k, op.v}, {fresh.key, fresh.value}});
    sweep.fresh = {{fresh.key.cells, fresh.key.scales}, {fresh.value.cells, fresh.value.scales}};
    attend(sweep, stream);
  }
  copy_cache(stream, op.past, op.present, heads.batch * heads.kv_heads * heads.capacity, heads.head_size);
  const Place in_ring{Place::kInRing, heads.queries, heads.kv_heads, heads.capacity, op.past_lengths, op.lengths};
  write_new(stream, Writes<Cell, T>{in_ring,
                                    heads.batch,
                                    heads.head_size,
                                    {op.k, op.v},
                                    {op.present.key, op.present.value}});
}

#define SAMBAY_INSTANTIATE(Cell, T) \
  template void differential_attention(const WindowAttention<Cell, T>&, const Stream&);
SAMBAY_FOR_CACHES(SAMBAY_INSTANTIATE)

}  // namespace sambay::cuda
