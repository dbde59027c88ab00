"""Gated memory unit: a late layer reads the memory that an earlier selective scan wrote.

    output = silu(gate) * memory

A Mamba layer gates its own scan the same way, so the operator serves both.

Source: SambaY paper (arXiv 2507.06607), section 2.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable


def reference(gate: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Gate a scan's memory.

    Args:
        gate: [batch, tokens, inner], float16, bfloat16 or float32.
        memory: same shape and dtype as gate.

    Returns:
        Same shape and dtype as gate; computed in float32 and rounded once.
    """
    return (torch.nn.functional.silu(gate.float()) * memory.float()).to(gate.dtype)


gated_memory_unit = torch.library.custom_op("sambay::gated_memory_unit", reference, mutates_args=())
make_trainable(gated_memory_unit, reference)


@gated_memory_unit.register_fake
def _(gate: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


@script(DOMAIN)
def GatedMemoryUnit(gate, memory):
    """Portable body."""
    wide = op.Cast(gate, to=1)  # 1 = float32
    output = op.CastLike(op.Mul(op.Mul(wide, op.Sigmoid(wide)), op.Cast(memory, to=1)), gate)
    return output


def _sample() -> Sample:
    gate, memory = torch.randn(2, 2, 3, 8).unbind()
    return Sample((gate, memory), {})


OP = CustomOp(torch.ops.sambay.gated_memory_unit.default, GatedMemoryUnit, _sample)
