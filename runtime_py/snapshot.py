"""A sequence on disk: one .npz file with every state, the growing ones as far as they are used."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime_py.errors import SnapshotError
from runtime_py.states import MASK, Buffers

if TYPE_CHECKING:
    from runtime_py.session import Session

TOLD, LOGITS = "snapshot", "logits"


def write_snapshot(
    path: str | os.PathLike[str],
    session: Session,
    buffers: Buffers,
    length: int,
    logits: np.ndarray | None,
) -> None:
    """Write a sequence of ``length`` tokens. The file is whole or not there."""
    told = {"fingerprint": session.fingerprint, "length": length}
    arrays = {
        TOLD: np.frombuffer(json.dumps(told).encode(), np.uint8),
        MASK: buffers.mask[:, :length],
        LOGITS: np.zeros(0, np.float32) if logits is None else logits,
    }
    for state, array in zip(session.states, buffers.arrays, strict=True):
        arrays[state.past] = array[state.used(length)]
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_snapshot(
    path: str | os.PathLike[str], session: Session
) -> tuple[Buffers, int, np.ndarray | None]:
    """Read what ``write_snapshot`` wrote: buffers, length, logits.

    Raises:
        SnapshotError: the file is no snapshot, is damaged, or is one of another model.
    """
    again = "save the sequence again with this model"
    try:
        with np.load(path, allow_pickle=False) as stored:
            told = json.loads(stored[TOLD].tobytes())
            if told["fingerprint"] != session.fingerprint:
                raise SnapshotError(f"{path} was saved with another model; {again}")
            length, mask = int(told["length"]), stored[MASK]
            buffers = session.buffers(len(mask), length)
            buffers.fill((stored[state.past] for state in session.states), mask)
            return buffers, length, stored[LOGITS] if length else None
    except FileNotFoundError as error:
        raise SnapshotError(f"{path} does not exist; give a file that save() wrote") from error
    except SnapshotError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = f"{path} is no snapshot or is damaged ({error})"
        raise SnapshotError(f"{reason}; {again}") from error
