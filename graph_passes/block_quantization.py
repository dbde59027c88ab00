"""Matrices in 4 or 8 bits, in blocks along their rows.

Every block of ``block_size`` neighbours in a row shares one scale, float32 or float16:

    w = scale * (stored - zero)

Stored values are unsigned; two 4-bit values share a byte, the first in the low half. Zero is the
middle value, 8 or 128, or one of the block's own, packed like the values, a row's on whole bytes.
A last block that the row does not fill is filled with zeros.

Source: the operator com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.error_compensation import Calibration, Compensation
from graph_passes.recipe import WeightFormat
from graph_passes.scale_search import round_to_nearest, search_scales
from graph_passes.streamed_tensor import (
    StreamedTensor,
    joined_rows,
    read_float32_rows,
    rows_per_chunk,
)

# 2^23 as float32: from here to 2^24 neighbours are 1 apart, so adding it rounds to the nearest
# integer, which then stands in the lowest bits. Faster than rounding and converting.
_ROUNDER = np.float32(1 << 23)
_TOP = 0x4  # the topmost four bits of any float32 in that range

_LEAST_IMPORTANCE = np.float32(0.01)  # of a column, as a share of the mean

# Rows that errors are compensated in at once: the loop over columns costs the same for few.
_COMPENSATED_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix [rows, columns] in blocks.

    Attributes:
        packed: uint8 [rows, blocks, block_size * bits / 8].
        scale: float32 [rows, blocks], never zero; numbers of float16 where that is their type.
        zero_points: uint8 [rows, ceil(blocks * bits / 8)], or None where zero is the middle value.
        bits: 4 or 8.
        columns: of the matrix; the last block may reach beyond them.
    """

    packed: np.ndarray
    scale: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class QuantizedTensors:
    """A quantized matrix as tensors to be written, in this order."""

    packed: StreamedTensor
    scales: StreamedTensor
    zero_points: StreamedTensor | None


def quantize(
    weight: np.ndarray, form: WeightFormat, calibration: Calibration | None = None
) -> Quantized:
    """Quantize a matrix.

    Args:
        weight: [rows, columns] float32, finite.
        calibration: of its inputs. "gptq" needs it, "search" weighs errors by it, "rtn" ignores it.

    Raises:
        ValueError: a NaN or an infinity in the weight; "gptq" without calibration.
    """
    quantizer = _Quantizer(form, weight.shape[1], calibration)
    step = rows_per_chunk(weight.shape)
    if form.quantizer == "gptq":
        step = _COMPENSATED_ROWS
    parts = [quantizer(weight[start : start + step]) for start in range(0, len(weight), step)]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        packed=np.concatenate([part.packed for part in parts]),
        scale=np.concatenate([part.scale for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        bits=form.bits,
        columns=weight.shape[1],
    )


def dequantize(quantized: Quantized) -> np.ndarray:
    """The float32 matrix [rows, columns] that a runtime computes with."""
    rows, blocks = quantized.scale.shape
    stored = unpack(quantized.packed.reshape(rows, -1), quantized.bits)
    zero: np.ndarray = np.full((rows, blocks), 1 << (quantized.bits - 1), np.float32)
    if quantized.zero_points is not None:
        zero = unpack(quantized.zero_points, quantized.bits)[:, :blocks].astype(np.float32)
    centred = stored.reshape(rows, blocks, -1).astype(np.float32) - zero[:, :, None]
    return (centred * quantized.scale[:, :, None]).reshape(rows, -1)[:, : quantized.columns]


def pack(stored: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of integers uint8 [..., n]; 4-bit ones in pairs, an odd last one alone."""
    if bits == 8:
        return stored
    if stored.shape[-1] % 2:
        stored = np.pad(stored, [(0, 0)] * (stored.ndim - 1) + [(0, 1)])
    return stored[..., ::2] | stored[..., 1::2] << 4


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Integers uint8 [rows, n * 8 / bits] of bytes [rows, n]."""
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1)


def quantized_tensors(
    weight: ir.TensorProtocol, form: WeightFormat, calibration: Calibration | None = None
) -> QuantizedTensors:
    """Tensors named ``{weight}.packed``, ``.scales``, ``.zero_points``, quantized when written.

    Written one after the other they cost one pass over the weight: scales and zero points found
    while the packed values were computed wait for their readers, 1/16 of the weight's float16 size.

    Args:
        weight: [rows, columns] float32, float16 or bfloat16.
        calibration: as for ``quantize``.

    Raises:
        ValueError: "gptq" without calibration; when read: NaN or infinity, naming the weight.
    """
    rows, columns = weight.shape.numpy()
    blocks = count_blocks(columns, form.block_size)
    check_calibration(form, calibration, weight.name)
    waiting: dict[str, list[np.ndarray]] = {}  # of the last complete pass, until they are read

    def parts() -> Iterator[Quantized]:
        chunks = read_float32_rows(weight)
        if form.quantizer == "gptq":
            chunks = joined_rows(chunks, _COMPENSATED_ROWS)
        try:
            quantizer = _Quantizer(form, columns, calibration)
            for part in chunks:
                yield quantizer(part)
        except ValueError as error:
            raise ValueError(f"cannot quantize weight {weight.name!r}: {error}") from error

    def packed() -> Iterator[np.ndarray]:
        waiting.clear()
        scales, zero_points = [], []
        for part in parts():
            scales.append(part.scale)
            if part.zero_points is not None:
                zero_points.append(part.zero_points)
            yield part.packed
        waiting.update(scale=scales, zero_points=zero_points)

    def beside(which: str) -> Iterator[np.ndarray]:
        chunks = waiting.pop(which, None) or (getattr(part, which) for part in parts())
        dtype = np.float16 if which == "scale" and form.scale_type == "float16" else None
        yield from (chunk if dtype is None else chunk.astype(dtype) for chunk in chunks)

    def streamed(suffix: str, which: str, dtype: ir.DataType, *shape: int) -> StreamedTensor:
        chunks = packed if which == "packed" else lambda: beside(which)
        return StreamedTensor(chunks, dtype=dtype, shape=shape, name=f"{weight.name}.{suffix}")

    scale_type = ir.DataType.FLOAT16 if form.scale_type == "float16" else ir.DataType.FLOAT
    uint8, width = ir.DataType.UINT8, form.block_size * form.bits // 8
    zero_points = None
    if form.zero_points:
        zero_bytes = -(-blocks * form.bits // 8)
        zero_points = streamed("zero_points", "zero_points", uint8, rows, zero_bytes)
    return QuantizedTensors(
        packed=streamed("packed", "packed", uint8, rows, blocks, width),
        scales=streamed("scales", "scale", scale_type, rows, blocks),
        zero_points=zero_points,
    )


def check_calibration(
    form: WeightFormat, calibration: Calibration | None, name: str | None
) -> None:
    """Refuse to compensate errors by inputs nobody has seen.

    Raises:
        ValueError: naming the weight.
    """
    if form.quantizer == "gptq" and calibration is None:
        raise ValueError(
            f"quantizer 'gptq' needs the inputs of {name!r} on calibration text, and none were "
            "collected: give one, or take 'search'"
        )


def count_blocks(columns: int, block_size: int) -> int:
    """Blocks that cover a row."""
    return -(-columns // block_size)


class _Quantizer:
    """Quantizes rows of one matrix; what they share is computed once."""

    def __init__(self, form: WeightFormat, columns: int, calibration: Calibration | None) -> None:
        check_calibration(form, calibration, "this weight")
        self._form, self._columns = form, columns
        self._blocks = count_blocks(columns, form.block_size)
        self._missing = self._blocks * form.block_size - columns
        self._importance: np.ndarray | None = None
        self._compensation: Compensation | None = None
        if calibration is None or form.quantizer == "rtn":
            return
        importance = calibration.mean_squares()
        # A column that was silent on the calibration text still counts a little.
        importance = importance + _LEAST_IMPORTANCE * importance.mean()
        importance = np.pad(importance, (0, self._missing))
        self._importance = importance.reshape(self._blocks, form.block_size)
        if form.quantizer == "gptq":
            self._compensation = Compensation(calibration)

    def __call__(self, rows: np.ndarray) -> Quantized:
        """Quantize rows [any, columns] float32."""
        if not np.isfinite(np.abs(rows).max(initial=0)):
            raise ValueError("it holds a NaN or an infinity: the checkpoint is damaged")
        form = self._form
        rows = np.ascontiguousarray(rows, np.float32)
        if self._missing:
            rows = np.pad(rows, ((0, 0), (0, self._missing)))
        blocks = rows.reshape(-1, self._blocks, form.block_size)
        scale, zero = self._scales(blocks)
        if self._compensation is None:
            packed = _round_and_pack(blocks, scale, zero, form)
        else:
            stored = np.repeat(zero.astype(np.uint8), form.block_size, axis=1)
            stored[:, : self._columns] = self._compensation.stored(
                rows[:, : self._columns],
                scale,
                zero,
                bits=form.bits,
                block_size=form.block_size,
            )
            packed = pack(stored.reshape(blocks.shape), form.bits)
        own_zeros = pack(zero.astype(np.uint8), form.bits) if form.zero_points else None
        return Quantized(
            packed=packed,
            scale=scale,
            zero_points=own_zeros,
            bits=form.bits,
            columns=self._columns,
        )

    def _scales(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero, float32 [rows, blocks] each, a few rows at a time."""
        form = self._form
        scale, zero = (np.empty(blocks.shape[:2], np.float32) for _ in range(2))
        step = rows_per_chunk(blocks.shape)
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            if form.quantizer == "rtn":
                scale[part], zero[part] = round_to_nearest(
                    blocks[part], bits=form.bits, zero_points=form.zero_points
                )
            else:
                scale[part], zero[part] = search_scales(
                    blocks[part],
                    bits=form.bits,
                    zero_points=form.zero_points,
                    importance=self._importance,
                )
        return (_to_float16(scale) if form.scale_type == "float16" else scale), zero


def _to_float16(scale: np.ndarray) -> np.ndarray:
    """The nearest numbers of float16 that are not zero, as float32."""
    with np.errstate(over="ignore"):
        nearest = scale.astype(np.float16)
    if np.isinf(nearest).any():
        raise ValueError(
            f"a block has the scale {np.abs(scale).max():.3g}, which float16 does not hold: store "
            'its scales as float32, with "scale_type": "float32" in the recipe'
        )
    least = np.finfo(np.float16).smallest_subnormal
    return np.where(nearest == 0, np.copysign(least, scale), nearest).astype(np.float32)


def _round_and_pack(
    blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: WeightFormat
) -> np.ndarray:
    """Stored bytes [rows, blocks, block_size * bits / 8] of float32 [rows, blocks, block_size]."""
    rounded = blocks / scale[:, :, None]
    rounded += zero[:, :, None] if form.zero_points else np.float32(1 << (form.bits - 1))
    if form.zero_points or form.quantizer != "rtn" or form.scale_type == "float16":
        np.clip(rounded, 0, (1 << form.bits) - 1, out=rounded)
    rounded += _ROUNDER
    if form.bits == 8:
        return rounded.view(np.uint32).astype(np.uint8)
    # Two neighbours as one 64-bit number, the first in the lower half. Shifted by 28 the second's
    # value lands above the first's, and the first's topmost bits on its own value: undone by _TOP.
    pairs = rounded.view("<u8")
    joined = pairs >> np.uint64(28)
    joined ^= pairs
    packed = joined.astype(np.uint8)
    packed ^= np.uint8(_TOP)
    return packed
