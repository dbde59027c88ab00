"""A checkpoint on disk, read lazily: headers now, tensors when they are written.

Nothing here holds a weight in memory. A folder is checked whole, against its own headers and
against the config, before any work is spent on it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.config import ConfigError, SambaYConfig, read_config, read_json_object
from export.tensors import EMBEDDING, HEAD, Shape, expected_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_CHUNK = 4 << 20  # bytes read at once by find_non_finite: stays in a processor's cache


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not of the shape its config says."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        dtype: "F32", "F16" or "BF16", as safetensors names them.
        offset: first byte, counted from the start of the file; aligned to nothing.
        nbytes: bytes from there.
    """

    name: str
    path: Path
    dtype: str
    shape: Shape
    offset: int
    nbytes: int

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows start .. stop-1 as a tensor of their own: a row's bytes lie together."""
        row = self.nbytes // self.shape[0]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row,
            nbytes=(stop - start) * row,
        )

    def to_ir(self) -> ir.ExternalTensor:
        """The same bytes as an ONNX tensor of the same name, mapped only when read."""
        # No base_dir: a hub snapshot is a folder of links, which onnx_ir would refuse.
        return ir.ExternalTensor(
            self.path.absolute(),
            self.offset,
            self.nbytes,
            DTYPES[self.dtype],
            shape=ir.Shape(self.shape),
            name=self.name,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint folder.

    Attributes:
        tensors: by name, in the order of files and offsets.
    """

    folder: Path
    config: SambaYConfig
    tensors: dict[str, StoredTensor]

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tied_head(self) -> bool:
        """Whether the embedding is the output head too."""
        return HEAD not in self.tensors


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or fetch one from the Hugging Face hub, and check its headers.

    Args:
        source: a folder, or a hub id such as "owner/name" (needs huggingface_hub).

    Raises:
        CheckpointError: nothing is there, or the files contradict the config or each other.
        ConfigError: config.json does not describe a model this project can export.
    """
    folder = _find_folder(source)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    _check_against_config(folder, config, tensors)
    return Checkpoint(folder=folder, config=config, tensors=tensors)


def find_non_finite(
    checkpoint: Checkpoint, progress: Callable[[int], object] | None = None
) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity; None where all are finite.

    Reads every weight once, a few MB at a time.

    Args:
        progress: called with the number of bytes just read.

    Raises:
        CheckpointError: a file ends before its header says.
    """
    buffer = memoryview(bytearray(_CHUNK))
    for path, tensors in itertools.groupby(checkpoint.tensors.values(), lambda each: each.path):
        with path.open("rb", buffering=0) as file:
            for tensor in tensors:
                file.seek(tensor.offset)
                left = tensor.nbytes
                while left:
                    chunk = buffer[: min(left, _CHUNK)]
                    _fill(chunk, file, path)
                    if _holds_non_finite(chunk, tensor.dtype):
                        return tensor.name
                    left -= len(chunk)
                    if progress is not None:
                        progress(len(chunk))
    return None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of one safetensors file lie, in the order of their bytes.

    Raises:
        CheckpointError: the header contradicts itself or the size of the file.

    Source: the safetensors format: 8 bytes of little-endian length, JSON, then the tensors
    without a gap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its header would take "
                    f"{length} bytes, the file has {size}: download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"a JSON {type(header).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {path} is no safetensors header ({error}): download it again"
        ) from error
    header.pop("__metadata__", None)
    tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _find_folder(source: str | Path) -> Path:
    folder = Path(source)
    if not str(source):
        raise CheckpointError("the checkpoint is an empty name: give a folder or a hub id")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file, expected a folder: give the folder it is in")
    # "owner/name" is a folder that was mistyped where a folder "owner" exists.
    if isinstance(source, Path) or (folder.parent.exists() and str(folder.parent) != "."):
        raise _missing(source)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is None:
        raise _missing(source)
    return _fetch(source)


def _missing(source: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{source} does not exist: give a checkpoint folder or a hub id such as owner/name"
    )


def _fetch(hub_id: str) -> Path:
    """Download what an export reads of a hub repository, or find it in the local cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{hub_id} is no folder here, and a hub id needs huggingface_hub: "
            "pip install huggingface_hub, or give a checkpoint folder"
        ) from None
    try:
        patterns = ["*.safetensors", "*.json", "merges.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises those of several network libraries
        cause = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise CheckpointError(
            f"cannot fetch {hub_id} from the hub ({cause.strip()}): "
            "check name and network, or give a checkpoint folder"
        ) from error


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Headers of all files, checked against the index where there is one."""
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: "
            "give a checkpoint folder with safetensors weights"
        )
    weight_map, total_size = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = folder / shard
        if not path.exists():
            raise CheckpointError(f"{path} is missing, {INDEX_FILE} lists it: download it again")
        held = read_header(path)
        for name in held:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path} holds {name}, which {INDEX_FILE} does not place there: "
                    "download index and shards again"
                )
        tensors |= held
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index} places {name} in {shard}, which does not hold it: "
                "download index and shards again"
            )
    found = sum(tensor.nbytes for tensor in tensors.values())
    if total_size is not None and total_size != found:
        raise CheckpointError(
            f"{index} says total_size {total_size}, the shards hold {found} bytes: "
            "download index and shards again"
        )
    return tensors


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """Shard of each tensor, and the bytes they should have together."""
    try:
        content = read_json_object(index)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{index} has no weight_map of names to files: download it again")
    for name, shard in weight_map.items():
        # A shard lies beside its index, whatever separators the file's author may use.
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*", shard):
            raise CheckpointError(
                f"{index} places {name} in {shard!r}, expected the name of a file beside it: "
                "download it again"
            )
    return weight_map, metadata.get("total_size")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the same key twice would let two readers see different tensors."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Check one entry of a header. ``start``: first byte after the header."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{path}: the header's entry of {name} lacks dtype, shape or data_offsets: "
            "download it again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype}, expected {', '.join(DTYPES)}: "
            "save the checkpoint in one of these"
        )
    if not _all_counts(shape) or not _all_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: {name} has shape {shape} and data_offsets {offsets}, "
            "expected lists of counts, two in the second: download it again"
        )
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: {name} spans {offsets[1] - offsets[0]} bytes, "
            f"shape {shape} in {dtype} takes {nbytes}: download it again"
        )
    return StoredTensor(
        name=name,
        path=path,
        dtype=dtype,
        shape=tuple(shape),
        offset=start + offsets[0],
        nbytes=nbytes,
    )


def _all_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """The tensors must follow each other without gap or overlap, to the file's end."""
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap"
            raise CheckpointError(
                f"{path}: {tensor.name} starts at byte {tensor.offset}, expected {position}: "
                f"it {fault}: download it again"
            )
        position += tensor.nbytes
    if position != size:
        fault = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{path} is {fault}: it has {size} bytes, expected {position}: download it again"
        )


def _check_against_config(
    folder: Path, config: SambaYConfig, tensors: dict[str, StoredTensor]
) -> None:
    """Names and shapes must be those that the config implies."""
    layers = config.num_hidden_layers
    if layers > len(tensors):  # no list of what that many layers need is made
        raise CheckpointError(
            f"{folder} holds {len(tensors)} tensors, config.json says {layers} layers: "
            "the weights and the config are of different models"
        )
    expected = expected_tensors(config)
    tied = read_json_object(folder / "config.json").get("tie_word_embeddings", True)
    # A head of its own may be stored though the config says tied; it is then the one to use.
    if HEAD in tensors or not tied:
        expected[HEAD] = expected[EMBEDDING]
    _refuse(folder, "lacks", [name for name in expected if name not in tensors])
    _refuse(folder, "holds the unexpected", [name for name in tensors if name not in expected])
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].path}: {name} has shape {list(tensors[name].shape)}, "
                f"config.json implies {list(shape)}: "
                "the weights and the config are of different models"
            )


def _refuse(folder: Path, fault: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{folder} {fault} {', '.join(names[:3])}{more}: "
            "the weights and the config are of different models"
        )


def _fill(chunk: memoryview, file: Any, path: Path) -> None:
    filled = 0
    while filled < len(chunk):
        count = file.readinto(chunk[filled:])
        if not count:
            raise CheckpointError(f"{path} became shorter while it was read: download it again")
        filled += count


def _holds_non_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether any number has all exponent bits set, seen without converting a float.

    Of the bit patterns, read as signed integers, only a positive infinity or NaN reaches the
    infinity's; read as unsigned ones, only a negative infinity or NaN reaches the negative
    infinity's. Two maxima cost less than masking each element.
    """
    width = ITEM_SIZES[dtype]
    infinity = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    sign = 1 << (8 * width - 1)
    signed = np.frombuffer(chunk, f"<i{width}")
    return bool(signed.max() >= infinity or signed.view(f"<u{width}").max() >= sign | infinity)
