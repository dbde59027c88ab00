"""The float reference in bounded memory: one layer's weights at a time, all texts through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from export.checkpoint import Checkpoint
from export.model import Flow, Layer, begin_flow
from export.tensors import EMBEDDING, HEAD
from export.weights import load_layer, read_weight

_HEAD_ROWS = 8192  # of the head in memory at once: 84 MB in float32 at a width of 2560


class ReferenceRun:
    """Layers of a checkpoint, loaded when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config

    def begin(self, ids: np.ndarray) -> Flow:
        """Look a text's tokens up; ids [1, tokens] int64."""
        wanted, places = np.unique(ids, return_inverse=True)
        table = self.checkpoint.tensors[EMBEDDING]
        rows = [read_weight(table.rows(token, token + 1)) for token in wanted.tolist()]
        renumbered = torch.from_numpy(places.reshape(ids.shape))
        mask = torch.ones(ids.shape, dtype=torch.int64)
        return begin_flow(renumbered, mask, torch.cat(rows))

    def load(self, index: int) -> Layer:
        """One layer, float32."""
        return load_layer(self.checkpoint, index)

    def run(self, index: int, layer: Layer, flow: Flow) -> tuple[Tensor, ...]:
        """Move a flow through a layer, every token.

        Returns:
            The layer's state after the last token, a pair; () for the layers after M+1.
        """
        return self._run(index, layer, flow, self.config.sliding_window)

    def advance(self, index: int, layer: Layer, flow: Flow) -> None:
        """The same where nobody wants the state.

        A call sees its own tokens beside the ring, so the ring has one slot instead of a window of
        empty ones to pass over.
        """
        self._run(index, layer, flow, window=1)

    @torch.no_grad()
    def _run(self, index: int, layer: Layer, flow: Flow, window: int) -> tuple[Tensor, ...]:
        present = layer(flow, self._initial_state(index, flow, window), keep_all=True)
        if index < self.config.memory_layer:
            flow.memory = None  # another is written before one is read
        return present

    def _initial_state(self, index: int, flow: Flow, window: int) -> tuple[Tensor, ...]:
        config = self.config
        if index > config.shared_layer:
            return ()
        rows, tokens = flow.hidden.shape[:2]
        if config.layer_kind(index) == "mamba":
            return (
                torch.zeros(rows, config.d_inner, config.d_conv - 1),
                torch.zeros(rows, config.d_inner, config.d_state),
            )
        slots = tokens if index == config.shared_layer else window
        shape = (rows, config.num_key_value_heads, slots, config.head_size)
        return torch.zeros(shape), torch.zeros(shape)

    @torch.no_grad()
    def logits(self, hidden: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What final norm and head make of hidden [..., hidden]: float32 [..., vocab].

        Args:
            change: of rows of the head, before they are used.
        """
        tensors = self.checkpoint.tensors
        normed = functional.layer_norm(
            hidden,
            hidden.shape[-1:],
            read_weight(tensors["model.final_layernorm.weight"]),
            read_weight(tensors["model.final_layernorm.bias"]),
            self.config.layer_norm_eps,
        )
        logits = hidden.new_empty(*hidden.shape[:-1], self.config.vocab_size)
        for start, stop, rows in self._head():
            used = rows if change is None else change(rows)
            logits[..., start:stop] = functional.linear(normed, used)
        return logits

    def _head(self) -> Iterator[tuple[int, int, Tensor]]:
        head = self.checkpoint.tensors[EMBEDDING if self.checkpoint.tied_head else HEAD]
        for start in range(0, self.config.vocab_size, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, self.config.vocab_size)
            yield start, stop, read_weight(head.rows(start, stop))
