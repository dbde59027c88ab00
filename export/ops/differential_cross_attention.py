"""Differential attention over the shared cache: the full attention layer and the cross layers.

The cache already holds this call's tokens (AppendKeyValue ran before), so nothing is written here.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN, CustomOp, Sample, make_trainable
from export.ops.masked_attention import MaskedDifferentialAttention, attend


def reference(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lambda_: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    lambda_init: float,
) -> torch.Tensor:
    """Attend to slots 0 .. position.

    Args:
        q: [batch, queries, num_heads * head_size].
        key, value: [batch, num_kv_heads, capacity, head_size]; unused slots must be finite.
        lambda_: [1]; norm_weight: [2 * head_size].
        positions: [batch, queries] int64.

    Returns:
        [batch, queries, num_heads * head_size], dtype of q.
    """
    slots = torch.arange(key.shape[2], device=q.device)
    return attend(
        q,
        key,
        value,
        slots <= positions[:, :, None],
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )


differential_cross_attention = torch.library.custom_op(
    "sambay::differential_cross_attention", reference, mutates_args=()
)
make_trainable(differential_cross_attention, reference)


@differential_cross_attention.register_fake
def _(q, *rest, **attributes):
    return torch.empty_like(q)


@script(DOMAIN)
def DifferentialCrossAttention(
    q,
    key,
    value,
    lambda_,
    norm_weight,
    positions,
    num_heads: int,
    num_kv_heads: int,
    lambda_init: float,
):
    """Portable body."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    slots = op.Range(zero, op.Squeeze(op.Shape(key, start=2, end=3)), one)
    output = MaskedDifferentialAttention(
        q,
        key,
        value,
        op.LessOrEqual(slots, op.Unsqueeze(positions, [2])),
        lambda_,
        norm_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    return output


def _sample() -> Sample:
    batch, queries, heads, kv_heads, capacity, size = 2, 3, 12, 4, 9, 6
    return Sample(
        (
            torch.randn(batch, queries, heads * size),
            torch.randn(batch, kv_heads, capacity, size),
            torch.randn(batch, kv_heads, capacity, size),
            torch.tensor([0.7]),
            torch.randn(2 * size),
            torch.tensor([[0, 1, 2], [6, 7, 8]]),
        ),
        {"num_heads": heads, "num_kv_heads": kv_heads, "lambda_init": 0.79},
    )


OP = CustomOp(
    torch.ops.sambay.differential_cross_attention.default,
    DifferentialCrossAttention,
    _sample,
    parts=(MaskedDifferentialAttention,),
)
