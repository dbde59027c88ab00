"""Write a checkpoint of the published shape with random weights of plausible scale.

    python -m benchmarks.random_checkpoint DIR [--size published|small] [--seed 0] [--tokenizer]

Time, memory and size of an export depend on the shapes alone, so 7.7 GB of noise measure them
without a download. The weights are streamed: under 300 MB of memory at any size. What reads text,
such as a calibration, needs a tokenizer as well: the reference model's and its text serve.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import BinaryIO

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from export.checkpoint import INDEX_FILE, ITEM_SIZES
from export.cli import REFERENCE
from export.config import SambaYConfig, read_config
from export.quantize.options import TEXT
from export.tensors import Shape, expected_tensors

CONFIG = {  # the published config.json
    "architectures": ["Phi4FlashForCausalLM"],
    "model_type": "phi4flash",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "mb_per_layer": 2,
    "layer_norm_eps": 1e-5,
    "vocab_size": 200064,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 262144,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
}
GENERATION = {"eos_token_id": [200020, 199999]}

SMALL = {  # what --size small changes: seconds, for tests
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 8,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "bos_token_id": 511,
    "eos_token_id": 511,
    "pad_token_id": 511,
}
SMALL_GENERATION = {"eos_token_id": [510, 511]}

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", TEXT)

_LEVELS = 1 << 16  # a distribution is a table of as many quantiles, drawn from by random 16 bits
_CHUNK = 1 << 21  # elements made at once; times 8 bytes of table indices


def write_checkpoint(
    folder: Path,
    config: Mapping[str, object],
    generation: Mapping[str, object],
    *,
    seed: int = 0,
    tokenizer: bool = False,
    progress: Callable[[int, int], object] = lambda written, total: None,
) -> int:
    """Write config, two bfloat16 shards and their index; what was written goes if that fails.

    The same seed gives the same bytes. ``A_log`` and ``lambda_*`` are float32, as published.

    Args:
        folder: does not exist, or is empty.
        config, generation: contents of config.json and generation_config.json.
        tokenizer: add the reference model's, and its text; their tokens are fewer than 800.
        progress: called with the bytes of weights written so far, and of all.

    Returns:
        Bytes of all tensors.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the disk is full, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no empty folder: name another or remove it")
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation)
        for name in TEXT_FILES if tokenizer else ():
            shutil.copyfile(REFERENCE / name, folder / name)
        return _write_weights(folder, read_config(folder), seed, progress)
    except BaseException:  # Ctrl-C too: a shard cut short must not look like a checkpoint
        for path in folder.iterdir():
            path.unlink()
        if not existed:
            folder.rmdir()
        raise


def _write_weights(
    folder: Path, config: SambaYConfig, seed: int, progress: Callable[[int, int], object]
) -> int:
    shapes = expected_tensors(config)
    total = sum(_nbytes(name, shape) for name, shape in shapes.items())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map, placed = {}, 0
    for name, shape in shapes.items():
        # 65 %: the first shard of the published size then ends at the usual 5 GB.
        weight_map[name] = first if placed < 0.65 * total else second
        placed += _nbytes(name, shape)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress(written, total)

    for shard in (first, second):
        held = {name: shapes[name] for name, file in weight_map.items() if file == shard}
        _write_shard(folder / shard, held, config, seed, advance)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _write_shard(
    path: Path,
    shapes: dict[str, Shape],
    config: SambaYConfig,
    seed: int,
    advance: Callable[[int], object],
) -> None:
    names = sorted(shapes, key=lambda name: _dtype(name) != "F32")  # wide first: all aligned
    ends = np.cumsum([0, *(_nbytes(name, shapes[name]) for name in names)]).tolist()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, span in zip(names, pairwise(ends), strict=True):
        header[name] = {"dtype": _dtype(name), "shape": shapes[name], "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            # A generator of its own for each tensor: no bytes depend on order or chunks.
            random = np.random.SFC64([seed, *name.encode("utf-8")])
            _write_tensor(file, name, shapes[name], config, random, advance)


def _write_tensor(
    file: BinaryIO,
    name: str,
    shape: Shape,
    config: SambaYConfig,
    random: np.random.SFC64,
    advance: Callable[[int], object],
) -> None:
    numbers = np.dtype("<f4") if _dtype(name) == "F32" else np.dtype(ml_dtypes.bfloat16)
    if name.endswith("A_log"):  # S4D-real: state n decays at rate n
        rows = np.tile(np.log(np.arange(1, shape[1] + 1)), (shape[0], 1))
        file.write(rows.astype(numbers).tobytes())
        advance(rows.size * numbers.itemsize)
        return
    # Drawing bits rather than numbers keeps bfloat16 as cheap as a lookup.
    table = _quantiles(name, shape, config).astype(numbers).view(f"<u{numbers.itemsize}")
    left = math.prod(shape)
    while left:
        count = min(left, _CHUNK)
        drawn = random.random_raw(-(-count // 4)).view(np.uint16)[:count]
        file.write(table.take(drawn, mode="clip").data)
        advance(count * numbers.itemsize)
        left -= count


def _quantiles(name: str, shape: Shape, config: SambaYConfig) -> np.ndarray:
    """What the elements of a tensor are drawn from: [65536] float64, evenly likely."""
    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    if name.endswith("dt_proj.bias"):  # softplus(bias), the scan's step, is in 0.001 .. 0.1
        step = np.exp(np.log(0.001) + levels * (np.log(0.1) - np.log(0.001)))
        return np.log(np.expm1(step))
    if name.endswith((".D", "norm.weight", "subln.weight")):
        return np.ones(_LEVELS)
    if name.endswith(("norm.bias", "conv1d.bias")):
        return np.zeros(_LEVELS)
    return _NORMAL * _deviation(name, shape, config)


_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / _LEVELS) for i in range(_LEVELS)])


def _deviation(name: str, shape: Shape, config: SambaYConfig) -> float:
    """Standard deviation of a normally distributed tensor, near that of a trained one."""
    if "lambda_" in name:
        return 0.1
    if name.endswith("conv1d.weight"):
        return 1 / math.sqrt(3 * config.d_conv)  # as uniform in +-1 / sqrt(K)
    if name.endswith("dt_proj.weight"):
        return 1 / math.sqrt(3 * config.dt_rank)
    if name.endswith(("out_proj.weight", "fc2.weight")):
        return 0.02 / math.sqrt(2 * config.num_hidden_layers)  # ends of 2 L residual branches
    return 0.02


def _dtype(name: str) -> str:
    return "F32" if name.endswith("A_log") or "lambda_" in name else "BF16"


def _nbytes(name: str, shape: Shape) -> int:
    return math.prod(shape) * ITEM_SIZES[_dtype(name)]


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_checkpoint",
        description="Write a checkpoint with random weights.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="new or empty folder")
    parser.add_argument(
        "--size",
        choices=("published", "small"),
        default="published",
        help="published: 7.7 GB, the default; small: 8 layers of width 64",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="same seed, same bytes; default 0")
    parser.add_argument(
        "--tokenizer",
        action="store_true",
        help="add the reference model's tokenizer and text; published size only",
    )
    chosen = parser.parse_args(arguments)
    if chosen.tokenizer and chosen.size == "small":
        parser.error("--tokenizer has 800 tokens and --size small 512: take the published size")
    small = chosen.size == "small"
    config = CONFIG | SMALL if small else CONFIG
    generation = SMALL_GENERATION if small else GENERATION
    console = Console(stderr=True)
    try:
        with Progress(
            "writing", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task("weights", total=None)
            total = write_checkpoint(
                chosen.folder,
                config,
                generation,
                seed=chosen.seed,
                tokenizer=chosen.tokenizer,
                progress=lambda written, total: bar.update(task, completed=written, total=total),
            )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: nothing is left in {chosen.folder}", file=sys.stderr)
        return 130
    print(f"{chosen.folder}: {total} bytes of weights")
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give an integer from 0 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
