"""What a target is: a name and a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graph_passes.pipeline import Pass

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One of several graphs that a package holds; in their order they are the model.

    Attributes:
        name: of its file, without the suffix.
        provider: ONNX Runtime execution provider that runs it.
        passes: what makes it of the graph that the target's passes made. Graphs whose passes begin
            alike share these results, and so their weights.
        tokens: of a call that it takes, shorter ones padded; None takes any.
    """

    name: str
    provider: str
    passes: tuple[Pass, ...]
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Integers:
    """What a target computes in integers where that is asked for.

    Attributes:
        part: of the graph, one of ``graph_passes.keep_part.PARTS``.
        operators: in integers, see ``graph_passes.quantize_activations``.
        islands: all others of that part, which stay floats.
        wide: those whose results stay floats, and what reads them.
    """

    part: str
    operators: tuple[str, ...]
    islands: tuple[str, ...]
    wide: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One value of ``phi4export --target``.

    Attributes:
        name: "<runtime>-<weights>", such as "directml-int4".
        summary: one line for a list of targets.
        provider: ONNX Runtime execution provider that runs the package.
        passes: the whole recipe, in order; nothing is added behind its back.
        cache: element type of keys and values, as the passes make it; one of ``targets.caches``.
        max_context: most tokens in one session; None when only memory limits it.
        session_options: what ONNX Runtime GenAI opens the model with, as genai_config.json has it.
        graphs: where the package holds several; none: the one that the passes make.
        integers: what ``--activations`` can make integers; None: nothing.
    """

    name: str
    summary: str
    provider: str
    passes: tuple[Pass, ...]
    cache: str = "float32"
    max_context: int | None = None
    session_options: Mapping[str, Any] = field(default_factory=lambda: {"provider_options": []})
    graphs: tuple[Graph, ...] = ()
    integers: Integers | None = None

    @property
    def native(self) -> bool:
        """Whether packages carry a library of native operators; only these providers take one."""
        return self.provider in (CPU, CUDA)
