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
    tokens, capacity = q.shape[1], past_key.shape[2]
    past, now = past_lengths[:, None], (past_lengths + lengths)[:, None]
    new_positions = past + torch.arange(tokens, device=q.device)  # [batch, tokens]
    slots = torch.arange(capacity, device=q.device)
    positions = torch.cat([_newest_in_slot(past, slots, capacity), new_positions], dim=1)
    distance = new_positions[:, :, None] - positions[:, None]  # [batch, tokens, capacity + tokens]
    visible = (distance >= 0) & (distance < window) & (positions >= 0)[:, None]
    new_key, new_value = (
        new.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).to(past_key.dtype) for new in (k, v)
    )
    output = attend(
        q,
        torch.cat([past_key, new_key], dim=2),
        torch.cat([past_value, new_value], dim=2),
        visible,
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    source = _newest_in_slot(now, slots, capacity) - past  # [batch, capacity]; < 0: the slot stays
    index = source.clamp(min=0)[:, None, :, None].expand(-1, num_kv_heads, -1, past_key.shape[3])
    fresh = (source >= 0)[:, None, :, None]
    present_key = torch.where(fresh, new_key.gather(2, index), past_key)
    present_value = torch.where(fresh, new_value.gather(2, index), past_value)
    return output, present_key, present_value


def _newest_in_slot(lengths: torch.Tensor, slots: torch.Tensor, capacity: int) -> torch.Tensor:
    """Position of the newest of `lengths` tokens in each slot; negative where there is none yet."""
    newest = lengths - 1
    return newest - torch.remainder(newest - slots, capacity)


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
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    rest = op.Constant(value_ints=[-1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), rest)
    split = op.Concat(op.Constant(value_ints=[0, 0]), kv_heads, rest, axis=0)
    new_key = op.CastLike(op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]), past_key)
    new_value = op.CastLike(op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]), past_value)
    keys = op.Concat(past_key, new_key, axis=2)
    values = op.Concat(past_value, new_value, axis=2)

    past = op.Unsqueeze(past_lengths, [1])  # [batch, 1]
    count = op.Unsqueeze(lengths, [1])
    capacity = op.Squeeze(op.Shape(past_key, start=2, end=3))
    offsets = op.Range(zero, op.Squeeze(op.Shape(q, start=1, end=2)), one)
    newest = op.Sub(past, one)
    age = op.Mod(op.Sub(newest, op.Range(zero, capacity, one)), capacity)
    new_positions = op.Add(past, offsets)  # [batch, tokens]
    positions = op.Concat(op.Sub(newest, age), new_positions, axis=1)  # [batch, capacity + tokens]
    distance = op.Sub(op.Unsqueeze(new_positions, [2]), op.Unsqueeze(positions, [1]))
    causal = op.And(
        op.GreaterOrEqual(distance, zero), op.Less(distance, op.Constant(value_int=window))
    )
    visible = op.And(causal, op.Unsqueeze(op.GreaterOrEqual(positions, zero), [1]))
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

    # Every token writes its slot; padding and tokens that would be overwritten at once write what a
    # kept neighbour writes, a row of padding only writes back what its slot holds.
    oldest = op.Max(op.Sub(count, capacity), zero)
    kept = op.Min(op.Max(offsets, oldest), op.Sub(count, one))  # [batch, tokens]
    slots = op.Mod(op.Add(past, kept), capacity)
    source = op.Where(op.Greater(count, zero), op.Add(capacity, kept), slots)
    from_joined = SlotIndices(source, kv_heads)
    into_ring = SlotIndices(slots, kv_heads)
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
    parts=(MaskedDifferentialAttention, SlotIndices),
)
