// The operators of domain ai.sambay on a CUDA device, one .cu file each.
//
// Arguments as in ../kernels.h, in the device's memory; T and Cell are float or Half, Cell int8_t too.
// Sizes were checked by the caller; lengths and positions stand on the device and were not: whatever they
// hold, nothing outside the tensors is touched, and lengths beyond their range count as its ends.
#pragma once

#include "../kernels.h"
#include "stream.h"

namespace sambay::cuda {

template <class T>
void causal_conv_with_state(const CausalConvOf<T>& op, const Stream& stream);
template <class T>
void selective_scan(const ScanOf<T>& op, const Stream& stream);
template <class T>
void gated_memory_unit(const GatedMemoryOf<T>& op, const Stream& stream);
template <class Cell, class T>
void append_key_value(const Append<Cell, T>& op, const Stream& stream);
template <class Cell, class T>
void differential_attention(const WindowAttention<Cell, T>& op, const Stream& stream);
template <class Cell, class T>
void differential_cross_attention(const CrossAttention<Cell, T>& op, const Stream& stream);

// SAMBAY_FOR_CACHES(X): X(cell, activation) for every pair of types.
#define SAMBAY_FOR_CACHES(X) \
  X(float, float) X(float, Half) X(Half, float) X(Half, Half) X(int8_t, float) X(int8_t, Half)

}  // namespace sambay::cuda
