"""The libraries of native operators that were built with this package, if there are any.

An operator of domain ``ai.sambay`` has a portable body in the model file; a session that registers
the library runs native kernels instead. The answers are the same, within rounding.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
STEMS = {CPU: "_sambay_ops", CUDA: "_sambay_ops_cuda"}
SUFFIXES = (".so", ".dylib", ".dll", ".pyd")


def library_path(provider: str = CPU) -> Path | None:
    """Path of the library for an execution provider of ONNX Runtime.

    None if there is none, it was not built, or ``SAMBAY_NATIVE=0`` switches it off. A session takes
    one of them: each defines the whole domain.

    Register it in a session's options:
    ``options.register_custom_ops_library(str(path))``.
    """
    stem = STEMS.get(provider)
    if stem is None or _switched_off():
        return None
    paths = (Path(__file__).with_name(stem + suffix) for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


@functools.cache
def tell_if_missing() -> None:
    """Say on the log, once, that the library is missing."""
    if _switched_off() or library_path() is not None:
        return
    logging.getLogger(__name__).warning(
        "%s has no native operators, so the slower portable ones run; with a C++ compiler install "
        "phi4export again, in a clone by pip install -e .",
        Path(__file__).parent,
    )


def _switched_off() -> bool:
    return os.environ.get("SAMBAY_NATIVE") == "0"
