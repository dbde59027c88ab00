"""What searching for scales gains over rounding to nearest, beside what no search could exceed.

    python -m benchmarks.scale_search [--rows 256] [--json FILE]

Signal-to-noise ratios of matrices [rows, 2560] of independent numbers in every format. The limit is
found on the first blocks by brute force: hundreds of ranges, zero points tried around each, every
scale fitted by least squares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from benchmarks.quantizers import make_weight
from graph_passes.block_quantization import dequantize, quantize
from graph_passes.recipe import BITS, WeightFormat

WEIGHTS = ("normal", "heavy tails")  # the latter Student's t, 4 degrees of freedom
BLOCK_SIZES = (16, 32, 64, 128)
COLUMNS = 2560
_LIMIT_WEIGHTS = 1 << 16  # that the limit is found on


@dataclass(frozen=True)
class Gain:
    """One format on one kind of weights.

    Attributes:
        rtn_db, search_db: signal-to-noise ratio by each quantizer.
        limit_db: gain over rounding to nearest of the best scales there are.
    """

    weight: str
    bits: int
    block_size: int
    zero_points: bool
    rtn_db: float
    search_db: float
    limit_db: float

    @property
    def gain_db(self) -> float:
        """Of the search over rounding to nearest."""
        return self.search_db - self.rtn_db


def formats() -> Iterator[WeightFormat]:
    """Every combination of bits, block size and zero points."""
    for bits in BITS:
        for block_size in BLOCK_SIZES:
            for zero_points in (False, True):
                yield WeightFormat(bits=bits, block_size=block_size, zero_points=zero_points)


def measure(name: str, form: WeightFormat, rows: int) -> Gain:
    """Quantize a matrix of a kind of weights by both, and a part of it as well as can be."""
    weight = make_weight(name, (rows, COLUMNS))
    rtn, search = (ratio(weight, form, quantizer) for quantizer in ("rtn", "search"))
    blocks = weight.reshape(-1, form.block_size)[: _LIMIT_WEIGHTS // form.block_size]
    limit = best_ratio(blocks, form) - ratio(blocks, form, "rtn")
    return Gain(name, form.bits, form.block_size, form.zero_points, rtn, search, limit)


def ratio(weight: np.ndarray, form: WeightFormat, quantizer: str) -> float:
    """Signal-to-noise ratio in decibels of a quantized matrix."""
    found = dequantize(quantize(weight, dataclasses.replace(form, quantizer=quantizer)))
    energy = np.square(weight, dtype=np.float64).sum()
    return 10 * math.log10(energy / np.square(found - weight, dtype=np.float64).sum())


def best_ratio(blocks: np.ndarray, form: WeightFormat) -> float:
    """The ratio that the best scales and zero points give blocks [blocks, block_size]."""
    x, top = blocks.astype(np.float64), float((1 << form.bits) - 1)
    gained = np.zeros(len(x))  # by what the squared error is less than that of storing zeros
    for inverse, zero in _candidates(x, top, form.zero_points):
        q = np.clip(np.rint(x * inverse[:, None]), -zero[:, None], (top - zero)[:, None])
        along, square = np.einsum("bk,bk->b", x, q), np.einsum("bk,bk->b", q, q)
        np.maximum(gained, along * along / np.maximum(square, 1), out=gained)
    energy = float(np.square(x).sum())
    return 10 * math.log10(energy / (energy - float(gained.sum())))


def _candidates(
    x: np.ndarray, top: float, zero_points: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One over the scale, and zero, for each block: densely about the range of its numbers."""
    low, high = x.min(axis=1), x.max(axis=1)
    if zero_points:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        for wider in np.linspace(-3, 9, 97):
            inverse = (top + wider) / (high - low)
            middle = np.rint(top / 2 - (low + high) / 2 * inverse)
            for shift in (-2, -1, 0, 1, 2):
                yield inverse, np.clip(middle + shift, 0, top)
        return
    middle = (top + 1) / 2
    for wider in np.linspace(-3, 9, 241):
        inverse = (middle + wider) / np.maximum(high, -low)
        for sign in (-1, 1):
            yield sign * inverse, np.full(len(x), middle)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_search", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=_count, default=256, help="of each matrix (256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    console, found = Console(stderr=True), list[Gain]()
    with console.status("quantizing") as status:
        for name in WEIGHTS:
            for form in formats():
                status.update(f"{name}, {form.bits} bits, blocks of {form.block_size}")
                found.append(measure(name, form, options.rows))
    if options.json is not None:
        rows = [dataclasses.asdict(each) for each in found]
        contents = {"machine": describe_setup(), "columns": COLUMNS, "formats": rows}
        options.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    Console().print(_table(found))
    return 0


def _table(found: list[Gain]) -> Table:
    table = Table("weights", "bits", "block", "zero", box=None, pad_edge=False)
    for title in ("rtn, dB", "search, dB", "gain", "limit"):
        table.add_column(title, justify="right")
    for each in found:
        ratios = f"{each.rtn_db:.2f}", f"{each.search_db:.2f}"
        gains = f"{each.gain_db:.2f}", f"{each.limit_db:.2f}"
        zero = "own" if each.zero_points else "middle"
        table.add_row(each.weight, str(each.bits), str(each.block_size), zero, *ratios, *gains)
    return table


def _count(text: str) -> int:
    count = int(text)
    if count < _LIMIT_WEIGHTS // COLUMNS:
        raise ValueError
    return count


if __name__ == "__main__":
    sys.exit(main())
