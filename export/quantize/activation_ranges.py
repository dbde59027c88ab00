"""Between which numbers activations lie on a text: what scales of integer activations follow from.

Ranges are collected from the float graph one layer at a time, all texts through a layer before the
next is loaded. A value's numbers are counted by their upper 16 bits, that is as bfloat16 would have
them: 0.4 % wide bins over all floats, half a megabyte a value, however long the text is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.quantize.calibration import CHUNK, CalibrationError, check_length
from export.verify.package_slices import SlicedPackage, Track

CLIPS = ("minmax", "percentile", "mse")
_MOST = 4 * CHUNK  # tokens
_HEADROOM = 2.0  # times the limits: a bit of 16, for texts that go further than this one
_PERCENTILE = 99.999  # of the numbers lie between the limits
_STEPS = 64  # limits tried on each side for the least squared error


class ActivationRanges(Mapping[str, tuple[float, float]]):
    """Least and largest number of every value, by name."""

    def __init__(
        self, limits: Mapping[str, tuple[float, float]], *, clip: str, tokens: int
    ) -> None:
        self._limits, self._clip, self._tokens = dict(limits), clip, tokens

    def __getitem__(self, name: str) -> tuple[float, float]:
        """Limits of a value."""
        return self._limits[name]

    def __iter__(self) -> Iterator[str]:
        """Names of values."""
        return iter(self._limits)

    def __len__(self) -> int:
        """Count of values."""
        return len(self._limits)

    def __repr__(self) -> str:
        """Short: it is printed into manifests."""
        digest = hashlib.sha256(repr(sorted(self._limits.items())).encode()).hexdigest()[:12]
        return (
            f"ActivationRanges(values={len(self)}, clip={self._clip!r}, tokens={self._tokens}, "
            f"digest={digest!r})"
        )


def measure_ranges(
    model: ir.Model,
    ids: Sequence[int],
    names: Iterable[str],
    *,
    clip: str = "mse",
    library: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> ActivationRanges:
    """Limits for 16 bits: twice those on some 4000 tokens of a text, taken from all over it.

    One bit of 16 costs nothing that can be seen; a number that is clipped costs the answer.

    Args:
        model: as traced.
        ids: tokens of the text.
        names: of the values.
        clip: one of CLIPS.
        library: see ``collect_ranges``.
        progress: see ``collect_ranges``.

    Raises:
        CalibrationError: too few tokens, or another clip.
        SliceError: ONNX Runtime refuses a part of the graph.
    """
    check_length(ids)
    read = _spread(ids)
    found = collect_ranges(model, read, names, library=library, progress=progress)
    limits = {
        name: (_HEADROOM * low, _HEADROOM * high)
        for name, (low, high) in choose_ranges(found, clip=clip).items()
    }
    return ActivationRanges(limits, clip=clip, tokens=len(read))


def _spread(ids: Sequence[int]) -> list[int]:
    """Pieces of ``CHUNK`` tokens at equal distances."""
    if len(ids) <= _MOST:
        return list(ids)
    starts = np.linspace(0, len(ids) - CHUNK, _MOST // CHUNK).astype(int)
    return [token for start in starts for token in ids[start : start + CHUNK]]


def collect_ranges(
    model: ir.Model,
    ids: Sequence[int],
    names: Iterable[str],
    *,
    library: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Histogram]:
    """Count the numbers of a graph's values on a text, in layers 0..M+1.

    Layer M+1's queries and its feed-forward layers see the last token of every ``CHUNK``; values
    of the layers behind are not collected.

    Args:
        model: as traced.
        ids: tokens of the text; every ``CHUNK`` of them are a text of their own.
        names: of the values, such as ``graph_passes.quantize_activations.find_quantized`` gives.
        library: of native operators, which are faster than their bodies.
        threads: of one operator.
        progress: told 1 after every layer.

    Returns:
        Of every value that was met, by name.

    Raises:
        CalibrationError: there are no tokens.
        SliceError: ONNX Runtime refuses a part of the graph.
    """
    if not ids:
        raise CalibrationError("the text that ranges are to be collected on has no tokens")
    sliced = SlicedPackage.of_graph(model, library=library, threads=threads)
    array = np.asarray(ids, np.int64)
    tracks = [Track(array[None, start : start + CHUNK]) for start in range(0, len(array), CHUNK)]
    wanted, found = set(names), dict[str, Histogram]()

    def see(name: str, numbers: np.ndarray) -> None:
        if name in wanted:
            found.setdefault(name, Histogram()).add(numbers)

    last = sliced.config["num_hidden_layers"] // 2 + 1
    for part in sliced.slices[: last + 2]:
        if part.layer == last:
            part = replace(part, step=None)  # nobody reads its stream
        session = sliced.open(part, wanted)
        for track in tracks:
            sliced.run(part, session, track, see)
        if progress is not None:
            progress(1)
    return found


def choose_ranges(
    histograms: dict[str, Histogram], *, clip: str = "mse", bits: int = 16
) -> dict[str, tuple[float, float]]:
    """Limits of every value, see ``Histogram.limits``."""
    return {name: each.limits(clip, bits) for name, each in histograms.items()}


class Histogram:
    """How often a value's numbers have been what."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, np.int64)
        self._least, self._largest = np.inf, -np.inf

    def add(self, numbers: np.ndarray) -> None:
        """Count numbers of any shape, float32 or float16.

        Raises:
            CalibrationError: one of them is no number, or infinite.
        """
        flat = np.ascontiguousarray(numbers, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            raise CalibrationError("an activation is not finite: the checkpoint is damaged")
        self._counts += np.bincount(flat.view(np.uint32) >> 16, minlength=1 << 16)
        self._least = min(self._least, float(flat.min(initial=np.inf)))
        self._largest = max(self._largest, float(flat.max(initial=-np.inf)))

    def limits(self, clip: str, bits: int) -> tuple[float, float]:
        """Least and largest number to be represented.

        Args:
            clip: "minmax" clips nothing, "percentile" all but 99.999 % of the numbers, "mse" what
                makes the squared error of clipping and rounding least.
            bits: that numbers will be rounded to, for "mse".

        Raises:
            CalibrationError: another clip, or no number was ever seen.
        """
        if clip not in CLIPS:
            raise CalibrationError(f"clip is {clip!r}, expected one of {', '.join(CLIPS)}")
        if self._least > self._largest:
            raise CalibrationError("a value without numbers has no range")
        if clip == "minmax":
            return self._least, self._largest
        centres, counts = self._sorted()
        if clip == "percentile":
            return self._percentile(centres, counts)
        return self._least_error(centres, counts, bits)

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Middles of the bins that hold something, ascending, and what they hold."""
        codes = np.flatnonzero(self._counts)
        edges = (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        ends = ((codes.astype(np.uint32) << 16) | 0xFFFF).view(np.float32).astype(np.float64)
        centres = np.clip((edges + ends) / 2, self._least, self._largest)
        order = np.argsort(centres, kind="stable")
        return centres[order], self._counts[codes][order]

    def _percentile(self, centres: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
        beyond = counts.sum() * (100 - _PERCENTILE) / 200  # on each side
        first = int(np.searchsorted(np.cumsum(counts), beyond, side="right"))
        last = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), beyond, side="right"))
        low = self._least if first == 0 else float(centres[first])
        high = self._largest if last == len(counts) - 1 else float(centres[last])
        return low, high

    def _least_error(
        self, centres: np.ndarray, counts: np.ndarray, bits: int
    ) -> tuple[float, float]:
        shares = np.linspace(1, 0, _STEPS, endpoint=False)
        lows, highs = min(self._least, 0.0) * shares, max(self._largest, 0.0) * shares
        below = np.array([_clipped(centres, counts, low, -1) for low in lows])
        above = np.array([_clipped(centres, counts, high, 1) for high in highs])
        step = (highs[None, :] - lows[:, None]) / ((1 << bits) - 1)
        total = below[:, None] + above[None, :] + counts.sum() * np.square(step) / 12
        at_low, at_high = np.unravel_index(int(total.argmin()), total.shape)
        return float(lows[at_low]), float(highs[at_high])


def _clipped(centres: np.ndarray, counts: np.ndarray, limit: float, side: int) -> float:
    """Squared error of clipping what lies beyond a limit, above (1) or below (-1)."""
    return float((counts * np.square(np.maximum(side * (centres - limit), 0))).sum())
