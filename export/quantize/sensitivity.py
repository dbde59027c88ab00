"""Which weights bear few bits: each is quantized alone, and what the model loses is measured.

Every variant of the model, with one weight changed, is a row of a batch. The layers are loaded one
after the other, and all rows go through a layer before the next is loaded: so a checkpoint of any
size takes one layer and the rows' hidden states, and no layer is read twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.model import Flow, Layer
from export.quantize.costs import FORMAT, FORMAT_VERSION
from export.reference_run import ReferenceRun
from export.tensors import EMBEDDING, HEAD, layer_of
from export.verify.compare import divergence, snr
from export.weights import read_weight

_TOKENS = 512  # of variants run at once: their logits take 0.4 GB at the published vocabulary
_HEAD_SAMPLE = 4096  # rows of a head that its ratio is taken from
_CHUNK = 1 << 18  # elements of a weight quantized at once: they stay in a processor's cache

# Rows of a matrix, float32 [rows, columns], as they are after being stored in some bits.
RoundTrip = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one weight alone costs.

    Attributes:
        name: of the weight in the checkpoint.
        shape: rows and columns.
        bits: it was quantized to.
        snr_db: of the weight.
        kl: mean divergence of the next tokens, nats.
        hidden_error: relative root mean square error of what enters the final norm.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    snr_db: float
    kl: float
    hidden_error: float


@dataclass
class _Variant:
    name: str
    shape: tuple[int, ...]
    snr_db: float
    flow: Flow  # one row


def rank(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    round_trip: RoundTrip,
    *,
    bits: int,
    progress: Callable[[int], object],
) -> list[Sensitivity]:
    """Quantize every matrix alone, most sensitive first.

    Args:
        ids: [1, tokens] int64 of the text to measure on.
        bits: to quantize to.
        progress: told the multiply-adds done since it was last called, ``work`` in all.
    """
    run = _Ranking(ReferenceRun(checkpoint), round_trip, bits, progress)
    found = run.measure(ids)
    return sorted(found, key=lambda each: (-each.kl, each.name))


def matrices(checkpoint: Checkpoint) -> list[str]:
    """Names of the weights that can be quantized."""
    return [
        name
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight")
    ]


def work(checkpoint: Checkpoint, tokens: int) -> int:
    """Multiply-adds of a ranking, which are nearly all of its time."""
    config = checkpoint.config
    names = [layer_of(name) for name in matrices(checkpoint)]
    total, rows = 0, 2  # the model as it is, and with its embedding changed
    for index, size in enumerate(_layer_sizes(checkpoint)):
        rows += names.count(index)
        total += size * rows
    if not checkpoint.tied_head:
        rows += 1
    return tokens * (total + config.vocab_size * config.hidden_size * rows)


class _Ranking:
    def __init__(
        self,
        reference: ReferenceRun,
        round_trip: RoundTrip,
        bits: int,
        progress: Callable[[int], object],
    ) -> None:
        self._reference, self._round_trip = reference, round_trip
        self._bits, self._progress = bits, progress
        self._sizes = _layer_sizes(reference.checkpoint)

    @torch.no_grad()
    def measure(self, ids: np.ndarray) -> list[Sensitivity]:
        reference = self._reference
        clean = reference.begin(ids)
        variants = [self._embedding(ids)]
        for index in range(reference.config.num_hidden_layers):
            layer = reference.load(index)
            begun = [self._changed(index, layer, name, clean) for name in _matrices(layer)]
            for group in _groups(variants):
                batch = _stack([variant.flow for variant in group])
                self._advance(index, layer, batch)
                for row, variant in enumerate(group):
                    variant.flow = _row(batch, row)
            self._advance(index, layer, clean)
            variants += begun
        if not reference.checkpoint.tied_head:
            variants.append(self._head(clean))
        return list(self._losses(clean.hidden, variants))

    def _embedding(self, ids: np.ndarray) -> _Variant:
        """The embedding's rows changed; the head tied to it is changed when it is measured."""
        flow = self._reference.begin(ids)
        stored, ratio = self._stored(flow.hidden[0])
        flow.hidden = stored[None]
        shape = self._reference.checkpoint.tensors[EMBEDDING].shape
        return _Variant(EMBEDDING, shape, ratio, flow)

    def _head(self, clean: Flow) -> _Variant:
        """A head of its own, changed when it is measured; some rows tell its ratio."""
        tensor = self._reference.checkpoint.tensors[HEAD]
        _, ratio = self._stored(read_weight(tensor.rows(0, min(_HEAD_SAMPLE, tensor.shape[0]))))
        return _Variant(HEAD, tensor.shape, ratio, clean)

    def _changed(self, index: int, layer: Layer, name: str, clean: Flow) -> _Variant:
        """The clean flow through a layer with one weight changed."""
        owner = layer.get_submodule(name.rpartition(".")[0])
        original = owner.weight
        assert isinstance(original, nn.Parameter)
        stored, ratio = self._stored(original)
        flow = dataclasses.replace(clean)
        owner.weight = nn.Parameter(stored, requires_grad=False)
        self._advance(index, layer, flow)
        owner.weight = original
        return _Variant(f"model.layers.{index}.{name}", tuple(original.shape), ratio, flow)

    def _stored(self, weight: Tensor) -> tuple[Tensor, float]:
        """A matrix stored and read back, and its ratio (dB); some rows at a time."""
        stored = torch.empty_like(weight)
        energy = noise = 0.0
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            original = weight[rows].numpy()
            found = self._round_trip(original, self._bits)
            stored[rows] = torch.from_numpy(found)
            difference = found - original
            energy += float(np.einsum("ij,ij->", original, original))
            noise += float(np.einsum("ij,ij->", difference, difference))
        return stored, snr(energy, noise)

    def _advance(self, index: int, layer: Layer, flow: Flow) -> None:
        self._reference.advance(index, layer, flow)
        rows, tokens = flow.hidden.shape[:2]
        self._progress(self._sizes[index] * rows * tokens)

    def _losses(self, clean: Tensor, variants: list[_Variant]) -> Iterator[Sensitivity]:
        wanted = self._logits(clean, None)[0]
        own = EMBEDDING if self._reference.checkpoint.tied_head else HEAD  # the head's weight
        for group in _groups(variants):
            for changed, part in groupby(group, lambda each: each.name == own):
                change = self._head_rows if changed else None
                yield from self._measured(list(part), clean, wanted, change)

    def _measured(
        self,
        variants: list[_Variant],
        clean: Tensor,
        wanted: np.ndarray,
        change: Callable[[Tensor], Tensor] | None,
    ) -> Iterator[Sensitivity]:
        """What variants have lost at the end, whose head is changed or not."""
        hidden = torch.cat([variant.flow.hidden for variant in variants])
        lost = divergence(wanted, self._logits(hidden, change)).mean(-1).tolist()
        for variant, row, kl in zip(variants, hidden, lost, strict=True):
            error = float((row - clean[0]).norm() / clean.norm())
            yield Sensitivity(variant.name, variant.shape, self._bits, variant.snr_db, kl, error)

    def _logits(self, hidden: Tensor, change: Callable[[Tensor], Tensor] | None) -> np.ndarray:
        logits = self._reference.logits(hidden, change).numpy()
        self._progress(logits.size * hidden.shape[-1])
        return logits

    def _head_rows(self, rows: Tensor) -> Tensor:
        return self._stored(rows)[0]


def _layer_sizes(checkpoint: Checkpoint) -> list[int]:
    """Elements of every layer's matrices: multiply-adds for each token."""
    sizes = [0] * checkpoint.config.num_hidden_layers
    for name in matrices(checkpoint):
        index = layer_of(name)
        if index is not None:
            sizes[index] += math.prod(checkpoint.tensors[name].shape)
    return sizes


def _matrices(layer: Layer) -> list[str]:
    return [
        name
        for name, weight in layer.named_parameters()
        if weight.dim() == 2 and name.endswith(".weight")
    ]


def _groups(variants: list[_Variant]) -> Iterator[list[_Variant]]:
    """Variants that are run at once."""
    rows = max(1, _TOKENS // variants[0].flow.hidden.shape[1])
    for start in range(0, len(variants), rows):
        yield variants[start : start + rows]


def _stack(flows: list[Flow]) -> Flow:
    memories = [flow.memory for flow in flows if flow.memory is not None]
    return Flow(
        torch.cat([flow.hidden for flow in flows]),
        torch.cat([flow.positions for flow in flows]),
        torch.cat([flow.past_lengths for flow in flows]),
        torch.cat([flow.lengths for flow in flows]),
        torch.cat(memories) if memories else None,
        tuple(torch.cat(pair) for pair in zip(*(flow.shared for flow in flows), strict=True)),
    )


def _row(flow: Flow, row: int) -> Flow:
    at = slice(row, row + 1)
    return Flow(
        flow.hidden[at],
        flow.positions[at],
        flow.past_lengths[at],
        flow.lengths[at],
        None if flow.memory is None else flow.memory[at],
        tuple(each[at] for each in flow.shared),
    )


def ranking_table(found: list[Sensitivity]) -> Table:
    """For a terminal."""
    table = Table("weight", box=None, pad_edge=False)
    for title in ("millions", "weight\ndB", "output\nerror", "mean\nKL", "KL / a\nmillion"):
        table.add_column(title, justify="right")
    for each in found:
        size = each.shape[0] * each.shape[1] / 1e6
        errors = f"{each.snr_db:.1f}", f"{each.hidden_error:.2g}", f"{each.kl:.2g}"
        table.add_row(each.name, f"{size:.3g}", *errors, f"{each.kl / size:.2g}")
    return table


def ranking_json(found: list[Sensitivity], checkpoint: Checkpoint, tokens: int) -> dict[str, Any]:
    """For other programs, and for ``export.quantize.costs``; a ratio of what is exact is null."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint.folder.absolute().name,
        "tokens": tokens,
        "weights": [
            asdict(each) | ({} if math.isfinite(each.snr_db) else {"snr_db": None})
            for each in found
        ],
    }
