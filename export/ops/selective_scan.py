"""Selective scan (Mamba-1) that carries its state from call to call.

    delta_t = softplus(dt_t + dt_bias)
    h_t     = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t^T
    y_t     = h_t C_t + D x_t

y is the layer's *memory*: after the skip, before any gate.

Source: Mamba (arXiv 2312.00752), algorithm 2, with the simplified (Euler) discretisation of B that
the published code uses.
"""

import torch
from onnxscript import graph, script
from onnxscript import opset20 as op

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable


class _Scan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + drive_t B_t^T, read by C_t; gradients run back over kept h.

    A step's tensors [batch, states, channels] stay in a processor's cache: whole sequences of
    decays and their gradients are never stored, which makes training several times faster.
    """

    @staticmethod
    def forward(ctx, delta, drive, A, B, C, initial):
        # delta, drive [tokens, batch, 1, channels]; A [states, channels];
        # B, C [tokens, batch, states, 1]; initial [batch, states, channels]
        h = delta.new_empty(*delta.shape[:2], *A.shape)
        decay = torch.empty_like(h[0])
        state = initial
        for t in range(delta.shape[0]):
            torch.mul(delta[t], A, out=decay).exp_()
            state = torch.mul(drive[t], B[t], out=h[t]).addcmul_(decay, state)
        ctx.save_for_backward(delta, drive, A, B, C, initial, h)
        return C.transpose(2, 3) @ h, state.clone()

    @staticmethod
    def backward(ctx, grad_y, grad_last):
        delta, drive, A, B, C, initial, h = ctx.saved_tensors
        grad_delta, grad_drive = torch.empty_like(delta), torch.empty_like(drive)
        grad_B = torch.empty_like(B)
        carried = grad_last.clone(memory_format=torch.contiguous_format)  # d loss / d h_t
        decay, scratch = torch.empty_like(h[0]), torch.empty_like(h[0])
        sum_A = torch.zeros_like(h[0])
        for t in range(delta.shape[0] - 1, -1, -1):
            carried.addcmul_(C[t], grad_y[t])
            torch.bmm(B[t].mT, carried, out=grad_drive[t])
            torch.bmm(carried, drive[t].mT, out=grad_B[t])
            torch.mul(delta[t], A, out=decay).exp_()
            carried.mul_(decay)
            torch.mul(carried, h[t - 1] if t else initial, out=scratch)  # of the exponent
            torch.sum(torch.mul(scratch, A, out=decay), 1, keepdim=True, out=grad_delta[t])
            sum_A.addcmul_(scratch, delta[t])
        return grad_delta, grad_drive, sum_A.sum(0), grad_B, h @ grad_y.mT, carried


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
    scanned, last = _Scan.apply(
        _by_token(delta, -2),
        _by_token(delta * wide, -2),
        A.float().T.contiguous(),
        _by_token(B.float(), -1),
        _by_token(C.float(), -1),
        past_state.float().mT.contiguous(),
    )
    y = (scanned[:, :, 0].transpose(0, 1) + D.float() * wide).contiguous()
    return y.to(x.dtype), last.mT.contiguous()


def _by_token(x: torch.Tensor, axis: int) -> torch.Tensor:
    """x [batch, tokens, width] to [tokens, batch, width] with a new axis for outer products."""
    return x.transpose(0, 1).contiguous().unsqueeze(axis)


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
