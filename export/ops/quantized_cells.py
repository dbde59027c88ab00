"""Keys and values in 8 bits: one scale for every head and position.

    scale = max|x| / 127 in float16, cell = round(x / scale), value = cell * scale

Rounding is to nearest, ties to even; an error is at most half a scale. The scale is at most the
largest float16, so what is larger than 8.3 million saturates. A head that holds NaN or infinity
gets the scale NaN, so whatever reads it is NaN, as it would be without quantization. A head of
nothing but values below 4e-6 becomes zeros: float16 has no smaller scale.

KIVI (arXiv 2402.02750) compares axes for 2 bits; a scale a token lets tokens be written one by one.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN

MOST = 127.0
LARGEST_SCALE = 65504.0  # of float16


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells int8 [..., size] and scales float16 [...] of heads x [..., size]."""
    x = x.float()
    scale = (x.abs().amax(-1) / MOST).clamp(max=LARGEST_SCALE)
    scale = torch.where(x.isfinite().all(-1), scale, torch.nan).half()
    step = scale.float()[..., None]
    some = step > 0  # neither 0 nor NaN
    cells = torch.where(some, x / torch.where(some, step, 1), 0).round().clamp(-MOST, MOST)
    return cells.to(torch.int8), scale


def dequantize_heads(cells: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What cells [..., size] with scales [...] stand for, in float32."""
    return cells.float() * scale.float()[..., None]


@script(DOMAIN)
def QuantizeHeads(x):
    """Cells and scales of heads x [..., size]; x * 0 is NaN where x is NaN or infinite."""
    zero = op.Constant(value_float=0.0)
    most = op.Constant(value_float=127.0)
    wide = op.Cast(x, to=1)
    largest = op.ReduceMax(op.Abs(wide), [-1], keepdims=1)
    poison = op.ReduceSum(op.Mul(wide, zero), [-1], keepdims=1)
    bounded = op.Min(op.Div(largest, most), op.Constant(value_float=65504.0))
    kept = op.Cast(op.Add(bounded, poison), to=10)  # 10 = float16
    step = op.Cast(kept, to=1)
    some = op.Greater(step, zero)
    rounded = op.Round(op.Div(wide, op.Where(some, step, op.Constant(value_float=1.0))))
    clipped = op.Clip(op.Where(some, rounded, zero), op.Neg(most), most)
    cells = op.Cast(clipped, to=3)  # 3 = int8
    scale = op.Squeeze(kept, [-1])
    return cells, scale


@script(DOMAIN)
def DequantizeHeads(cells, scale):
    """Float32 of cells [..., size] with scales [...]."""
    values = op.Mul(op.Cast(cells, to=1), op.Unsqueeze(op.Cast(scale, to=1), [-1]))
    return values
