"""What a package stores of each weight, read back from its own bytes and held against the source.

The decoding follows the operators' definitions and shares no code with the passes that encode.

Source: com.microsoft.MatMulNBits, com.microsoft.GatherBlockQuantized and DequantizeLinear.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.checkpoint import Checkpoint, StoredTensor
from export.verify.compare import snr
from export.weights import read_weight

_EQUALIZED = "sambay.equalized"  # metadata, see ``graph_passes.equalize``
_CHUNK = 1 << 20  # elements decoded at once
_UNSTORED = {"Unsqueeze", "Reshape", "Cast", "Squeeze", "Identity"}  # of scales, on their way


@dataclass(frozen=True)
class WeightError:
    """What storing a weight has cost.

    Attributes:
        name: in the checkpoint; with the rows where only some are meant.
        stored: such as "4 bit, block 32" or "float32".
        bits: of one number, without scales; 32 for float32.
        bytes: in the package, scales included.
        shape: of the weight.
        snr_db: of the whole tensor; infinite where it is exact.
        worst_row_db: of the row that has lost most.
        largest: absolute error.
    """

    name: str
    stored: str
    bits: int
    bytes: int
    shape: tuple[int, ...]
    snr_db: float
    worst_row_db: float
    largest: float


@dataclass(frozen=True)
class _Stored:
    """Where a weight lies: rows(start, stop) decodes some rows as float32 [rows, columns]."""

    tensors: tuple[ir.TensorProtocol, ...]
    label: str
    bits: int
    rows: Callable[[int, int], np.ndarray]


class _OtherShape(Exception):
    """A stored weight cannot be laid upon its source."""


def compare_weights(
    model: ir.Model, checkpoint: Checkpoint, progress: Callable[[int], object] | None = None
) -> tuple[list[WeightError], list[str]]:
    """Compare every weight of a package with the checkpoint's, a few rows in memory at a time.

    Args:
        progress: told the elements compared since it was last called.

    Returns:
        The errors, and the names of initializers that stand for a weight but cannot be compared
        with it, as their shape differs.

    Raises:
        ValueError: the package's data file is not one that may be read, such as a hard link.
    """
    errors, left_out, exponents = [], [], _exponents(model)
    for name, stored in _stored_weights(model.graph):
        source = _source(name, checkpoint)
        if source is None:
            continue
        try:
            errors.append(_compare(source, name, stored, _cut(exponents, source.name), progress))
        except _OtherShape:
            left_out.append(name)
        finally:
            for tensor in stored.tensors:
                _release(tensor)
    return errors, left_out


def _compare(
    source: StoredTensor,
    name: str,
    stored: _Stored,
    scaled: Mapping[str, np.ndarray],
    progress: Callable[[int], object] | None,
) -> WeightError:
    count = source.shape[0]
    width = math.prod(source.shape[1:])
    step = max(1, _CHUNK // width)
    energy = noise = largest = 0.0
    worst = math.inf
    for start in range(0, count, step):
        stop = min(start + step, count)
        wanted = read_weight(source.rows(start, stop)).numpy().reshape(-1, width)
        decoded = stored.rows(start, stop)
        if len(decoded) != stop - start or decoded.size < wanted.size:
            raise _OtherShape(f"{name} is {decoded.shape}, expected rows of {width}")
        decoded = decoded.reshape(stop - start, -1)[:, :width]  # a last block may reach beyond
        difference = _unscaled(decoded, scaled, start) - wanted
        energies, noises = (np.einsum("ij,ij->i", a, a) for a in (wanted, difference))
        energy, noise = energy + float(energies.sum()), noise + float(noises.sum())
        largest = max(largest, float(np.abs(np.nan_to_num(difference, nan=np.inf)).max()))
        worst = min(worst, _worst(energies, noises))
        if progress is not None:
            progress(wanted.size)
    return WeightError(
        name=source.name,
        stored=stored.label,
        bits=stored.bits,
        bytes=sum(tensor.nbytes for tensor in stored.tensors),
        shape=source.shape,
        snr_db=snr(energy, noise),
        worst_row_db=worst if width > 1 else snr(energy, noise),
        largest=largest,
    )


def _exponents(model: ir.Model) -> dict[str, dict[str, np.ndarray]]:
    """Of the powers of two that weights were multiplied by: "rows" and "columns", by name."""
    try:
        told = json.loads(model.metadata_props.get(_EQUALIZED, "{}"))
        return {
            name: {
                axis: np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int8)
                for axis, text in axes.items()
            }
            for name, axes in told.items()
        }
    except (ValueError, AttributeError, TypeError, zlib.error) as error:
        raise ValueError(
            f"metadata {_EQUALIZED!r} cannot be read ({error}): export the package again"
        ) from error


def _cut(exponents: Mapping[str, dict[str, np.ndarray]], name: str) -> dict[str, np.ndarray]:
    """Those of a weight, or of the rows [start:stop] that its name ends in."""
    stem, _, rows = name.partition("[")
    found = dict(exponents.get(stem, {}))
    if rows and "rows" in found:
        found["rows"] = found["rows"][int(rows.partition(":")[0]) :]
    return found


def _unscaled(decoded: np.ndarray, scaled: Mapping[str, np.ndarray], first: int) -> np.ndarray:
    """Rows [n, columns] as they were before they were multiplied by powers of two."""
    if "rows" in scaled:
        rows = scaled["rows"][first : first + len(decoded)]
        decoded = np.ldexp(decoded, -rows[:, None])
    if "columns" in scaled:
        decoded = np.ldexp(decoded, -scaled["columns"])
    return decoded


def _worst(energies: np.ndarray, noises: np.ndarray) -> float:
    if not np.isfinite(noises).all():
        return -math.inf
    lossy = noises > 0
    return min(
        (snr(*pair) for pair in zip(energies[lossy].tolist(), noises[lossy].tolist(), strict=True)),
        default=math.inf,
    )


def _source(name: str, checkpoint: Checkpoint) -> StoredTensor | None:
    """The checkpoint's tensor that an initializer's name begins with, cut to the rows it says."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = ".".join(parts[:end])
        if stem in checkpoint.tensors:
            break
    else:
        return None
    found = checkpoint.tensors[stem]
    for part in parts[end:]:
        if part.startswith("rows_"):
            start, stop = part.removeprefix("rows_").split("_")
            rows = found.rows(int(start), int(stop))
            return StoredTensor(**{**vars(rows), "name": f"{stem}[{start}:{stop}]"})
    return found


def _stored_weights(graph: ir.Graph) -> Iterator[tuple[str, _Stored]]:
    """Every initializer that may be a weight, by name, quantized ones with all they consist of."""
    used: set[str] = set()
    for node in graph:
        if node.op_type == "MatMulNBits":
            found = _blocks(node, node.inputs[1], node.inputs[2], _input(node, 3))
        elif node.op_type == "GatherBlockQuantized":
            found = _blocks(node, node.inputs[0], node.inputs[2], _input(node, 3))
        elif node.op_type == "DequantizeLinear":
            found = _linear(node)
        else:
            continue
        if found is None:
            continue
        name, stored = found
        if name not in used:
            yield name, stored
        used.update(str(tensor.name) for tensor in stored.tensors)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        part = name.endswith((".scales", ".zero_points"))  # of a weight in another shape
        if part or name in used or tensor is None:
            continue
        if tensor.dtype.is_floating_point():
            yield name, _plain(name, tensor)


def _blocks(
    node: ir.Node, data: ir.Value | None, scales: ir.Value | None, zeros: ir.Value | None
) -> tuple[str, _Stored] | None:
    """A matrix in blocks along its rows, values unsigned."""
    packed, scale, zero = (_tensor(value) for value in (data, scales, zeros))
    if packed is None or scale is None or data is None:
        return None
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 32)
    count = packed.shape.numpy()[0]

    def rows(start: int, stop: int) -> np.ndarray:
        number = stop - start
        values = _unpack(packed.numpy()[start:stop].reshape(number, -1), bits)
        in_blocks = values.reshape(number, -1, block).astype(np.float32)
        factor = scale.numpy().reshape(count, -1)[start:stop].astype(np.float32)[:, :, None]
        if zero is None:
            middle: np.ndarray | np.float32 = np.float32(1 << (bits - 1))
        else:
            stored = zero.numpy().reshape(count, -1)[start:stop]
            whole = stored if stored.dtype != np.uint8 else _unpack(stored, bits)
            middle = whole[:, : factor.shape[1], None].astype(np.float32)
        decoded = ((in_blocks - middle) * factor).reshape(number, -1)
        columns = node.attributes.get_int("K", decoded.shape[1])
        return decoded[:, :columns]

    tensors = tuple(each for each in (packed, scale, zero) if each is not None)
    return str(data.name), _Stored(tensors, f"{bits} bit, block {block}", bits, rows)


def _linear(node: ir.Node) -> tuple[str, _Stored] | None:
    """A weight behind DequantizeLinear: per tensor, per channel or in blocks."""
    data, scale, zero = _tensor(node.inputs[0]), _tensor(node.inputs[1]), _tensor(_input(node, 2))
    if data is None or scale is None or len(data.shape) == 0:
        return None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    bits, name = int(data.dtype.bitwidth), str(node.inputs[0].name)  # type: ignore[union-attr]
    on_rows = axis % len(data.shape) == (1 if _transposed(name) else 0)  # the axis, oriented

    def rows(start: int, stop: int) -> np.ndarray:
        values = _float32(_oriented(name, data.numpy())[start:stop])

        def spread(tensor: ir.TensorProtocol) -> np.ndarray:
            """Scales or zero points as they are to be broadcast over these rows."""
            parts = _float32(_oriented(name, tensor.numpy()))
            if parts.size == 1:
                return parts.reshape(())
            if block and on_rows:
                return parts[np.arange(start, stop) // block]
            if block:
                return np.repeat(parts[start:stop], block, axis=1)[:, : values.shape[1]]
            return parts[start:stop, None] if on_rows else parts

        return (values - (0 if zero is None else spread(zero))) * spread(scale)

    tensors = tuple(each for each in (data, scale, zero) if each is not None)
    label = f"{bits} bit, block {block}" if block else f"{bits} bit, per channel"
    return name, _Stored(tensors, label, bits, rows)


def _plain(name: str, tensor: ir.TensorProtocol) -> _Stored:
    def rows(start: int, stop: int) -> np.ndarray:
        return _float32(_oriented(name, tensor.numpy())[start:stop])

    bits = int(tensor.dtype.bitwidth)
    label = {"FLOAT": "float32"}.get(tensor.dtype.name, tensor.dtype.name.lower())
    return _Stored((tensor,), label, bits, rows)


def _unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """Values [rows, n * 8 / bits] of bytes [rows, n], the first in the low half."""
    if bits == 8:
        return stored
    return np.stack([stored & 0xF, stored >> 4], axis=-1).reshape(len(stored), -1)


def _transposed(name: str) -> bool:
    return "transposed" in name.split(".")


def _oriented(name: str, array: np.ndarray) -> np.ndarray:
    """As in the checkpoint."""
    return array.T if _transposed(name) else array


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.name == "bfloat16":  # the upper half of a float32
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.asarray(array, np.float32)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The initializer a value is, or was before it was given another shape."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _UNSTORED:
            return None
        value = node.inputs[0]
    return None if value is None else value.const_value


def _release(tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # a view of it is still read: closed with the last
            tensor.release()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
