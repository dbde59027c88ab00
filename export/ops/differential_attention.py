"""Sliding-window differential attention whose keys and values stand in a ring.

A query at position t sees the tokens t - window < s <= t. The token at position p stands in slot
p mod capacity; the model has no positional encoding, so the order in the ring changes nothing.

The body joins ring and new tokens before it writes: a query of this call may need each slot's old
content, and present may be the same memory as past.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.append_key_value import SlotIndices
from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable
from export.ops.masked_attention import MaskedDifferentialAttention, attend
from export.ops.ring import RingLayout, visible_in_ring, write_ring


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    lambda_: torch.Tensor,
    norm_weight: torch.Tensor,
    past_lengths: torch.Tensor,
    lengths: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    lambda_init: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend within the window and move the ring on.

    Args:
        q: [batch, tokens, num_heads * head_size].
        k, v: [batch, tokens, num_kv_heads * head_size], the new tokens.
        past_key, past_value: [batch, num_kv_heads, capacity, head_size], capacity >= window.
        lambda_: [1]; norm_weight: [2 * head_size].
        past_lengths, lengths: [batch] int64, real tokens before and in this call.

    Returns:
        Output [batch, tokens, num_heads * head_size], present_key, present_value.
    """
    new_key, new_value = (
        new.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).to(past_key.dtype) for new in (k, v)
    )
    output = attend(
        q,
        torch.cat([past_key, new_key], dim=2),
        torch.cat([past_value, new_value], dim=2),
        visible_in_ring(past_lengths, tokens=q.shape[1], capacity=past_key.shape[2], window=window),
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    present_key = write_ring(past_key, new_key, past_lengths, lengths)
    present_value = write_ring(past_value, new_value, past_lengths, lengths)
    return output, present_key, present_value


differential_attention = torch.library.custom_op(
    "sambay::differential_attention", reference, mutates_args=()
)
make_trainable(differential_attention, reference)


@differential_attention.register_fake
def _(q, k, v, past_key, past_value, *rest, **attributes):
    return torch.empty_like(q), torch.empty_like(past_key), torch.empty_like(past_value)


@script(DOMAIN)
def DifferentialAttention(
    q,
    k,
    v,
    past_key,
    past_value,
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
    new_key = op.CastLike(op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]), past_key)
    new_value = op.CastLike(op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]), past_value)
    keys = op.Concat(past_key, new_key, axis=2)
    values = op.Concat(past_value, new_value, axis=2)

    visible, from_joined, into_ring = RingLayout(q, past_key, past_lengths, lengths, window=window)
    output = MaskedDifferentialAttention(
        q,
        keys,
        values,
        visible,
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    present_key = op.ScatterND(past_key, into_ring, op.GatherND(keys, from_joined))
    present_value = op.ScatterND(past_value, into_ring, op.GatherND(values, from_joined))
    return output, present_key, present_value


def _sample() -> Sample:
    batch, tokens, heads, kv_heads, capacity, size = 4, 7, 8, 4, 5, 6
    return Sample(
        (
            torch.randn(batch, tokens, heads * size),
            torch.randn(batch, tokens, kv_heads * size),
            torch.randn(batch, tokens, kv_heads * size),
            torch.randn(batch, kv_heads, capacity, size),
            torch.randn(batch, kv_heads, capacity, size),
            torch.tensor([0.4]),
            torch.randn(2 * size),
            torch.tensor([0, 3, 12, 6]),
            torch.tensor([7, 4, 7, 0]),
        ),
        {"num_heads": heads, "num_kv_heads": kv_heads, "window": 4, "lambda_init": 0.35},
    )


OP = CustomOp(
    torch.ops.sambay.differential_attention.default,
    DifferentialAttention,
    _sample,
    parts=(MaskedDifferentialAttention, RingLayout, SlotIndices),
)
