"""Which weights get how many bits: rank them by what they lose, or fill a size.

Joins the packages for ``phi4export --sensitivity`` and ``phi4export --size-budget``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.checkpoint import Checkpoint
from export.quantize.costs import Costs
from export.quantize.sensitivity import Sensitivity, rank, ranking_json, work
from export.tokenizer import tokenizer_files, write_tokenizer
from export.verify.command import read_sample, torch_threads
from export.verify.options import Settings
from graph_passes.block_quantization import dequantize, quantize
from graph_passes.recipe import WeightFormat
from runtime_py.tokenizer import Tokenizer
from targets.size_budget import fit_target
from targets.target import Target

BITS = 4  # what weights are ranked at


def measure_sensitivity(
    checkpoint: Checkpoint,
    settings: Settings,
    progress: Callable[[str, int], Callable[[int], object]],
) -> list[Sensitivity]:
    """Rank every matrix of a checkpoint, and write the JSON where the settings say so.

    Args:
        progress: given what is done and how much it is in all; told what of it was done.

    Raises:
        ValueError: the checkpoint has no tokenizer, or the text cannot be used.
    """
    with tokenizer_files(checkpoint.folder, "sensitivity, measured on text,") as folder:
        sample = read_sample(Tokenizer(folder), checkpoint, settings)
    form = WeightFormat(bits=BITS, quantizer="rtn")

    def round_trip(weight: np.ndarray, bits: int) -> np.ndarray:
        assert bits == form.bits
        return dequantize(quantize(weight, form))

    tokens = sample.ids.shape[1]
    advance = progress("quantizing one weight after the other", work(checkpoint, tokens))
    with torch_threads(settings.threads, checkpoint):
        found = rank(checkpoint, sample.ids, round_trip, bits=BITS, progress=advance)
    if settings.json is not None:
        contents = ranking_json(found, checkpoint, tokens)
        settings.json.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return found


def fit_to_budget(
    model: ir.Model,
    target: Target,
    budget: int,
    *,
    checkpoint: Checkpoint,
    library: Path | None,
    costs: Costs | None,
) -> Target:
    """The target with the mix of bits that makes a package of a size.

    Args:
        model: as traced.
        budget: bytes.
        library: of native operators, if the package gets a copy.
        costs: of ``measure_sensitivity``; None takes the weights' own errors.

    Raises:
        ValueError: a size that cannot be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(checkpoint.folder, Path(folder))
        others = sum(file.stat().st_size for file in Path(folder).iterdir())
    if library is not None:
        others += library.stat().st_size
    return fit_target(model, target, budget, others=others, costs=costs)
