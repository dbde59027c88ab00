"""SambaY in PyTorch: modules and parameters named as in the checkpoint, every state explicit.

States come in as arguments and leave as results, so the trace is the model. Parameters may have any
floating dtype; all arithmetic is float32.

Source: SambaY (arXiv 2507.06607) and the published checkpoint's layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.config import SambaYConfig
from export.ops.append_key_value import append_key_value
from export.ops.causal_conv_with_state import causal_conv_with_state
from export.ops.differential_attention import differential_attention
from export.ops.differential_cross_attention import differential_cross_attention
from export.ops.gated_memory_unit import gated_memory_unit
from export.ops.selective_scan import selective_scan

States = list[tuple[Tensor, Tensor]]  # one pair a layer, for layers 0 .. M+1


class Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in_features] to [..., out_features]."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x, self.weight.float(), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x."""
        return functional.layer_norm(
            x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class Mamba(nn.Module):
    """Mamba-1 mixer; also returns its memory, the scan before the gate."""

    def __init__(self, config: SambaYConfig) -> None:
        super().__init__()
        inner, states = config.d_inner, config.d_state
        self.sizes = [config.dt_rank, states, states]
        self.in_proj = Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = Linear(config.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, conv_state: Tensor, scan_state: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mix x [batch, tokens, hidden]; returns output, memory [batch, tokens, inner], states."""
        projected = self.in_proj(x)
        inner = projected.shape[-1] // 2
        u, gate = projected[..., :inner], projected[..., inner:]
        taps, bias = self.conv1d.weight.float(), self.conv1d.bias
        assert bias is not None
        u, conv_state = causal_conv_with_state(u, taps, bias.float(), conv_state, lengths)
        rank, states, _ = self.sizes
        parameters = self.x_proj(u)  # [batch, tokens, rank + 2 * states]
        dt = functional.linear(parameters[..., :rank], self.dt_proj.weight.float())
        memory, scan_state = selective_scan(
            u,
            dt,
            self.dt_proj.bias.float(),
            -torch.exp(self.A_log.float()),
            parameters[..., rank : rank + states],
            parameters[..., rank + states :],
            self.D.float(),
            scan_state,
            lengths,
        )
        return self.out_proj(gated_memory_unit(gate, memory)), memory, conv_state, scan_state


class GatedMemoryUnit(nn.Module):
    """Late even layers: a gate of their own on the memory of layer M."""

    def __init__(self, config: SambaYConfig) -> None:
        super().__init__()
        self.in_proj = Linear(config.hidden_size, config.d_inner, bias=False)
        self.out_proj = Linear(config.d_inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Gate memory [batch, tokens, inner] by x [batch, tokens, hidden]."""
        return self.out_proj(gated_memory_unit(self.in_proj(x), memory))


class DifferentialMixing(nn.Module):
    """Lambdas and the norm over a pair of heads."""

    def __init__(self, head_size: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.lambda_q1 = nn.Parameter(torch.empty(head_size))
        self.lambda_k1 = nn.Parameter(torch.empty(head_size))
        self.lambda_q2 = nn.Parameter(torch.empty(head_size))
        self.lambda_k2 = nn.Parameter(torch.empty(head_size))
        self.subln = nn.RMSNorm(2 * head_size)

    def weight_of_second(self) -> Tensor:
        """Lambda, [1] float32."""
        first = torch.exp(torch.sum(self.lambda_q1.float() * self.lambda_k1.float(), 0, True))
        second = torch.exp(torch.sum(self.lambda_q2.float() * self.lambda_k2.float(), 0, True))
        return first - second + self.lambda_init


class Attention(nn.Module):
    """Differential attention; its layer index decides window, full or cross."""

    def __init__(self, config: SambaYConfig, layer: int) -> None:
        super().__init__()
        self.cross = config.layer_kind(layer) == "cross_attention"
        self.window = config.sliding_window
        self.query_rows = config.hidden_size
        self.kv_rows = config.num_key_value_heads * config.head_size
        rows = self.query_rows + (0 if self.cross else 2 * self.kv_rows)
        self.Wqkv = Linear(config.hidden_size, rows)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self.inner_cross_attn = DifferentialMixing(config.head_size, config.lambda_init(layer))
        self.attributes = {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "lambda_init": config.lambda_init(layer),
        }

    def mixing(self) -> tuple[Tensor, Tensor]:
        """Lambda [1] and the pair norm's weight [2 * head_size]."""
        inner = self.inner_cross_attn
        return inner.weight_of_second(), inner.subln.weight.float()

    def queries(self, x: Tensor) -> Tensor:
        """Project x [batch, queries, hidden] with the rows of Wqkv that make queries."""
        if self.cross:
            return self.Wqkv(x)
        rows = slice(0, self.query_rows)
        return functional.linear(x, self.Wqkv.weight[rows].float(), self.Wqkv.bias[rows].float())

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project x with the remaining rows, for the cache."""
        rows = slice(self.query_rows, self.query_rows + 2 * self.kv_rows)
        both = functional.linear(x, self.Wqkv.weight[rows].float(), self.Wqkv.bias[rows].float())
        return both[..., : self.kv_rows], both[..., self.kv_rows :]

    def in_window(
        self, x: Tensor, key: Tensor, value: Tensor, past_lengths: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Window layer on x [batch, tokens, hidden] with its ring."""
        qkv = self.Wqkv(x)
        split = self.query_rows + self.kv_rows
        output, key, value = differential_attention(
            qkv[..., : self.query_rows],
            qkv[..., self.query_rows : split],
            qkv[..., split:],
            key,
            value,
            *self.mixing(),
            past_lengths,
            lengths,
            window=self.window,
            **self.attributes,
        )
        return self.out_proj(output), key, value

    def over_cache(self, x: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Full or cross layer on x [batch, queries, hidden] over the filled shared cache."""
        output = differential_cross_attention(
            self.queries(x), key, value, *self.mixing(), positions, **self.attributes
        )
        return self.out_proj(output)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SambaYConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., hidden]; the gate is the first half of fc1."""
        both = self.fc1(x)
        half = both.shape[-1] // 2
        return self.fc2(functional.silu(both[..., :half]) * both[..., half:])


@dataclass
class Flow:
    """What goes from layer to layer within a call; T tokens in the first half of the network.

    Attributes:
        hidden: [batch, T, hidden], the residual stream.
        positions: [batch, T] int64, of each token among its row's real ones.
        past_lengths, lengths: [batch] int64, real tokens before and in this call.
        memory: [batch, T, inner], what the latest scan wrote; None before the first.
        shared: filled keys and values of layer M+1, [batch, Hk, capacity, D]; () before it.
    """

    hidden: Tensor
    positions: Tensor
    past_lengths: Tensor
    lengths: Tensor
    memory: Tensor | None = None
    shared: tuple[Tensor, ...] = ()

    def keep_last(self, x: Tensor) -> Tensor:
        """Go on with each row's last real token alone, and so with that row of x."""
        last = (self.lengths - 1).clamp(min=0).unsqueeze(1)  # [batch, 1]
        assert self.memory is not None  # a Mamba layer comes first
        self.hidden, x, self.memory = (take_rows(t, last) for t in (self.hidden, x, self.memory))
        self.positions = self.positions.gather(1, last)
        return x


class Layer(nn.Module):
    """Mixer and MLP, each behind its norm."""

    def __init__(self, config: SambaYConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.layer_kind(layer)
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn: Any  # typed by kind, which the checker cannot see
        if self.kind == "mamba":
            self.attn = Mamba(config)
        elif self.kind == "gmu":
            self.attn = GatedMemoryUnit(config)
        else:
            self.attn = Attention(config, layer)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, flow: Flow, state: tuple[Tensor, ...], *, keep_all: bool
    ) -> tuple[Tensor, ...]:
        """Move the flow through this layer.

        Args:
            state: the pair of this layer; () for the layers after M+1, which have none.
            keep_all: layer M+1 goes on with every token, not only each row's last.

        Returns:
            The new state, a pair or ().
        """
        x = self.input_layernorm(flow.hidden)
        present: tuple[Tensor, ...] = ()
        if self.kind == "mamba":
            mixed, flow.memory, *present = self.attn(x, *state, flow.lengths)
        elif self.kind == "window_attention":
            mixed, *present = self.attn.in_window(x, *state, flow.past_lengths, flow.lengths)
        elif self.kind == "gmu":
            mixed = self.attn(x, flow.memory)
        else:
            if self.kind == "full_attention":
                rows = self.attn.keys_and_values(x)
                flow.shared = present = append_key_value(*state, *rows, flow.past_lengths)
                if not keep_all:
                    x = flow.keep_last(x)
            mixed = self.attn.over_cache(x, *flow.shared, flow.positions)
        hidden = flow.hidden + mixed
        flow.hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return tuple(present)


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: SambaYConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class SambaY(nn.Module):
    """The whole model."""

    def __init__(self, config: SambaYConfig, *, tied_head: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not tied_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        states: States,
        *,
        all_logits: bool = False,
    ) -> tuple[Tensor, States, list[Tensor]]:
        """Run one call's tokens.

        Only layers 0..M and the keys and values of layer M+1 see every token. From layer M+1's
        queries on, the last real token of each row is enough, and exact.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, total] int64, see docs/architecture.md.
            states: one pair a layer for layers 0 .. M+1, from `initial_states` or an earlier call.
            all_logits: run every layer for every token.

        Returns:
            logits [batch, 1 or tokens, vocab] float32, the new states, and each layer's output
            (only with all_logits, else empty).
        """
        flow = begin_flow(input_ids, attention_mask, self.model.embed_tokens.weight)
        present: States = []
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            pair = layer(flow, states[i] if i < len(states) else (), keep_all=all_logits)
            if pair:
                present.append(pair)
            if all_logits:
                outputs.append(flow.hidden)
        normed = self.model.final_layernorm(flow.hidden)
        head = self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight
        return functional.linear(normed, head.float()), present, outputs

    def initial_states(
        self, batch: int, *, capacity: int, window: int | None = None, device: str = "cpu"
    ) -> States:
        """Zero states for `batch` rows; capacity is the most tokens the shared cache can take."""
        config = self.config
        conv = (batch, config.d_inner, config.d_conv - 1)
        scan = (batch, config.d_inner, config.d_state)
        states: States = []
        for i in range(config.shared_layer + 1):
            if config.layer_kind(i) == "mamba":
                pair = torch.zeros(conv, device=device), torch.zeros(scan, device=device)
            else:
                slots = capacity if i == config.shared_layer else window or config.sliding_window
                shape = (batch, config.num_key_value_heads, slots, config.head_size)
                pair = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
            states.append(pair)
        return states


def begin_flow(input_ids: Tensor, attention_mask: Tensor, embedding: Tensor) -> Flow:
    """What enters layer 0.

    Args:
        input_ids, attention_mask: of the call, as `SambaY.forward` takes them.
        embedding: [vocab, hidden].
    """
    tokens = input_ids.shape[1]
    first, past_lengths, lengths = token_layout(attention_mask, tokens)
    offsets = torch.arange(tokens, device=input_ids.device)
    # Rows padded on the left are moved to the left; what remains is padding on the right.
    source = (first.unsqueeze(1) + offsets).clamp(max=tokens - 1)
    hidden = functional.embedding(input_ids.gather(1, source), embedding).float()
    return Flow(hidden, past_lengths.unsqueeze(1) + offsets, past_lengths, lengths)


def token_layout(attention_mask: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's real tokens of this call are.

    The call's columns end at the last column that is real in any row, so a mask buffer of fixed
    length serves as well as a mask of exact length.

    Args:
        attention_mask: [batch, total or more] int64.
        tokens: tokens of this call.

    Returns:
        [batch] int64 each: index in the call of the first real token, number of real tokens before
        the call, number of real tokens in the call.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    real = attention_mask != 0
    start = torch.where(real, columns + 1, 0).amax((0, 1)) - tokens
    inside = real & (columns >= start)
    before = (real & (columns < start)).sum(1)
    first = torch.where(inside, columns - start, tokens).amin(1)
    return first, before, inside.sum(1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, tokens, width] at index [batch, 1] -> [batch, 1, width]."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
