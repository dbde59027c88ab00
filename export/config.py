"""Sizes of a SambaY model and the kind of each layer, read from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LayerKind = Literal["mamba", "window_attention", "full_attention", "gmu", "cross_attention"]


class ConfigError(ValueError):
    """A config.json that does not describe a SambaY model this project can export."""


@dataclass(frozen=True, kw_only=True)
class SambaYConfig:
    """Every size the graph depends on. Defaults are the published code's.

    Attributes:
        d_state, d_conv, expand: mamba_d_state (N), mamba_d_conv (K), mamba_expand.
        eos_token_ids: any of them ends an answer.
        context_length: tokens the model was made for (the tokenizer's model_max_length).
        max_position_embeddings: tokens no session may exceed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    context_length: int = 65_536
    max_position_embeddings: int = 262_144

    @property
    def head_size(self) -> int:
        """D: width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """E: channels of a Mamba layer."""
        return self.expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """R: always ceil(hidden_size / 16); the published code ignores mamba_dt_rank."""
        return math.ceil(self.hidden_size / 16)

    @property
    def memory_layer(self) -> int:
        """M: the Mamba layer whose scan the gated memory units read."""
        return self.num_hidden_layers // 2

    @property
    def shared_layer(self) -> int:
        """M + 1: the full attention layer whose keys and values the cross layers read."""
        return self.memory_layer + 1

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of a layer by its 0-based index."""
        if layer % 2 == 0:
            return "mamba" if layer <= self.memory_layer else "gmu"
        if layer < self.memory_layer:
            return "window_attention"
        return "full_attention" if layer == self.shared_layer else "cross_attention"

    def lambda_init(self, layer: int) -> float:
        """Constant part of a layer's lambda, from the Differential Transformer."""
        return 0.8 - 0.6 * math.exp(-0.3 * layer)

    def to_json(self) -> str:
        """The text of the model's ``sambay.config`` metadata."""
        return json.dumps(dataclasses.asdict(self))
