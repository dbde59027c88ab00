"""``--target auto``: the target for the machine that exports."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.util import find_spec

import onnxruntime

from targets import cpu, cuda, directml, qnn
from targets.target import Target

# The first whose provider is there. The CPU comes before OpenVINO, which would run on the same
# processor here without our operators, and a browser's provider is never installed: both by name.
PREFERRED: tuple[Target, ...] = (cuda.INT4, qnn.W4A16, directml.INT4, cpu.INT4)


def choose_target(providers: Sequence[str] | None = None) -> Target:
    """The 4-bit target of the fastest provider there is.

    Args:
        providers: names of execution providers; None asks the installed ONNX Runtime.
    """
    available = _installed() if providers is None else providers
    return next((target for target in PREFERRED if target.provider in available), cpu.INT4)


def _installed() -> list[str]:
    """Providers of the installed ONNX Runtime, and of the package for NPUs beside it.

    On a processor of another kind that package only emulates and compiles.
    """
    found = list(onnxruntime.get_available_providers())
    if platform.machine().lower() in ("arm64", "aarch64") and find_spec("onnxruntime_qnn"):
        found.append(qnn.PROVIDER)
    return found
