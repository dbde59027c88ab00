"""Sliding-window differential attention over a ring of 8 bits.

As DifferentialAttention. The new tokens are quantized before they are read, so a query sees of a
token what later calls will see: any split of a text into calls gives the same result.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.append_key_value import SlotIndices
from export.ops.custom_op import DOMAIN, CustomOp, Sample
from export.ops.masked_attention import MaskedDifferentialAttention, attend
from export.ops.quantized_cells import (
    DequantizeHeads,
    QuantizeHeads,
    dequantize_heads,
    quantize_heads,
)
from export.ops.ring import RingLayout, visible_in_ring, write_ring


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    past_key_scale: torch.Tensor,
    past_value_scale: torch.Tensor,
    lambda_: torch.Tensor,
    norm_weight: torch.Tensor,
    past_lengths: torch.Tensor,
    lengths: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    lambda_init: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend within the window and move the ring on.

    Args:
        q: [batch, tokens, num_heads * head_size].
        k, v: [batch, tokens, num_kv_heads * head_size], the new tokens.
        past_key, past_value: [batch, num_kv_heads, capacity, head_size] int8, capacity >= window.
        past_key_scale, past_value_scale: [batch, num_kv_heads, capacity] float16.
        lambda_: [1]; norm_weight: [2 * head_size].
        past_lengths, lengths: [batch] int64, real tokens before and in this call.

    Returns:
        Output [batch, tokens, num_heads * head_size], present_key, present_value,
        present_key_scale, present_value_scale.
    """
    key, key_scale = quantize_heads(k.unflatten(2, (num_kv_heads, -1)).transpose(1, 2))
    value, value_scale = quantize_heads(v.unflatten(2, (num_kv_heads, -1)).transpose(1, 2))
    joined_key = dequantize_heads(
        torch.cat([past_key, key], dim=2), torch.cat([past_key_scale, key_scale], dim=2)
    )
    joined_value = dequantize_heads(
        torch.cat([past_value, value], dim=2), torch.cat([past_value_scale, value_scale], dim=2)
    )
    output = attend(
        q,
        joined_key,
        joined_value,
        visible_in_ring(past_lengths, tokens=q.shape[1], capacity=past_key.shape[2], window=window),
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    return (
        output,
        write_ring(past_key, key, past_lengths, lengths),
        write_ring(past_value, value, past_lengths, lengths),
        write_ring(past_key_scale, key_scale, past_lengths, lengths),
        write_ring(past_value_scale, value_scale, past_lengths, lengths),
    )


quantized_differential_attention = torch.library.custom_op(
    "sambay::quantized_differential_attention", reference, mutates_args=()
)


@quantized_differential_attention.register_fake
def _(q, k, v, past_key, past_value, past_key_scale, past_value_scale, *rest, **attributes):
    states = (past_key, past_value, past_key_scale, past_value_scale)
    return torch.empty_like(q), *(torch.empty_like(state) for state in states)


@script(DOMAIN)
def QuantizedDifferentialAttention(
    q,
    k,
    v,
    past_key,
    past_value,
    past_key_scale,
    past_value_scale,
    lambda_,
    norm_weight,
    past_lengths,
    lengths,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    lambda_init: float,
):
    """Portable body."""
    rest = op.Constant(value_ints=[-1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), rest)
    split = op.Concat(op.Constant(value_ints=[0, 0]), kv_heads, rest, axis=0)
    new_key, new_key_scale = QuantizeHeads(op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]))
    new_value, new_value_scale = QuantizeHeads(
        op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3])
    )
    keys = op.Concat(past_key, new_key, axis=2)
    values = op.Concat(past_value, new_value, axis=2)
    key_scales = op.Concat(past_key_scale, new_key_scale, axis=2)
    value_scales = op.Concat(past_value_scale, new_value_scale, axis=2)
    visible, from_joined, into_ring = RingLayout(q, past_key, past_lengths, lengths, window=window)
    output = MaskedDifferentialAttention(
        q,
        DequantizeHeads(keys, key_scales),
        DequantizeHeads(values, value_scales),
        visible,
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    present_key = op.ScatterND(past_key, into_ring, op.GatherND(keys, from_joined))
    present_value = op.ScatterND(past_value, into_ring, op.GatherND(values, from_joined))
    present_key_scale = op.ScatterND(
        past_key_scale, into_ring, op.GatherND(key_scales, from_joined)
    )
    present_value_scale = op.ScatterND(
        past_value_scale, into_ring, op.GatherND(value_scales, from_joined)
    )
    return output, present_key, present_value, present_key_scale, present_value_scale


def _sample() -> Sample:
    batch, tokens, heads, kv_heads, capacity, size = 4, 7, 8, 4, 5, 6
    key, key_scale = quantize_heads(torch.randn(batch, kv_heads, capacity, size))
    value, value_scale = quantize_heads(torch.randn(batch, kv_heads, capacity, size))
    return Sample(
        (
            torch.randn(batch, tokens, heads * size),
            torch.randn(batch, tokens, kv_heads * size),
            torch.randn(batch, tokens, kv_heads * size),
            key,
            value,
            key_scale,
            value_scale,
            torch.tensor([0.4]),
            torch.randn(2 * size),
            torch.tensor([0, 3, 12, 6]),
            torch.tensor([7, 4, 7, 0]),
        ),
        {"num_heads": heads, "num_kv_heads": kv_heads, "window": 4, "lambda_init": 0.35},
    )


OP = CustomOp(
    torch.ops.sambay.quantized_differential_attention.default,
    QuantizedDifferentialAttention,
    _sample,
    parts=(MaskedDifferentialAttention, RingLayout, SlotIndices, QuantizeHeads, DequantizeHeads),
)
