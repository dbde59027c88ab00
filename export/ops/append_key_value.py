"""Write a call's keys and values into the shared cache, in place where past is present.

    present[:, :, past_length + j] = new token j

Only the new slots are written, so a step costs the same at any depth.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable


def reference(
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append one call's tokens.

    Args:
        past_key, past_value: [batch, kv_heads, capacity, head_size]; capacity holds every token.
        k, v: [batch, tokens, kv_heads * head_size], the new tokens.
        past_lengths: [batch] int64, slots in use before this call.

    Returns:
        present_key and present_value, shaped like the past. Padding at the end of a row lands in
        slots that no query sees and that the next call writes again.
    """
    heads, size = past_key.shape[1], past_key.shape[3]
    slots = past_lengths[:, None] + torch.arange(k.shape[1], device=k.device)  # [batch, tokens]
    index = slots[:, None, :, None].expand(-1, heads, -1, size)
    key, value = (new.unflatten(2, (heads, size)).transpose(1, 2) for new in (k, v))
    return (
        past_key.scatter(2, index, key.to(past_key.dtype)),
        past_value.scatter(2, index, value.to(past_value.dtype)),
    )


append_key_value = torch.library.custom_op("sambay::append_key_value", reference, mutates_args=())
make_trainable(append_key_value, reference)


@append_key_value.register_fake
def _(past_key, past_value, k, v, past_lengths):
    return torch.empty_like(past_key), torch.empty_like(past_value)


@script(DOMAIN)
def SlotIndices(slots, heads):
    """Index tuples (row, head, slot) [batch, heads, tokens, 3] from slots [batch, tokens]."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    batch = op.Shape(slots, start=0, end=1)
    shape = op.Concat(
        batch, heads, op.Shape(slots, start=1, end=2), op.Constant(value_ints=[1]), axis=0
    )
    rows = op.Expand(op.Unsqueeze(op.Range(zero, op.Squeeze(batch), one), [1, 2, 3]), shape)
    head = op.Expand(op.Unsqueeze(op.Range(zero, op.Squeeze(heads), one), [1, 2]), shape)
    slot = op.Expand(op.Unsqueeze(slots, [1, 3]), shape)
    indices = op.Concat(rows, head, slot, axis=3)
    return indices


@script(DOMAIN)
def AppendKeyValue(past_key, past_value, k, v, past_lengths):
    """Portable body: ScatterND, which ONNX Runtime does in place when both ends are one buffer."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    heads = op.Shape(past_key, start=1, end=2)
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    tokens = op.Squeeze(op.Shape(k, start=1, end=2))
    slots = op.Add(op.Unsqueeze(past_lengths, [1]), op.Range(zero, tokens, one))
    indices = SlotIndices(slots, heads)
    key = op.CastLike(op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]), past_key)
    value = op.CastLike(op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]), past_value)
    present_key = op.ScatterND(past_key, indices, key)
    present_value = op.ScatterND(past_value, indices, value)
    return present_key, present_value


def _sample() -> Sample:
    batch, tokens, heads, capacity, size = 3, 4, 2, 11, 6
    return Sample(
        (
            torch.randn(batch, heads, capacity, size),
            torch.randn(batch, heads, capacity, size),
            torch.randn(batch, tokens, heads * size),
            torch.randn(batch, tokens, heads * size),
            torch.tensor([0, 5, 7]),
        ),
        {},
    )


OP = CustomOp(
    torch.ops.sambay.append_key_value.default, AppendKeyValue, _sample, parts=(SlotIndices,)
)
