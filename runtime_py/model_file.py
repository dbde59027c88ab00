"""Read what a model file says of itself without loading it.

An ONNX file is a protobuf message. Its metadata are entries of field 14 at the top level, each a
message of two strings; every other field is skipped by its length, so weights are not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_METADATA = 14  # ModelProto.metadata_props
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_metadata_props(path: Path) -> dict[str, str]:
    """Metadata of a model file; empty if it is no ONNX file or is cut off."""
    found: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            while (field := _next_field(file)) is not None:
                number, length = field
                if number != _METADATA:
                    file.seek(length, os.SEEK_CUR)
                    continue
                entry = _strings(file.read(length))
                found[entry.get(1, "")] = entry.get(2, "")
    except (OSError, ValueError):
        return {}
    return found


def _next_field(file: BinaryIO) -> tuple[int, int] | None:
    """Number and length of the next field; None at the end of the file."""
    tag = _varint(file)
    if tag is None:
        return None
    kind = tag & 7
    if kind == _BYTES:
        length = _varint(file)
        if length is None:
            raise ValueError("the file ends within a field")
        return tag >> 3, length
    if kind == _VARINT:
        _varint(file)
        return tag >> 3, 0
    if kind in (_FIXED64, _FIXED32):
        return tag >> 3, 8 if kind == _FIXED64 else 4
    raise ValueError(f"no protobuf message: wire type {kind}")


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("no protobuf message: a number of more than 10 bytes")


def _strings(data: bytes) -> dict[int, str]:
    """The string fields of a small message, by number."""
    found, position = {}, 0
    while position + 1 < len(data):
        number, length, shift = data[position] >> 3, 0, 0
        position += 1
        while True:
            length |= (data[position] & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if data[position - 1] < 0x80:
                break
        found[number] = data[position : position + length].decode("utf-8", "replace")
        position += length
    return found
