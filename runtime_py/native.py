"""The library of native operators that was built with this package, if there is one.

An operator of domain ``ai.sambay`` has a portable body in the model file; a session that registers
the library runs native kernels instead. The answers are the same, within rounding.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

STEM = "_sambay_ops"
SUFFIXES = (".so", ".dylib", ".dll", ".pyd")


def library_path() -> Path | None:
    """Path of the library; None if it was not built, or if ``SAMBAY_NATIVE=0`` switches it off.

    Register it in a session's options:
    ``options.register_custom_ops_library(str(path))``.
    """
    if _switched_off():
        return None
    for path in sorted(Path(__file__).parent.glob(f"{STEM}*")):
        if path.suffix in SUFFIXES:
            return path
    return None


@functools.cache
def tell_if_missing() -> None:
    """Say on the log, once, that the library was not built."""
    if _switched_off() or library_path() is not None:
        return
    logging.getLogger(__name__).warning(
        "the native operators were not built, so the slower portable ones run; "
        "install a C++ compiler and install phi4export again to have them"
    )


def _switched_off() -> bool:
    return os.environ.get("SAMBAY_NATIVE") == "0"
