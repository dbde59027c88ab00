"""Checkpoints of any shape whose every weight matters: no zero bias, no norm weight of one."""

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from export.config import read_config
from export.tensors import EMBEDDING, HEAD, expected_tensors

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def write_checkpoint(folder: Path, config: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """Write config.json and model.safetensors; return the weights, mapped from the file.

    Args:
        config: contents of config.json; ``tie_word_embeddings`` false stores a head of its own.
        dtype: "F32", "F16", or "BF16", which keeps A_log and lambdas in float32, as published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = expected_tensors(read_config(folder))
    if not config.get("tie_word_embeddings", True):
        shapes[HEAD] = shapes[EMBEDDING]
    path, kinds = folder / "model.safetensors", {name: _kind(name, dtype) for name in shapes}
    sizes = [math.prod(shape) * DTYPES[kinds[name]].itemsize for name, shape in shapes.items()]
    ends = [0, *itertools.accumulate(sizes)]
    header = {
        name: {"dtype": kinds[name], "shape": shape, "data_offsets": span}
        for (name, shape), span in zip(shapes.items(), itertools.pairwise(ends), strict=True)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            random = np.random.default_rng([*name.encode()])
            file.write(_random(name, shape, random).astype(DTYPES[kinds[name]]).tobytes())
    stored = np.memmap(path, np.uint8, "r", offset=8 + len(text))
    return {
        name: stored[slice(*header[name]["data_offsets"])].view(DTYPES[kind]).reshape(shapes[name])
        for name, kind in kinds.items()
    }


def _kind(name: str, dtype: str) -> str:
    return "F32" if dtype == "BF16" and (name.endswith("A_log") or ".lambda_" in name) else dtype


def _random(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(shape, np.float32)
    if name.endswith("A_log"):
        return np.log(np.arange(1, shape[1] + 1, dtype=np.float32)) + 0.3 * noise
    if name.endswith("dt_proj.bias"):  # steps softplus(bias) from 0.02 to 1
        return random.uniform(-4, 0.5, shape)
    if name.endswith((".D", "norm.weight", "subln.weight")):
        return 1 + 0.3 * noise
    if name.endswith(".bias") or ".lambda_" in name:
        return 0.3 * noise
    if name in (EMBEDDING, HEAD):
        return 2 * noise / math.sqrt(shape[1])  # logits of order 2, which leaves eps a say
    return noise / math.sqrt(math.prod(shape[1:]))
