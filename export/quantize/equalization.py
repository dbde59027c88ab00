"""Where the inputs of linear layers can be evened out, and by how much on a text.

A norm's scale and shift make the inputs of a layer's first projection and of its MLP's; the second
half of ``fc1`` makes those of ``fc2``. What a scan or attention makes cannot be scaled before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.checkpoint import Checkpoint
from graph_passes.equalize import Scaling, Scalings, choose_exponents
from graph_passes.error_compensation import Calibration
from graph_passes.recipe import WeightFormat
from graph_passes.streamed_tensor import sample_rows

_ROWS = 128  # of a weight, to measure errors on


def find_scalings(
    checkpoint: Checkpoint,
    formats: Callable[[str], WeightFormat | None],
    calibration: Mapping[str, Calibration],
    progress: Callable[[int], object] | None = None,
) -> Scalings:
    """Exponents that leave the model what it is, and its weights easier to round.

    Args:
        formats: how a weight of that name will be stored.
        calibration: what the layers are fed.
        progress: told 1 after every layer.

    Returns:
        Of the tensors that change; none where no layer gains.
    """
    found = Scalings()
    for index in range(checkpoint.config.num_hidden_layers):
        _add_layer(found, checkpoint, index, formats, calibration)
        if progress is not None:
            progress(1)
    return found


def first_projection(checkpoint: Checkpoint, layer: int) -> str:
    """Name of the weight that reads a layer's first norm."""
    recurrent = checkpoint.config.layer_kind(layer) in ("mamba", "gmu")
    return f"model.layers.{layer}.attn.{'in_proj' if recurrent else 'Wqkv'}.weight"


def _add_layer(
    found: Scalings,
    checkpoint: Checkpoint,
    index: int,
    formats: Callable[[str], WeightFormat | None],
    calibration: Mapping[str, Calibration],
) -> None:
    layer = f"model.layers.{index}."
    fc1, fc2 = f"{layer}mlp.fc1.weight", f"{layer}mlp.fc2.weight"

    def chosen(name: str) -> np.ndarray | None:
        form = formats(name)
        if form is None:
            return None
        rows = sample_rows(checkpoint.tensors[name].to_ir(), _ROWS)
        exponents = choose_exponents(rows, calibration[name], form)
        return exponents if exponents.any() else None

    norms = (
        ("input_layernorm", first_projection(checkpoint, index)),
        ("post_attention_layernorm", fc1),
    )
    for norm, reader in norms:
        if (loud := chosen(reader)) is not None:
            found[reader] = Scaling(columns=loud)
            found[f"{layer}{norm}.weight"] = found[f"{layer}{norm}.bias"] = Scaling(rows=-loud)
    if (loud := chosen(fc2)) is not None:
        rows = np.concatenate([np.zeros_like(loud), -loud])  # the first half is the gate
        found[fc1] = Scaling(rows=rows, columns=found.get(fc1, Scaling()).columns)
        found[fc2] = Scaling(columns=loud)
