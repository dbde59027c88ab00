"""Selective scan (Mamba-1) that carries its state from call to call.

    delta_t = softplus(dt_t + dt_bias)
    h_t     = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t^T
    y_t     = h_t C_t + D x_t

y is the layer's *memory*: after the skip, before any gate.

Source: Mamba (arXiv 2312.00752), algorithm 2, with the simplified (Euler) discretisation of B that the
published code uses.
"""

import torch
from onnxscript import graph, script
from onnxscript import opset20 as op

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable


class _LinearRecurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t along axis 1; gradients run backwards over the kept h."""

    @staticmethod
    def forward(ctx, a, b, initial):  # a, b [batch, tokens, channels, states]
        h = torch.empty_like(b)
        state = initial
        for t in range(b.shape[1]):
            state = torch.addcmul(b[:, t], a[:, t], state)
            h[:, t] = state
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h, initial = ctx.saved_tensors
        grad_b = torch.empty_like(h)
        carried = torch.zeros_like(initial)
        for t in range(h.shape[1] - 1, -1, -1):
            carried = grad[:, t] + carried
            grad_b[:, t] = carried
            carried = carried * a[:, t]
        before = torch.cat([initial[:, None], h[:, :-1]], dim=1)
        return grad_b * before, grad_b, carried


def reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    past_state: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan one call's tokens, in float32 whatever the inputs are.

    Args:
        x: [batch, tokens, channels].
        dt: [batch, tokens, channels], before bias and softplus.
        dt_bias: [channels].
        A: [channels, states], negative.
        B, C: [batch, tokens, states].
        D: [channels].
        past_state: [batch, channels, states] float32.
        lengths: [batch] int64, real tokens of each row; padding leaves the state as it is.

    Returns:
        y [batch, tokens, channels] of x's dtype and the present state, float32.
    """
    wide = x.float()
    delta = torch.nn.functional.softplus(dt.float() + dt_bias.float())
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # [batch, tokens]
    delta = torch.where(real[:, :, None], delta, 0.0)
    a = torch.exp(delta[..., None] * A.float())  # [batch, tokens, channels, states]
    b = (delta * wide)[..., None] * B.float()[:, :, None]
    h = _LinearRecurrence.apply(a, b, past_state.float())
    y = torch.einsum("bten,btn->bte", h, C.float()) + D.float() * wide
    return y.to(x.dtype), h[:, -1].clone()


selective_scan = torch.library.custom_op("sambay::selective_scan", reference, mutates_args=())
make_trainable(selective_scan, reference)


@selective_scan.register_fake
def _(x, dt, dt_bias, A, B, C, D, past_state, lengths):
    return torch.empty_like(x), torch.empty_like(past_state)


@script(DOMAIN)
def SelectiveScan(x, dt, dt_bias, A, B, C, D, past_state, lengths):
    """Portable body: ONNX Scan over tokens; a step touches nothing larger than the state."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    tokens = op.Squeeze(op.Shape(x, start=1, end=2))
    real = op.Less(op.Range(zero, tokens, one), op.Unsqueeze(lengths, [1]))  # [batch, tokens]
    wide = op.Cast(x, to=1)  # 1 = float32
    delta = op.Softplus(op.Add(op.Cast(dt, to=1), op.Cast(dt_bias, to=1)))
    delta = op.Mul(delta, op.Unsqueeze(op.Cast(real, to=1), [2]))
    rate = op.Cast(A, to=1)

    @graph()
    def step(state, delta_t, drive_t, B_t, C_t):
        decay = op.Exp(op.Mul(op.Unsqueeze(delta_t, [2]), rate))
        present = op.Add(
            op.Mul(decay, state), op.Mul(op.Unsqueeze(drive_t, [2]), op.Unsqueeze(B_t, [1]))
        )
        y_t = op.Squeeze(op.MatMul(present, op.Unsqueeze(C_t, [2])), [2])
        return present, y_t

    present_state, scanned = op.Scan(
        op.Cast(past_state, to=1),
        delta,
        op.Mul(delta, wide),
        op.Cast(B, to=1),
        op.Cast(C, to=1),
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
        body=step,
    )
    y = op.CastLike(op.Add(scanned, op.Mul(op.Cast(D, to=1), wide)), x)
    return y, present_state


def _sample() -> Sample:
    batch, tokens, channels, states = 3, 9, 6, 4
    return Sample(
        (
            torch.randn(batch, tokens, channels),
            torch.randn(batch, tokens, channels),
            torch.randn(channels),
            -torch.rand(channels, states) * 4,
            torch.randn(batch, tokens, states),
            torch.randn(batch, tokens, states),
            torch.randn(channels),
            torch.randn(batch, channels, states),
            torch.tensor([9, 4, 0]),
        ),
        {},
    )


OP = CustomOp(torch.ops.sambay.selective_scan.default, SelectiveScan, _sample)
