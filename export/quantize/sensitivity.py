"""Which weights bear few bits: each is quantized alone, and what the model loses is measured.

Every variant of the model, with one weight changed, is a row of a batch. The layers are loaded one
after the other, and all rows go through a layer before the next is loaded: so a checkpoint of any
size takes one layer and the rows' hidden states, and no layer is read twice.
"""

from __future__ import annotations

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
from export.reference_run import ReferenceRun, ReferenceTrack
from export.tensors import EMBEDDING, HEAD
from export.verify.compare import divergence, snr
from export.weights import read_weight

# Tokens of variants run at once: a scan of so many takes 0.8 GB at the published width, and so do
# their logits and those they are compared with.
_TOKENS = 512
_HEAD_SAMPLE = 4096  # rows of a head that its ratio is taken from

# A matrix [rows, columns] float32 as it is after it was stored in some bits and read back.
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
    progress: Callable[[str], object],
) -> list[Sensitivity]:
    """Quantize every matrix alone, most sensitive first.

    Args:
        ids: [1, tokens] int64 of the text to measure on.
        bits: to quantize to.
        progress: told the name of each weight when it is quantized, and when it is measured.
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


class _Ranking:
    def __init__(
        self,
        reference: ReferenceRun,
        round_trip: RoundTrip,
        bits: int,
        progress: Callable[[str], object],
    ) -> None:
        self._reference, self._round_trip = reference, round_trip
        self._bits, self._progress = bits, progress

    @torch.no_grad()
    def measure(self, ids: np.ndarray) -> list[Sensitivity]:
        reference = self._reference
        clean = reference.begin(ids)
        variants = [self._embedding(ids)]
        for index in range(reference.config.num_hidden_layers):
            layer = reference.load(index)
            begun = [self._changed(index, layer, name, clean.flow) for name in _matrices(layer)]
            for group in _groups(variants):
                self._advance(index, layer, group)
            reference.run(index, layer, clean)
            clean.states.clear()
            variants += begun
        if not reference.checkpoint.tied_head:
            variants.append(self._head(clean.flow))
        return list(self._losses(clean.flow.hidden, variants))

    def _embedding(self, ids: np.ndarray) -> _Variant:
        """The embedding's rows changed; the head tied to it is changed when it is measured."""
        track = self._reference.begin(ids)
        rows = track.flow.hidden[0].numpy()
        stored = self._round_trip(rows, self._bits)
        track.flow.hidden = torch.from_numpy(stored)[None]
        self._progress(EMBEDDING)
        shape = self._reference.checkpoint.tensors[EMBEDDING].shape
        return _Variant(EMBEDDING, shape, _ratio(rows, stored), track.flow)

    def _head(self, clean: Flow) -> _Variant:
        """A head of its own, changed when it is measured; some rows tell its ratio."""
        tensor = self._reference.checkpoint.tensors[HEAD]
        rows = read_weight(tensor.rows(0, min(_HEAD_SAMPLE, tensor.shape[0]))).numpy()
        ratio = _ratio(rows, self._round_trip(rows, self._bits))
        self._progress(HEAD)
        return _Variant(HEAD, tensor.shape, ratio, clean)

    def _changed(self, index: int, layer: Layer, name: str, clean: Flow) -> _Variant:
        """The clean flow through a layer with one weight changed."""
        owner = layer.get_submodule(name.rpartition(".")[0])
        original = owner.weight
        assert isinstance(original, nn.Parameter)
        stored = self._round_trip(original.numpy(), self._bits)
        variant = _Variant(
            f"model.layers.{index}.{name}",
            tuple(original.shape),
            _ratio(original.numpy(), stored),
            _copy(clean),
        )
        owner.weight = nn.Parameter(torch.from_numpy(stored), requires_grad=False)
        self._advance(index, layer, [variant])
        owner.weight = original
        self._progress(variant.name)
        return variant

    def _advance(self, index: int, layer: Layer, variants: list[_Variant]) -> None:
        """Move variants through a layer, as one batch."""
        batch = _stack([variant.flow for variant in variants])
        track = ReferenceTrack(batch, [])
        self._reference.run(index, layer, track)
        if index < self._reference.config.memory_layer:
            batch.memory = None  # another is written before one is read
        for row, variant in enumerate(variants):
            variant.flow = _row(batch, row)

    def _losses(self, clean: Tensor, variants: list[_Variant]) -> Iterator[Sensitivity]:
        wanted = self._reference.logits(clean[0]).numpy()
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
        logits = self._reference.logits(hidden, change).numpy()
        for variant, row, found in zip(variants, hidden, logits, strict=True):
            error = float((row - clean[0]).norm() / clean.norm())
            kl = float(divergence(wanted, found).mean())
            self._progress(variant.name)
            yield Sensitivity(variant.name, variant.shape, self._bits, variant.snr_db, kl, error)

    def _head_rows(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._round_trip(rows.numpy(), self._bits))


def _matrices(layer: Layer) -> list[str]:
    return [
        name
        for name, weight in layer.named_parameters()
        if weight.dim() == 2 and name.endswith(".weight")
    ]


def _ratio(original: np.ndarray, stored: np.ndarray) -> float:
    noise = np.square(stored - original, dtype=np.float64).sum()
    return snr(float(np.square(original, dtype=np.float64).sum()), float(noise))


def _groups(variants: list[_Variant]) -> Iterator[list[_Variant]]:
    """Variants that are run at once."""
    rows = max(1, _TOKENS // variants[0].flow.hidden.shape[1])
    for start in range(0, len(variants), rows):
        yield variants[start : start + rows]


def _copy(flow: Flow) -> Flow:
    return _stack([flow])


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
        flow.hidden[at].clone(),
        flow.positions[at],
        flow.past_lengths[at],
        flow.lengths[at],
        None if flow.memory is None else flow.memory[at].clone(),
        tuple(each[at].clone() for each in flow.shared),
    )


def ranking_table(found: list[Sensitivity]) -> Table:
    """For a terminal."""
    table = Table("weight", "rows x columns", box=None, pad_edge=False)
    for title in ("weight dB", "output error", "mean KL", "KL / million"):
        table.add_column(title, justify="right")
    for each in found:
        size = each.shape[0] * each.shape[1] / 1e6
        numbers = f"{each.snr_db:.1f}", f"{each.hidden_error:.2g}", f"{each.kl:.2g}"
        rows = " x ".join(map(str, each.shape))
        table.add_row(each.name, rows, *numbers, f"{each.kl / size:.2g}")
    return table


def ranking_json(found: list[Sensitivity], checkpoint: Checkpoint, tokens: int) -> dict[str, Any]:
    """For other programs, and for ``export.quantize.costs``."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint.folder.absolute().name,
        "tokens": tokens,
        "weights": [asdict(each) for each in found],
    }
