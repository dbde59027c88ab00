"""What a target is: a name and a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from graph_passes.pipeline import Pass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One value of ``phi4export --target``.

    Attributes:
        name: "<runtime>-<weights>", such as "directml-int4".
        summary: one line for a list of targets.
        provider: ONNX Runtime execution provider that runs the package.
        passes: the whole recipe, in order; nothing is added behind its back.
        max_context: most tokens in one session; None when only memory limits it.
    """

    name: str
    summary: str
    provider: str
    passes: tuple[Pass, ...]
    max_context: int | None = None
