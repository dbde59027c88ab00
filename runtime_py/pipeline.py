"""A model of several graphs, run one after the other: what it offers is ONNX Runtime's session.

``manifest.json`` of a package lists its graphs in order. What one gives under a name, a later one
takes under that name. A graph with a number of tokens is of fixed size: a call of one token runs
those for one, any other call those for more, padded on the left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime_py.errors import PackageError
from runtime_py.interrupts import whole
from runtime_py.native import CPU
from runtime_py.states import IDS, LOGITS, MASK, PAST, POSITIONS, PRESENT


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One graph, as the manifest describes it.

    Attributes:
        file: name in the package.
        provider: ONNX Runtime execution provider it was made for.
        tokens: of a call; None takes any.
    """

    file: str
    provider: str
    tokens: int | None


def read_stages(manifest: Path) -> tuple[Stage, ...]:
    """The graphs that a manifest lists, none where the package has one model file.

    Raises:
        PackageError: it lists them in a way that this version does not know.
    """
    try:
        told = json.loads(manifest.read_text(encoding="utf-8")).get("graphs", [])
    except (OSError, ValueError, AttributeError):
        return ()
    try:
        return tuple(
            Stage(file=str(g["file"]), provider=str(g["provider"]), tokens=g["tokens"])
            for g in told
        )
    except (KeyError, TypeError) as error:
        raise PackageError(
            f"{manifest}: 'graphs' is not as expected ({error!r}); export the checkpoint again "
            "with this version of phi4export"
        ) from error


class Pipeline:
    """Several sessions with the interface of one, as far as this package uses it."""

    def __init__(self, stages: tuple[Stage, ...], open_stage: Callable[[Stage], Any]) -> None:
        """Load every graph.

        Args:
            open_stage: makes an ``onnxruntime.InferenceSession`` of one.
        """
        self._stages = [(stage, open_stage(stage)) for stage in stages]
        self._sizes = sorted({stage.tokens for stage in stages if stage.tokens is not None})

    def get_modelmeta(self) -> Any:
        """Metadata, the same in each graph but for the provider."""
        return self._stages[0][1].get_modelmeta()

    def get_providers(self) -> list[str]:
        """Of all graphs, each once."""
        every = (name for _, session in self._stages for name in session.get_providers())
        return list(dict.fromkeys(every))

    def get_inputs(self) -> list[Any]:
        """What the caller gives."""
        return self._unique("get_inputs", lambda name: name in (IDS, MASK) or name.startswith(PAST))

    def get_outputs(self) -> list[Any]:
        """What the caller gets."""
        return self._unique("get_outputs", lambda name: name == LOGITS or name.startswith(PRESENT))

    def _unique(self, method: str, wanted: Callable[[str], bool]) -> list[Any]:
        every = [value for _, session in self._stages for value in getattr(session, method)()]
        return list({value.name: value for value in every if wanted(value.name)}.values())

    def io_binding(self) -> Binding:
        """What a call reads and writes, to be filled in."""
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        """Run one call. Ctrl-C waits for its end: some states would be new, some old."""
        with whole():
            self._run(binding)

    def _run(self, binding: Binding) -> None:
        ids = binding.inputs[IDS].numpy()
        tokens = next((size for size in self._sizes if size >= ids.shape[1]), None)
        if tokens is None:
            raise ValueError(f"{ids.shape[1]} tokens, this package takes {self._sizes[-1]} a call")
        padding = tokens - ids.shape[1]
        mask = _trimmed(binding.inputs[MASK].numpy(), ids.shape[1], padding)
        values = dict(binding.inputs)
        values[IDS] = _value(np.pad(ids, ((0, 0), (padding, 0))))
        values[MASK] = _value(mask)
        values[POSITIONS] = _value(np.zeros((1, tokens), np.int64))
        for stage, session in self._stages:
            if stage.tokens in (None, tokens):
                _run_stage(session, values, binding.outputs)


@dataclass
class Binding:
    """Names to memory, as ONNX Runtime's own binding holds them."""

    inputs: dict[str, ort.OrtValue] = field(default_factory=dict)
    outputs: dict[str, ort.OrtValue] = field(default_factory=dict)

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        """Read an input from an array, which is not copied."""
        self.inputs[name] = _value(array)

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        """Read an input from here."""
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: ort.OrtValue) -> None:
        """Write an output to here."""
        self.outputs[name] = value

    def clear_binding_inputs(self) -> None:
        """Forget all inputs."""
        self.inputs.clear()


def _run_stage(
    session: Any, values: dict[str, ort.OrtValue], outputs: dict[str, ort.OrtValue]
) -> None:
    """Run a graph; what it gives is added to the values, or written where it is bound."""
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, values[value.name])
    # States in place: on the processor only, others copy in and out as they like.
    direct = session.get_providers()[0] == CPU
    names = [value.name for value in session.get_outputs()]
    for name in names:
        if direct and name in outputs:
            binding.bind_ortvalue_output(name, outputs[name])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        if name not in outputs:
            values[name] = value
        elif not direct:
            outputs[name].numpy()[...] = value.numpy()


def _value(array: np.ndarray) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _trimmed(mask: np.ndarray, tokens: int, padding: int) -> np.ndarray:
    """The mask up to this call's last column, with columns of padding before its tokens."""
    real = np.flatnonzero(mask.any(axis=0))
    end = int(real[-1]) + 1
    earlier, now = np.split(mask[:, :end], [end - tokens], axis=1)
    return np.hstack([earlier, np.zeros((len(mask), padding), mask.dtype), now])
