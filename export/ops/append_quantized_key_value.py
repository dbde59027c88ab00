"""Write a call's keys and values into a shared cache of 8 bits, in place where past is present.

As AppendKeyValue; the scales of the new slots stand beside their cells.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.append_key_value import SlotIndices
from export.ops.custom_op import DOMAIN, CustomOp, Sample
from export.ops.quantized_cells import QuantizeHeads, quantize_heads


def reference(
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    past_key_scale: torch.Tensor,
    past_value_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append one call's tokens.

    Args:
        past_key, past_value: [batch, kv_heads, capacity, head_size] int8; capacity holds every
            token.
        past_key_scale, past_value_scale: [batch, kv_heads, capacity] float16.
        k, v: [batch, tokens, kv_heads * head_size], the new tokens.
        past_lengths: [batch] int64, slots in use before this call.

    Returns:
        present_key, present_value, present_key_scale, present_value_scale, shaped like the past.
    """
    heads, size = past_key.shape[1], past_key.shape[3]
    slots = past_lengths[:, None] + torch.arange(k.shape[1], device=k.device)  # [batch, tokens]
    index = slots[:, None].expand(-1, heads, -1)  # [batch, kv_heads, tokens]
    key, key_scale = quantize_heads(k.unflatten(2, (heads, size)).transpose(1, 2))
    value, value_scale = quantize_heads(v.unflatten(2, (heads, size)).transpose(1, 2))
    wide = index[..., None].expand(-1, -1, -1, size)
    return (
        past_key.scatter(2, wide, key),
        past_value.scatter(2, wide, value),
        past_key_scale.scatter(2, index, key_scale),
        past_value_scale.scatter(2, index, value_scale),
    )


append_quantized_key_value = torch.library.custom_op(
    "sambay::append_quantized_key_value", reference, mutates_args=()
)


@append_quantized_key_value.register_fake
def _(past_key, past_value, past_key_scale, past_value_scale, k, v, past_lengths):
    pasts = (past_key, past_value, past_key_scale, past_value_scale)
    return tuple(torch.empty_like(past) for past in pasts)


@script(DOMAIN)
def AppendQuantizedKeyValue(
    past_key, past_value, past_key_scale, past_value_scale, k, v, past_lengths
):
    """Portable body."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    heads = op.Shape(past_key, start=1, end=2)
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    tokens = op.Squeeze(op.Shape(k, start=1, end=2))
    slots = op.Add(op.Unsqueeze(past_lengths, [1]), op.Range(zero, tokens, one))
    indices = SlotIndices(slots, heads)
    key, key_scale = QuantizeHeads(op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]))
    value, value_scale = QuantizeHeads(op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]))
    present_key = op.ScatterND(past_key, indices, key)
    present_value = op.ScatterND(past_value, indices, value)
    present_key_scale = op.ScatterND(past_key_scale, indices, key_scale)
    present_value_scale = op.ScatterND(past_value_scale, indices, value_scale)
    return present_key, present_value, present_key_scale, present_value_scale


def _sample() -> Sample:
    batch, tokens, heads, capacity, size = 3, 4, 2, 11, 6
    key, key_scale = quantize_heads(torch.randn(batch, heads, capacity, size))
    value, value_scale = quantize_heads(torch.randn(batch, heads, capacity, size))
    return Sample(
        (
            key,
            value,
            key_scale,
            value_scale,
            torch.randn(batch, tokens, heads * size),
            torch.randn(batch, tokens, heads * size),
            torch.tensor([0, 5, 7]),
        ),
        {},
    )


OP = CustomOp(
    torch.ops.sambay.append_quantized_key_value.default,
    AppendQuantizedKeyValue,
    _sample,
    parts=(SlotIndices, QuantizeHeads),
)
