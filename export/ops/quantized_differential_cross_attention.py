"""Differential attention over a shared cache of 8 bits.

As DifferentialCrossAttention, on the values that cells and scales stand for.
"""

import torch
from onnxscript import script

from export.ops.custom_op import DOMAIN, CustomOp, Sample
from export.ops.differential_cross_attention import DifferentialCrossAttention
from export.ops.differential_cross_attention import reference as attend_to_cache
from export.ops.masked_attention import MaskedDifferentialAttention
from export.ops.quantized_cells import DequantizeHeads, dequantize_heads, quantize_heads


def reference(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
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
        key, value: [batch, num_kv_heads, capacity, head_size] int8.
        key_scale, value_scale: [batch, num_kv_heads, capacity] float16; those of unused slots must
            be finite.
        lambda_: [1]; norm_weight: [2 * head_size].
        positions: [batch, queries] int64.

    Returns:
        [batch, queries, num_heads * head_size], dtype of q.
    """
    return attend_to_cache(
        q,
        dequantize_heads(key, key_scale),
        dequantize_heads(value, value_scale),
        lambda_,
        norm_weight,
        positions,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )


quantized_differential_cross_attention = torch.library.custom_op(
    "sambay::quantized_differential_cross_attention", reference, mutates_args=()
)


@quantized_differential_cross_attention.register_fake
def _(q, *rest, **attributes):
    return torch.empty_like(q)


@script(DOMAIN)
def QuantizedDifferentialCrossAttention(
    q,
    key,
    value,
    key_scale,
    value_scale,
    lambda_,
    norm_weight,
    positions,
    num_heads: int,
    num_kv_heads: int,
    lambda_init: float,
):
    """Portable body."""
    output = DifferentialCrossAttention(
        q,
        DequantizeHeads(key, key_scale),
        DequantizeHeads(value, value_scale),
        lambda_,
        norm_weight,
        positions,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        lambda_init=lambda_init,
    )
    return output


def _sample() -> Sample:
    batch, queries, heads, kv_heads, capacity, size = 2, 3, 12, 4, 9, 6
    key, key_scale = quantize_heads(torch.randn(batch, kv_heads, capacity, size))
    value, value_scale = quantize_heads(torch.randn(batch, kv_heads, capacity, size))
    return Sample(
        (
            torch.randn(batch, queries, heads * size),
            key,
            value,
            key_scale,
            value_scale,
            torch.tensor([0.7]),
            torch.randn(2 * size),
            torch.tensor([[0, 1, 2], [6, 7, 8]]),
        ),
        {"num_heads": heads, "num_kv_heads": kv_heads, "lambda_init": 0.79},
    )


OP = CustomOp(
    torch.ops.sambay.quantized_differential_cross_attention.default,
    QuantizedDifferentialCrossAttention,
    _sample,
    parts=(DifferentialCrossAttention, MaskedDifferentialAttention, DequantizeHeads),
)
