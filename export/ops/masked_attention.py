"""Differential attention over given keys, with a mask: what both attention operators share.

    q1, k1, v1 = even heads; q2, k2, v2 = odd heads; V = [v1 ; v2] of one pair
    a_s = softmax(q_s k_s^T / sqrt(D)) V
    out = (1 - lambda_init) * rms_norm(a_1 - lambda a_2) * norm_weight

Query pair j reads key/value pair j // G, where G = query heads / key-value heads.

Source: Differential Transformer (arXiv 2410.05258), section 2; SambaY pairs neighbouring heads.
"""

import math

import torch
from onnxscript import opset20 as op
from onnxscript import script

from export.ops.custom_op import DOMAIN

EPS = 1e-5  # of the norm over a pair of heads; fixed in the published code


def attend(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    lambda_: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    lambda_init: float,
) -> torch.Tensor:
    """Attend to every visible slot.

    Args:
        q: [batch, queries, num_heads * head_size].
        key, value: [batch, num_kv_heads, slots, head_size].
        visible: [batch, queries, slots] bool.
        lambda_: [1], weight of the second softmax.
        norm_weight: [2 * head_size].

    Returns:
        [batch, queries, num_heads * head_size], dtype of q; softmax and norm in float32.
    """
    group = num_heads // num_kv_heads
    heads = q.float().unflatten(2, (num_heads, -1)).transpose(1, 2)  # [batch, heads, queries, D]
    wide_key, wide_value = key.float(), value.float()
    pair_value = torch.cat([wide_value[:, 0::2], wide_value[:, 1::2]], dim=-1)
    pair_value = pair_value.repeat_interleave(group, dim=1)  # [batch, heads / 2, slots, 2D]
    read = []
    for side in (0, 1):
        side_key = wide_key[:, side::2].repeat_interleave(group, dim=1)
        scores = heads[:, side::2] @ side_key.transpose(2, 3) / math.sqrt(heads.shape[-1])
        scores = scores.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        read.append(scores.softmax(dim=-1) @ pair_value)  # [batch, heads / 2, queries, 2D]
    difference = read[0] - lambda_.float() * read[1]
    normed = difference * torch.rsqrt(difference.square().mean(-1, keepdim=True) + EPS)
    output = (1 - lambda_init) * normed * norm_weight.float()
    return output.transpose(1, 2).flatten(2).to(q.dtype)


@script(DOMAIN)
def MaskedDifferentialAttention(
    q,
    key,
    value,
    visible,
    lambda_,
    norm_weight,
    num_heads: int,
    num_kv_heads: int,
    lambda_init: float,
):
    """Both softmaxes, then one product (P1 - lambda P2) V; a group's queries are one matrix."""
    copy = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    kv_heads = op.Reshape(op.Constant(value_int=num_kv_heads), rest)
    query_heads = op.Reshape(op.Constant(value_int=num_heads), rest)
    pairs = op.Div(kv_heads, two)
    group = op.Div(query_heads, kv_heads)
    batch = op.Shape(q, start=0, end=1)
    queries = op.Shape(q, start=1, end=2)
    slots = op.Shape(key, start=2, end=3)
    size = op.Shape(key, start=3, end=4)

    # [batch, queries, pairs * group * 2 * D] -> [batch, kv_heads, group * queries, D]
    split = op.Reshape(op.Cast(q, to=1), op.Concat(copy, copy, pairs, group, two, rest, axis=0))
    rows = op.Reshape(
        op.Transpose(split, perm=[0, 2, 4, 3, 1, 5]), op.Concat(copy, kv_heads, rest, size, axis=0)
    )
    scaled = op.Div(rows, op.Sqrt(op.Cast(size, to=1)))
    scores = op.MatMul(scaled, op.Transpose(op.Cast(key, to=1), perm=[0, 1, 3, 2]))
    apart = op.Reshape(scores, op.Concat(copy, kv_heads, group, queries, slots, axis=0))
    hidden = op.Constant(value_float=-1e30)
    masked = op.Where(op.Unsqueeze(visible, [1, 2]), apart, hidden)
    weights = op.Reshape(
        op.Softmax(masked, axis=-1), op.Concat(batch, pairs, two, rest, slots, axis=0)
    )
    first, second = op.Split(weights, axis=2, num_outputs=2)  # [batch, pairs, 1, rows, slots]
    mixed = op.Sub(first, op.Mul(op.Cast(lambda_, to=1), second))
    paired = op.Reshape(op.Cast(value, to=1), op.Concat(batch, pairs, two, slots, size, axis=0))
    read = op.MatMul(mixed, paired)  # [batch, pairs, 2, group * queries, D]

    # -> [batch, queries, pairs, group, 2, D] -> [batch, queries, heads / 2, 2D]
    grouped = op.Reshape(read, op.Concat(batch, pairs, two, group, queries, size, axis=0))
    pair_rows = op.Reshape(
        op.Transpose(grouped, perm=[0, 4, 1, 3, 2, 5]),
        op.Concat(batch, queries, rest, op.Mul(size, two), axis=0),
    )
    square = op.ReduceMean(op.Mul(pair_rows, pair_rows), last, keepdims=1)
    normed = op.Div(pair_rows, op.Sqrt(op.Add(square, op.Constant(value_float=1e-5))))
    kept = op.Sub(op.Constant(value_float=1.0), op.Constant(value_float=lambda_init))
    weighted = op.Mul(normed, op.Mul(op.Cast(norm_weight, to=1), kept))
    output = op.CastLike(op.Reshape(weighted, op.Concat(batch, queries, rest, axis=0)), q)
    return output
