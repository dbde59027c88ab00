"""The operators of domain ``ai.sambay``, one file each."""

from export.ops import (
    append_key_value,
    append_quantized_key_value,
    causal_conv_with_state,
    differential_attention,
    differential_cross_attention,
    gated_memory_unit,
    quantized_differential_attention,
    quantized_differential_cross_attention,
    selective_scan,
)

OPS = (
    causal_conv_with_state.OP,
    selective_scan.OP,
    gated_memory_unit.OP,
    differential_attention.OP,
    append_key_value.OP,
    differential_cross_attention.OP,
    quantized_differential_attention.OP,
    append_quantized_key_value.OP,
    quantized_differential_cross_attention.OP,
)
