"""The ring that a window layer's keys and values stand in: what its operators share.

The token at position p stands in slot p mod capacity. A call's queries see the ring as it was and
the call's own tokens behind it, so ring and new tokens are joined to one axis: slots
0 .. capacity - 1, then tokens.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.append_key_value import SlotIndices
from export.ops.custom_op import DOMAIN


def visible_in_ring(
    past_lengths: torch.Tensor, *, tokens: int, capacity: int, window: int
) -> torch.Tensor:
    """What each new token sees: bool [batch, tokens, capacity + tokens].

    Args:
        past_lengths: [batch] int64, real tokens before this call.
    """
    past = past_lengths[:, None]
    new_positions = past + torch.arange(tokens, device=past.device)  # [batch, tokens]
    slots = torch.arange(capacity, device=past.device)
    positions = torch.cat([_newest_in_slot(past, slots, capacity), new_positions], dim=1)
    distance = new_positions[:, :, None] - positions[:, None]  # [batch, tokens, capacity + tokens]
    return (distance >= 0) & (distance < window) & (positions >= 0)[:, None]


def write_ring(
    past: torch.Tensor, new: torch.Tensor, past_lengths: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The ring after the call.

    Args:
        past: [batch, heads, capacity, ...].
        new: [batch, heads, tokens, ...], dtype of past.
        past_lengths, lengths: [batch] int64, real tokens before and in this call.
    """
    capacity = past.shape[2]
    before, now = past_lengths[:, None], (past_lengths + lengths)[:, None]
    slots = torch.arange(capacity, device=past.device)
    source = _newest_in_slot(now, slots, capacity) - before  # [batch, capacity]; < 0: it stays
    source = source[:, None].reshape(len(past), 1, capacity, *[1] * (past.dim() - 3))
    return torch.where(source >= 0, new.gather(2, source.clamp(min=0).expand_as(past)), past)


def _newest_in_slot(lengths: torch.Tensor, slots: torch.Tensor, capacity: int) -> torch.Tensor:
    """Position of the newest of `lengths` tokens in each slot; negative where there is none yet."""
    newest = lengths - 1
    return newest - torch.remainder(newest - slots, capacity)


@script(DOMAIN)
def RingLayout(q, past_key, past_lengths, lengths, window: int):
    """What the queries see, and which joined slots go to which of the ring.

    Returns visible [batch, tokens, capacity + tokens], and index tuples for GatherND from the
    joined axis and for ScatterND into the ring, both [batch, heads, tokens, 3].
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    heads = op.Shape(past_key, start=1, end=2)
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

    # Every token writes its slot; padding and tokens that would be overwritten at once write what a
    # kept neighbour writes, a row of padding only writes back what its slot holds.
    oldest = op.Max(op.Sub(count, capacity), zero)
    kept = op.Min(op.Max(offsets, oldest), op.Sub(count, one))  # [batch, tokens]
    slots = op.Mod(op.Add(past, kept), capacity)
    source = op.Where(op.Greater(count, zero), op.Add(capacity, kept), slots)
    from_joined = SlotIndices(source, heads)
    into_ring = SlotIndices(slots, heads)
    return visible, from_joined, into_ring
