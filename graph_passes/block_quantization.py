"""Symmetric round-to-nearest quantization of matrices in blocks along their rows.

Every block of ``block_size`` neighbours in a row shares one float32 scale:

    scale = max |w| / (2^(bits-1) - 1)        stored = round(w / scale) + 2^(bits-1)

So the error is at most half a scale. Stored values are unsigned; two 4-bit values share a byte,
the first in the low half. A last block that the row does not fill is filled with zeros.

Source: the operator com.microsoft.MatMulNBits without zero points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.streamed_tensor import StreamedTensor, read_float32_rows, rows_per_chunk

BLOCK_SIZES = (16, 32, 64, 128, 256)

# 2^23 as float32: from here to 2^24 neighbours are 1 apart, so adding it rounds to the nearest
# integer, which then stands in the lowest bits. Faster than rounding and converting.
_ROUNDER = np.float32(1 << 23)
_TOP = 0x4  # the topmost four bits of any float32 in that range


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix [rows, columns] in blocks.

    Attributes:
        packed: uint8 [rows, blocks, block_size * bits / 8].
        scale: float32 [rows, blocks], never zero.
        bits: 4 or 8.
        columns: of the matrix; the last block may reach beyond them.
    """

    packed: np.ndarray
    scale: np.ndarray
    bits: int
    columns: int


def quantize(weight: np.ndarray, *, bits: int, block_size: int) -> Quantized:
    """Quantize a matrix.

    Args:
        weight: [rows, columns] float32, finite.
        bits: 4 or 8.
        block_size: one of ``BLOCK_SIZES``.

    Raises:
        ValueError: bits or block_size not offered; a NaN or an infinity in the weight.
    """
    check_settings(bits, block_size)
    rows, columns = weight.shape
    blocks = count_blocks(columns, block_size)
    packed = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scale = np.empty((rows, blocks), np.float32)
    step = rows_per_chunk(weight.shape)
    for start in range(0, rows, step):
        part = np.ascontiguousarray(weight[start : start + step], np.float32)
        if missing := blocks * block_size - columns:
            part = np.pad(part, ((0, 0), (0, missing)))
        in_blocks = part.reshape(-1, blocks, block_size)
        scale[start : start + step] = _scales(in_blocks, bits)
        packed[start : start + step] = _pack(in_blocks, scale[start : start + step], bits)
    return Quantized(packed=packed, scale=scale, bits=bits, columns=columns)


def dequantize(quantized: Quantized) -> np.ndarray:
    """The float32 matrix [rows, columns] that a runtime computes with."""
    stored = quantized.packed
    if quantized.bits == 4:
        stored = np.stack([stored & 0xF, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
    centred = stored.astype(np.float32) - np.float32(1 << (quantized.bits - 1))
    rows = centred * quantized.scale[:, :, None]
    return rows.reshape(len(rows), -1)[:, : quantized.columns]


def quantized_tensors(
    weight: ir.TensorProtocol, *, bits: int, block_size: int
) -> tuple[StreamedTensor, StreamedTensor]:
    """Two tensors, named ``{weight}.packed`` and ``{weight}.scales``, that quantize when written.

    Written one after the other they cost one pass over the weight: the scales found while the
    packed values were computed wait for their reader, 1/16 of the weight's float16 size.

    Args:
        weight: [rows, columns] float32, float16 or bfloat16.

    Raises:
        ValueError: bits or block_size not offered; when read: NaN or infinity, naming the weight.
    """
    check_settings(bits, block_size)
    rows, columns = weight.shape.numpy()
    blocks = count_blocks(columns, block_size)
    found: list[np.ndarray] = []  # scales of the last complete pass, until they are read

    def parts() -> Iterator[Quantized]:
        for part in read_float32_rows(weight):
            try:
                yield quantize(part, bits=bits, block_size=block_size)
            except ValueError as error:
                raise ValueError(f"cannot quantize weight {weight.name!r}: {error}") from error

    def packed() -> Iterator[np.ndarray]:
        found.clear()
        scales = []
        for part in parts():
            scales.append(part.scale)
            yield part.packed
        found.extend(scales)

    def scales() -> Iterator[np.ndarray]:
        waiting, found[:] = found[:], []
        yield from waiting or (part.scale for part in parts())

    return (
        StreamedTensor(
            packed,
            dtype=ir.DataType.UINT8,
            shape=(rows, blocks, block_size * bits // 8),
            name=f"{weight.name}.packed",
        ),
        StreamedTensor(
            scales, dtype=ir.DataType.FLOAT, shape=(rows, blocks), name=f"{weight.name}.scales"
        ),
    )


def check_settings(bits: int, block_size: int) -> None:
    """Refuse what no runtime reads.

    Raises:
        ValueError: naming the setting and what is offered.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}, expected one of {BLOCK_SIZES}")


def count_blocks(columns: int, block_size: int) -> int:
    """Blocks that cover a row."""
    return -(-columns // block_size)


def _scales(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Scales [rows, blocks] of float32 [rows, blocks, block_size]."""
    # Positive floats are ordered as their bits are, and numpy finds the largest integer faster;
    # a NaN's bits are larger than any number's, so it is not lost.
    magnitude = blocks.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = magnitude.max(axis=-1).view(np.float32)
    if not np.isfinite(largest).all():
        raise ValueError("it holds a NaN or an infinity: the checkpoint is damaged")
    # A block of zeros, or of numbers so small that their scale would lose its digits, gets the
    # smallest normal number: the error stays below half a scale, and nothing is divided by zero.
    return np.maximum(largest / np.float32((1 << (bits - 1)) - 1), np.finfo(np.float32).tiny)


def _pack(blocks: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Stored bytes [rows, blocks, block_size * bits / 8] of float32 [rows, blocks, block_size]."""
    rounded = blocks / scale[:, :, None]
    rounded += _ROUNDER + np.float32(1 << (bits - 1))
    if bits == 8:
        return rounded.view(np.uint32).astype(np.uint8)
    # Two neighbours as one 64-bit number, the first in the lower half. Shifted by 28 the second's
    # value lands above the first's, and the first's topmost bits on its own value: undone by _TOP.
    pairs = rounded.view("<u8")
    joined = pairs >> np.uint64(28)
    joined ^= pairs
    packed = joined.astype(np.uint8)
    packed ^= np.uint8(_TOP)
    return packed
