"""What storing the reference model's weights costs by quantizer and format, at equal size.

    python -m benchmarks.weight_quality [--tokens 512] [--doublings 4] [--json FILE]

Held-out conversations, questions and phonebooks run through the float model with its linear layers
replaced by what a format stores of them; x_proj, dt_proj, embedding and head stay as they are, and
activations are float32, so only weights are compared. The mean KL divergence of the next token is
that over all tokens, and over those of answers alone, in nats.

A small model has no channels that are far louder than the rest, as large ones have. With
``--doublings`` one input in 40 of those that a norm or fc1 makes is made 2^n times as loud, and its
weights as much smaller: the model computes what it computed, and its weights are harder to round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from benchmarks.quality import TASKS, held_out
from export.checkpoint import open_checkpoint
from export.cli import REFERENCE
from export.model import SambaY
from export.quantize.calibration import LayerInputs, collect
from export.quantize.options import TEXT
from export.tensors import EMBEDDING
from export.verify.compare import divergence
from export.weights import load_weights
from graph_passes.block_quantization import dequantize, quantize
from graph_passes.equalize import EqualizedInputs, choose_exponents
from graph_passes.error_compensation import Calibration
from graph_passes.recipe import WeightFormat
from runtime_py.tokenizer import Tokenizer

BLOCK_SIZES = (16, 32, 64, 128)
TOKENS = 512  # of a text
_CASES = 20  # of a text, or as many as have room
_LEFT = (".x_proj.", ".dt_proj.", EMBEDDING)


@dataclass(frozen=True)
class Method:
    """How weights are found: a quantizer, and what it is told."""

    name: str
    quantizer: str
    calibrated: bool = False  # errors weighed by what layers are fed; "gptq" is, always
    equalized: bool = False


METHODS = (
    Method("rtn", "rtn"),
    Method("search", "search"),
    Method("search, calibrated", "search", calibrated=True),
    Method("search, evened out", "search", calibrated=True, equalized=True),
    Method("gptq, not evened out", "gptq", calibrated=True),
    Method("gptq", "gptq", calibrated=True, equalized=True),
)


@dataclass(frozen=True)
class Cost:
    """One method in one format: nats, and the share of tokens both find likeliest."""

    method: str
    bits: int
    block_size: int
    zero_points: bool
    kl: float
    kl_answers: float
    top1: float


@dataclass(frozen=True)
class Text:
    """Tokens; which of them an answer's next token is chosen at; the float model's logits."""

    ids: list[int]
    answers: np.ndarray
    logits: np.ndarray


class WeightQuality:
    """The reference model, whose weights can be stored and measured."""

    def __init__(self, tokens: int = TOKENS, doublings: int = 0) -> None:
        """Load the model and run every text through it.

        Args:
            tokens: of a text.
            doublings: of the loudness of one in 40 of the inputs that can be scaled.
        """
        self._checkpoint, self._tokenizer = open_checkpoint(REFERENCE), Tokenizer(REFERENCE)
        self._model = load_weights(self._checkpoint).eval().requires_grad_(False)
        self._weights = {
            name: weight.numpy().copy()
            for name, weight in self._model.named_parameters()
            if weight.dim() == 2 and name.endswith(".weight") and not _is_left(name)
        }
        self._loud = _loud_inputs(self._weights, doublings)
        self._texts = [self._text(ids[:tokens]) for ids in self._held_out()]

    def calibrate(self, folder: Path, tokens: int | None = None) -> Mapping[str, LayerInputs]:
        """Moments of what the layers are fed on the model's own calibration text."""
        text = (REFERENCE / TEXT).read_text(encoding="utf-8")
        return collect(self._checkpoint, self._tokenizer.encode(text)[:tokens], folder)

    def cost(
        self, form: WeightFormat, method: Method, calibration: Mapping[str, LayerInputs]
    ) -> Cost:
        """Store every weight in a format and measure what it costs."""
        form = dataclasses.replace(form, quantizer=method.quantizer)
        for name, weight in self._weights.items():
            owner, _, leaf = name.rpartition(".")
            stored = self._stored(name, weight, form, method, calibration[name])
            layer = self._model.get_submodule(owner)
            getattr(layer, leaf).copy_(torch.from_numpy(np.ascontiguousarray(stored)))
        every, answers, agreed = [], [], []
        for text in self._texts:
            logits = _logits(self._model, text.ids)
            lost = divergence(text.logits, logits)
            every.append(lost.mean())
            if text.answers.any():  # a long book has no answer so early
                answers.append(lost[text.answers].mean())
            agreed.append((logits.argmax(-1) == text.logits.argmax(-1)).mean())
        means = (float(np.mean(each)) for each in (every, answers, agreed))
        return Cost(method.name, form.bits, form.block_size, form.zero_points, *means)

    def _stored(
        self,
        name: str,
        weight: np.ndarray,
        form: WeightFormat,
        method: Method,
        inputs: Calibration,
    ) -> np.ndarray:
        """What a format stores of a weight, as the model as it is would have it."""
        scaled = -self._loud[name]
        if method.equalized and _can_be_scaled(name):
            loud = EqualizedInputs(inputs, scaled)
            scaled = scaled + choose_exponents(np.ldexp(weight, scaled), loud, form)
        known = EqualizedInputs(inputs, scaled) if method.calibrated else None
        stored = dequantize(quantize(np.ldexp(weight, scaled), form, known))
        restored: np.ndarray = np.ldexp(stored, -scaled)
        return restored

    def _held_out(self) -> Iterator[list[int]]:
        for task in TASKS:
            group = held_out(task, _CASES)[0]
            turns = (
                f"<|user|>{'' if index else group.text}{turn.question}<|end|>"
                f"<|assistant|>{turn.answer}<|end|>"
                for index, turn in enumerate(group.turns)
            )
            yield self._tokenizer.encode("".join(turns))

    def _text(self, ids: list[int]) -> Text:
        begin, end = (self._tokenizer.encode(mark)[-1] for mark in ("<|assistant|>", "<|end|>"))
        inside, answers = False, []
        for token in ids:
            inside = token == begin or (inside and token != end)
            answers.append(inside)
        return Text(ids, np.array(answers), _logits(self._model, ids))


def _is_left(name: str) -> bool:
    return any(part in name for part in _LEFT)


def _can_be_scaled(name: str) -> bool:
    """Whether a norm or a projection makes the inputs."""
    return any(part in name for part in (".in_proj.", ".Wqkv.", ".fc1.", ".fc2."))


def _loud_inputs(weights: Mapping[str, np.ndarray], doublings: int) -> dict[str, np.ndarray]:
    """Exponents, int32 [columns] for every weight."""
    random, found = np.random.default_rng(0), {}
    for name, weight in weights.items():
        columns = weight.shape[1]
        found[name] = np.zeros(columns, np.int32)
        if _can_be_scaled(name):
            found[name][random.permutation(columns)[: columns // 40]] = doublings
    return found


def _logits(model: SambaY, ids: list[int]) -> np.ndarray:
    given = torch.tensor([ids])
    states = model.initial_states(1, capacity=len(ids))
    logits, _, _ = model(given, torch.ones_like(given), states, all_logits=True)
    found: np.ndarray = logits[0].numpy()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weight_quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a text ({TOKENS})")
    parser.add_argument("--doublings", type=int, default=0, metavar="N", help="of loud inputs (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are small
    console, costs = Console(stderr=True), list[Cost]()
    with console.status("calibrating") as status, tempfile.TemporaryDirectory() as folder:
        measured = WeightQuality(options.tokens, options.doublings)
        calibration = measured.calibrate(Path(folder))
        for form in _formats():
            for method in METHODS:
                status.update(f"{form.bits} bits, blocks of {form.block_size}, {method.name}")
                costs.append(measured.cost(form, method, calibration))
    if options.json is not None:
        rows = [dataclasses.asdict(each) for each in costs]
        told = {"tokens": options.tokens, "doublings": options.doublings}
        contents = {"machine": describe_setup(), **told, "costs": rows}
        options.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    Console().print(_table(costs))
    return 0


def _formats() -> Iterator[WeightFormat]:
    for bits, sizes in ((4, BLOCK_SIZES), (8, (32, 128))):
        for size in sizes:
            for zero_points in (False, True) if bits == 4 else (False,):
                yield WeightFormat(bits=bits, block_size=size, zero_points=zero_points)


def _table(costs: list[Cost]) -> Table:
    """Every cost, and as a share of what rounding to nearest costs in the same format."""
    table = Table("bits", "block", "zero", "method", box=None, pad_edge=False)
    for title in ("KL", "of rtn", "KL, answers", "of rtn", "top 1"):
        table.add_column(title, justify="right")
    rtn: Cost | None = None
    for each in costs:
        rtn = each if rtn is None or each.method == "rtn" else rtn
        format_ = str(each.bits), str(each.block_size), "own" if each.zero_points else "middle"
        kl = f"{each.kl:.5f}", f"{each.kl / rtn.kl:.0%}"
        answers = f"{each.kl_answers:.6f}", f"{each.kl_answers / rtn.kl_answers:.0%}"
        table.add_row(*format_, each.method, *kl, *answers, f"{each.top1:.2%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
