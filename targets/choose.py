"""``--target auto``: the target for the machine that exports."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime

from targets import cpu, cuda, directml
from targets.target import Target

# The first whose provider is there. The CPU comes before OpenVINO, which would run on the same
# processor here without our operators, and a browser's provider is never installed: both by name.
PREFERRED: tuple[Target, ...] = (cuda.INT4, directml.INT4, cpu.INT4)


def choose_target(providers: Sequence[str] | None = None) -> Target:
    """The 4-bit target of the fastest provider there is.

    Args:
        providers: names of execution providers; None asks the installed ONNX Runtime.
    """
    available = onnxruntime.get_available_providers() if providers is None else providers
    return next((target for target in PREFERRED if target.provider in available), cpu.INT4)
