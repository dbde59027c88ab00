"""Causal depthwise convolution over tokens that carries its last inputs from call to call.

    output_t = silu(bias + sum_j weight[:, 0, j] * input_{t - (K-1) + j})

ONNX opset 27 has an operator of this name with channels before tokens. Here tokens come first, as
the projections before and after have them, which saves two transposes of the whole chunk, and
`lengths` tells how many tokens of a padded row are real.

Source: Mamba (arXiv 2312.00752), section 3.4.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    past_state: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve one call's tokens.

    Args:
        x: [batch, tokens, channels].
        weight: [channels, 1, taps].
        bias: [channels].
        past_state: [batch, channels, taps - 1], the inputs before this call, oldest first.
        lengths: [batch] int64, real tokens of each row; the rest of the row is padding.

    Returns:
        Output [batch, tokens, channels] after silu, and the present state, shaped like the past.
    """
    taps, tokens = weight.shape[2], x.shape[1]
    history = torch.cat([past_state.transpose(1, 2).to(x.dtype), x], dim=1)
    output = bias + sum(weight[:, 0, j] * history[:, j : j + tokens] for j in range(taps))
    last = lengths[:, None] + torch.arange(taps - 1, device=x.device)  # [batch, taps - 1]
    present = history.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.nn.functional.silu(output), present.transpose(1, 2).contiguous()


causal_conv_with_state = torch.library.custom_op(
    "sambay::causal_conv_with_state", reference, mutates_args=()
)
make_trainable(causal_conv_with_state, reference)


@causal_conv_with_state.register_fake
def _(x, weight, bias, past_state, lengths):
    return torch.empty_like(x), torch.empty_like(past_state)


@script(DOMAIN)
def CausalConvWithState(x, weight, bias, past_state, lengths):
    """Portable body: every window is gathered, so any number of taps works."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    history = op.Concat(op.CastLike(op.Transpose(past_state, perm=[0, 2, 1]), x), x, axis=1)
    taps = op.Squeeze(op.Shape(weight, start=2, end=3))
    tokens = op.Squeeze(op.Shape(x, start=1, end=2))
    starts = op.Unsqueeze(op.Range(zero, tokens, one), [1])  # [tokens, 1]
    windows = op.Gather(history, op.Add(starts, op.Range(zero, taps, one)), axis=1)
    kernel = op.Transpose(op.Squeeze(weight, [1]), perm=[1, 0])  # [taps, channels]
    mixed = op.Add(op.ReduceSum(op.Mul(windows, kernel), [2], keepdims=0), bias)
    output = op.Mul(mixed, op.Sigmoid(mixed))
    kept = op.Range(zero, op.Sub(taps, one), one)  # [taps - 1]
    last = op.Unsqueeze(op.Add(op.Unsqueeze(lengths, [1]), kept), [2])  # [batch, taps - 1, 1]
    present = op.GatherND(history, last, batch_dims=1)
    present_state = op.CastLike(op.Transpose(present, perm=[0, 2, 1]), past_state)
    return output, present_state


def _sample() -> Sample:
    batch, tokens, channels, taps = 3, 7, 10, 4
    return Sample(
        (
            torch.randn(batch, tokens, channels),
            torch.randn(channels, 1, taps),
            torch.randn(channels),
            torch.randn(batch, channels, taps - 1),
            torch.tensor([7, 2, 0]),
        ),
        {},
    )


OP = CustomOp(torch.ops.sambay.causal_conv_with_state.default, CausalConvWithState, _sample)
