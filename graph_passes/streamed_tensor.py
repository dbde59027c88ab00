"""Weights that are computed while they are written, a few rows at a time.

A checkpoint is larger than the memory of the machine that exports it. A pass therefore changes
no weight: it replaces the weight by a tensor that knows how to compute itself from the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

# Elements computed at once. The steps of a conversion then meet in a processor's second level
# cache: larger chunks are slower, and memory is no concern.
CHUNK = 1 << 16


class StreamedTensor(ir.LazyTensor):
    """A tensor given by its rows in order; never whole in memory unless it is asked for.

    Attributes:
        chunks: starts a new pass over the data; arrays [rows, ...] of the tensor's dtype, fresh
            ones that the reader may overwrite.
    """

    def __init__(
        self,
        chunks: Callable[[], Iterable[np.ndarray]],
        *,
        dtype: ir.DataType,
        shape: Iterable[int],
        name: str,
    ) -> None:
        """Describe a tensor; nothing is computed.

        Args:
            chunks: see the class.
            dtype: of every chunk.
            shape: of the whole tensor.
            name: of the initializer it will be.
        """
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.chunks = chunks

    def tofile(self, file: Any) -> None:
        """Write the data, little endian, holding one chunk in memory.

        Args:
            file: anything with a ``write`` method that takes bytes.
        """
        for chunk in self.chunks():
            little = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)

    def _whole(self) -> ir.Tensor:
        whole = np.empty(self.shape.numpy(), dtype=self.dtype.numpy())
        start = 0
        for chunk in self.chunks():
            whole[start : start + len(chunk)] = chunk
            start += len(chunk)
        return ir.Tensor(whole, name=self.name)


def read_float32_rows(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """Read a weight from its first row to its last, converted to float32.

    A tensor in a file gives its memory map back at the end, so that the file's pages do not
    count as memory of this process.

    Args:
        tensor: float32, float16 or bfloat16, at least one dimension.

    Yields:
        Fresh float32 arrays [rows, ...] of about ``CHUNK`` elements.

    Raises:
        TypeError: another dtype.
    """
    if isinstance(tensor, StreamedTensor) and tensor.dtype == ir.DataType.FLOAT:
        yield from tensor.chunks()
        return
    array = tensor.numpy()
    step = rows_per_chunk(array.shape)
    try:
        for start in range(0, len(array), step):
            yield to_float32(array[start : start + step], tensor)
    finally:
        del array
        release(tensor)


def sample_rows(tensor: ir.TensorProtocol, count: int) -> np.ndarray:
    """Some rows from all over a weight, float32 [count or fewer, ...].

    Raises:
        TypeError: see ``to_float32``.
    """
    total = tensor.shape.numpy()[0]
    places = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
    try:
        return to_float32(np.ascontiguousarray(tensor.numpy()[places]), tensor)
    finally:
        release(tensor)


def to_float32(array: np.ndarray, tensor: ir.TensorProtocol) -> np.ndarray:
    """A float32 copy of an array that was read from a tensor.

    Raises:
        TypeError: the tensor is neither float32, float16 nor bfloat16.
    """
    if tensor.dtype == ir.DataType.BFLOAT16:
        # bfloat16 is the upper half of a float32; the shift is 5 times faster than the library's.
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return array.astype(np.float32)
    raise TypeError(
        f"weight {tensor.name!r} is {tensor.dtype}, expected FLOAT, FLOAT16 or BFLOAT16: "
        "convert the checkpoint to one of these"
    )


def joined_rows(chunks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in arrays of about as many as asked for, for what is slow on few."""
    waiting: list[np.ndarray] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) >= rows:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def rows_per_chunk(shape: tuple[int, ...]) -> int:
    """Rows that make about ``CHUNK`` elements, at least one."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    return max(1, CHUNK // max(1, width))


def release(tensor: ir.TensorProtocol) -> None:
    """Give a file's memory map back; the tensor maps it again when it is read again."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # someone else still reads: closed with the last
            tensor.release()
