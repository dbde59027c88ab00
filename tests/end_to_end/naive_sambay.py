"""SambaY written down once more, as slowly and plainly as its mathematics reads: the tests' oracle.

One row of tokens in float64, everything from the first token on, loops where formulas have indices.
It shares no line with the exporter: sizes come from config.json's own keys, weights as arrays.

Source: SambaY (arXiv 2507.06607), Mamba (arXiv 2312.00752), Differential Transformer
(arXiv 2410.05258), and the published checkpoint's layout.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Weight = Callable[[str], np.ndarray]  # name within a layer -> float64 array


@dataclass
class Naive:
    """All there is to know about one text of T tokens.

    Attributes:
        logits: [T, vocab]; those of token t depend on tokens 0 .. t alone.
        hidden: [layers, T, hidden], each layer's output.
        carried: by kind and layer, what a state holds a part of; first axis T.
            conv_state: inputs of the convolution [T, E]; recurrent_state: [T, E, N] after each
            token; key, value: [T, kv_heads, head_size].
    """

    logits: np.ndarray = field(default_factory=lambda: np.empty(0))
    hidden: list[np.ndarray] = field(default_factory=list)
    carried: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)


def naive_sambay(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: np.ndarray
) -> Naive:
    """Run a whole text.

    Args:
        config: contents of config.json.
        weights: by official name; any floating dtype.
        ids: [T] token ids.
    """
    result, layers = Naive(), config["num_hidden_layers"]
    middle, eps = layers // 2, config.get("layer_norm_eps", 1e-5)
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids].astype(np.float64)
    memory, shared = np.empty(0), (np.empty(0), np.empty(0))
    for i in range(layers):

        def weight(name: str, i: int = i) -> np.ndarray:
            return weights[f"model.layers.{i}.{name}"].astype(np.float64)

        normed = layer_norm(
            x, weight("input_layernorm.weight"), weight("input_layernorm.bias"), eps
        )
        if i % 2 == 0 and i <= middle:
            mixed, u, scan, memory = mamba(config, weight, normed)
            result.carried |= {("conv_state", i): u, ("recurrent_state", i): scan}
        elif i % 2 == 0:
            gate = normed @ weight("attn.in_proj.weight").T
            mixed = (silu(gate) * memory) @ weight("attn.out_proj.weight").T
        elif i <= middle + 1:
            q, k, v = project(config, weight, normed)
            window = one_window(config["sliding_window"]) if i < middle else len(ids)
            mixed = attention(config, weight, i, q, k, v, window)
            result.carried |= {("key", i): k, ("value", i): v}
            shared = k, v
        else:
            rows = normed @ weight("attn.Wqkv.weight").T + weight("attn.Wqkv.bias")
            q = rows.reshape(len(ids), config["num_attention_heads"], -1)
            mixed = attention(config, weight, i, q, *shared, len(ids))
        x = x + mixed
        normed = layer_norm(
            x,
            weight("post_attention_layernorm.weight"),
            weight("post_attention_layernorm.bias"),
            eps,
        )
        both = normed @ weight("mlp.fc1.weight").T
        half = config["intermediate_size"]
        x = x + (silu(both[:, :half]) * both[:, half:]) @ weight("mlp.fc2.weight").T
        result.hidden.append(x)
    scale, shift = (weights[f"model.final_layernorm.{part}"] for part in ("weight", "bias"))
    head = weights.get("lm_head.weight", embedding)
    normed = layer_norm(x, scale.astype(np.float64), shift.astype(np.float64), eps)
    result.logits = normed @ head.astype(np.float64).T
    return result


def one_window(setting: int | list[int | None]) -> int:
    """config.json holds one number, or it once for each layer that has a window."""
    return setting if isinstance(setting, int) else next(w for w in setting if w is not None)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mamba(
    config: Mapping[str, Any], weight: Weight, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Output [T, H], inputs of the convolution [T, E], states [T, E, N], memory [T, E]."""
    states, taps = config.get("mamba_d_state", 16), config.get("mamba_d_conv", 4)
    inner = config.get("mamba_expand", 2) * config["hidden_size"]
    rank = math.ceil(config["hidden_size"] / 16)
    projected = x @ weight("attn.in_proj.weight").T
    u, z = projected[:, :inner], projected[:, inner:]
    kernel, bias = weight("attn.conv1d.weight"), weight("attn.conv1d.bias")  # [E, 1, K], [E]
    c = np.empty_like(u)
    for t in range(len(x)):
        total = bias
        for j in range(taps):
            if (source := t - (taps - 1) + j) >= 0:
                total = total + kernel[:, 0, j] * u[source]
        c[t] = silu(total)
    parameters = c @ weight("attn.x_proj.weight").T
    d, B, C = np.split(parameters, [rank, rank + states], axis=1)
    delta = np.logaddexp(0, d @ weight("attn.dt_proj.weight").T + weight("attn.dt_proj.bias"))
    A, skip = -np.exp(weight("attn.A_log")), weight("attn.D")
    h, scan, y = np.zeros((inner, states)), np.empty((len(x), inner, states)), np.empty_like(c)
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * A) * h + np.outer(delta[t] * c[t], B[t])
        scan[t], y[t] = h, h @ C[t] + skip * c[t]
    return (y * silu(z)) @ weight("attn.out_proj.weight").T, u, scan, y


def project(
    config: Mapping[str, Any], weight: Weight, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [T, Hq, D], keys and values [T, Hk, D]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = x @ weight("attn.Wqkv.weight").T + weight("attn.Wqkv.bias")
    by_head = rows.reshape(len(x), heads + 2 * kv_heads, -1)
    return by_head[:, :heads], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :]


def attention(
    config: Mapping[str, Any],
    weight: Weight,
    layer: int,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    window: int,
) -> np.ndarray:
    """Differential attention of every token over the last `window` tokens, its own included."""
    tokens, heads, size = q.shape
    group = heads // config["num_key_value_heads"]
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, k1, q2, k2 = (
        weight(f"attn.inner_cross_attn.lambda_{part}") for part in ("q1", "k1", "q2", "k2")
    )
    lambda_ = math.exp(q1 @ k1) - math.exp(q2 @ k2) + init
    scale = weight("attn.inner_cross_attn.subln.weight")
    output = np.empty((tokens, heads // 2, 2 * size))
    for j in range(heads // 2):
        p = j // group
        values = np.concatenate([v[:, 2 * p], v[:, 2 * p + 1]], axis=1)  # [T, 2D]
        for t in range(tokens):
            seen = slice(max(0, t + 1 - window), t + 1)
            first = softmax(k[seen, 2 * p] @ q[t, 2 * j] / math.sqrt(size))
            second = softmax(k[seen, 2 * p + 1] @ q[t, 2 * j + 1] / math.sqrt(size))
            a = first @ values[seen] - lambda_ * (second @ values[seen])
            output[t, j] = (1 - init) * a / np.sqrt((a**2).mean() + 1e-5) * scale
    joined = output.reshape(tokens, heads * size)
    return joined @ weight("attn.out_proj.weight").T + weight("attn.out_proj.bias")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
