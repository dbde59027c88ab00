"""A folder that is there completely or not at all.

It is filled under another name beside its destination, ``.{name}.partial-{process}``, and renamed
when complete. Whatever ends the writing before that removes it; only a killed process leaves one,
and the next writing to the same destination removes that. A package to be replaced stands aside,
as ``.{name}.replaced-{process}``, for the moment of the rename; the next writing brings back what a
process killed just then has left there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = "sambay-package"  # the manifest's "format": this folder is ours to replace

_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


class DestinationError(OSError):
    """A package cannot be written where it was asked for."""


def check_destination(destination: Path, *, force: bool = False, size: int = 0) -> None:
    """Refuse a destination that writing would fail at, before any work; nothing is left behind.

    A package that a killed process had moved aside is back at the destination first.

    Args:
        destination: folder the package will be.
        force: replace a package that is there.
        size: bytes the package will have, if known.

    Raises:
        DestinationError: it exists and may not be replaced, cannot be written, or has no room.
    """
    destination = Path(destination).resolve()
    try:
        _restore_replaced(destination)
        _check_existing(destination, force=force)
        parent = _nearest_existing(destination)
    except DestinationError:
        raise
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise DestinationError(
            f"cannot write {destination}: {error.strerror or error}; choose another folder"
        ) from error
    if not parent.is_dir():
        raise DestinationError(
            f"cannot write {destination}: {parent} is no folder; choose another folder"
        )
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{destination.name}.partial-"))
    except OSError as error:
        raise DestinationError(
            f"cannot write into {parent}: {error.strerror or error}; choose another folder"
        ) from error
    free = shutil.disk_usage(parent).free
    if free < size:
        raise DestinationError(
            f"no room for {destination}: it needs {_gigabytes(size)}, {parent} has "
            f"{_gigabytes(free)} free; choose another folder"
        )


@contextlib.contextmanager
def complete_folder(destination: Path, *, force: bool = False, size: int = 0) -> Iterator[Path]:
    """Fill a folder that appears at its destination only when the block ends without an error.

    Args:
        destination: made with its missing parents.
        force: replace a package that is there, once the new one is complete.
        size: bytes that will be written, if known.

    Yields:
        The folder to fill.

    Raises:
        DestinationError: see ``check_destination``; or the disk is full. Any other error in the
            block is passed on.
    """
    destination = Path(destination).resolve()
    check_destination(destination, force=force, size=size)
    parents = [parent for parent in destination.parents if not parent.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(destination, "partial")
    partial = _sibling(destination, "partial")
    try:
        partial.mkdir()
        yield partial
        _check_existing(destination, force=force)  # it may have come up meanwhile
        _move(partial, destination)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:  # the innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DestinationError(
                f"the disk of {destination} is full: nothing was kept; free some space "
                "or choose another folder"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise DestinationError(
                f"a file of {destination} is larger than its disk or this account may hold: "
                "nothing was kept; choose another folder"
            ) from error
        raise
    _remove_abandoned(destination, "replaced")


def _check_existing(destination: Path, *, force: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DestinationError(f"{destination} is a file, expected a folder to write or no file")
    if any(destination.iterdir()) and not _is_package(destination):
        raise DestinationError(
            f"{destination} holds files and is no package of this program ({MANIFEST} does not say "
            "so): it is not replaced; choose another folder"
        )
    if not force:
        raise DestinationError(f"{destination} exists already: pass --force to replace it")


def _is_package(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _move(partial: Path, destination: Path) -> None:
    """Rename, with the old package out of the way; it comes back if the new one cannot."""
    replaced = _sibling(destination, "replaced")
    try:
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
    except BaseException:
        if partial.exists():  # otherwise Ctrl-C came too late: the new one is in its place
            if replaced.exists():
                replaced.rename(destination)
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sibling(destination: Path, role: str) -> Path:
    return destination.with_name(f".{destination.name}.{role}-{os.getpid()}")


def _restore_replaced(destination: Path) -> None:
    """Bring back a package if a process was killed between moving it aside and its own rename."""
    if destination.exists() or not destination.parent.is_dir():
        return
    aside = [each for each in _abandoned(destination, "replaced") if _is_package(each)]
    if aside:
        max(aside, key=lambda each: each.stat().st_mtime).rename(destination)


def _remove_abandoned(destination: Path, role: str) -> None:
    """Remove what killed processes left of earlier writings."""
    for folder in _abandoned(destination, role):
        shutil.rmtree(folder, ignore_errors=True)


def _abandoned(destination: Path, role: str) -> list[Path]:
    """Siblings of the destination with a role whose process is no more."""
    start, found = f".{destination.name}.{role}-", []
    for folder in destination.parent.iterdir():
        process = folder.name.removeprefix(start)
        # A number equal to ours was a process of another time: numbers are used again.
        if folder.name.startswith(start) and process.isdecimal() and not _runs(int(process)):
            found.append(folder)
    return found


def _runs(process: int) -> bool:
    """Whether another process of this number is running."""
    if process == os.getpid():
        return False
    if sys.platform == "win32":  # os.kill would end it there
        query_limited_information = 0x1000
        handle = ctypes.windll.kernel32.OpenProcess(query_limited_information, False, process)
        return bool(handle and ctypes.windll.kernel32.CloseHandle(handle))
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _nearest_existing(destination: Path) -> Path:
    return next(parent for parent in destination.parents if parent.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
