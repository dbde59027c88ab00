"""Measure a package against the float reference: layers, states, next tokens, weights.

Both run layer by layer over the same texts: one layer of the reference in float32 and one of the
package are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from export.checkpoint import Checkpoint
from export.model import Flow
from export.reference_run import ReferenceRun
from export.states import layer_states
from export.verify.compare import Error, TokenQuality, error_of
from export.verify.package_slices import Slice, SlicedPackage, Track

Stage = Callable[[str], object]  # told what is being measured


@dataclass(frozen=True)
class Sample:
    """Tokens to measure on.

    Attributes:
        name: "random tokens" or the text's.
        ids: [1, tokens] int64.
    """

    name: str
    ids: np.ndarray


@dataclass(frozen=True)
class LayerError:
    """A layer's output on a sample.

    Attributes:
        error: of the package's stream after this layer.
        own: of this layer alone, fed with the reference's stream.
    """

    sample: str
    layer: int
    kind: str
    error: Error
    own: Error


@dataclass(frozen=True)
class StateError:
    """A state after the last token of a sample; error None where the shapes cannot be compared."""

    sample: str
    state: str
    error: Error | None


@dataclass(frozen=True)
class Measured:
    """Everything measured by running."""

    layers: list[LayerError]
    states: list[StateError]
    tokens: dict[str, TokenQuality]  # by sample


@dataclass
class _Run:
    """A sample on its way: through the reference, the package, and layer by layer."""

    sample: Sample
    reference: Flow
    package: Track
    alone: Track


def measure(
    checkpoint: Checkpoint, package: SlicedPackage, samples: list[Sample], stage: Stage
) -> Measured:
    """Run samples through both.

    Raises:
        SliceError: ONNX Runtime refuses a part of the package.
    """
    reference = ReferenceRun(checkpoint)
    runs = [
        _Run(sample, reference.begin(sample.ids), Track(sample.ids), Track(sample.ids))
        for sample in samples
    ]
    measured = Measured([], [], {})
    embedding, *layers, head = package.slices
    _run_embedding(package, embedding, runs)
    for part in layers:
        stage(f"layer {part.layer} of {len(layers)}")
        _run_layer(reference, package, part, runs, measured)
    stage("next tokens")
    session = package.open(head)
    for run in runs:
        measured.tokens[run.sample.name] = _next_tokens(reference, package, session, run)
    return measured


def _run_embedding(package: SlicedPackage, part: Slice, runs: list[_Run]) -> None:
    session = package.open(part)
    for run in runs:
        package.run(part, session, run.package)


def _run_layer(
    reference: ReferenceRun,
    package: SlicedPackage,
    part: Slice,
    runs: list[_Run],
    measured: Measured,
) -> None:
    session, layer = package.open(part), reference.load(part.layer)
    for run in runs:
        run.alone.stream = run.reference.hidden.numpy().astype(_dtype(run.package))
        states = reference.run(part.layer, layer, run.reference)
        package.run(part, session, run.package)
        package.run(part, session, run.alone)
        wanted = run.reference.hidden.numpy()
        measured.layers.append(
            LayerError(
                sample=run.sample.name,
                layer=part.layer,
                kind=reference.config.layer_kind(part.layer),
                error=error_of(wanted, _stream(run.package)),
                own=error_of(wanted, _stream(run.alone)),
            )
        )
        measured.states.extend(_state_errors(reference, part, states, run))


def _state_errors(
    reference: ReferenceRun, part: Slice, states: tuple[Tensor, ...], run: _Run
) -> list[StateError]:
    if not states:
        return []
    found = []
    for state, wanted in zip(layer_states(reference.config, part.layer), states, strict=True):
        given = run.package.states.get(state.present)
        scale = run.package.states.get(f"{state.present}_scale")
        if given is not None and scale is not None:  # a cache of 8 bits
            given = given * scale.astype(np.float32)[..., None]
        comparable = given is not None and given.shape == wanted.shape
        error = error_of(wanted.numpy(), given) if comparable and given is not None else None
        found.append(StateError(run.sample.name, state.present.removeprefix("present."), error))
    return found


def _next_tokens(
    reference: ReferenceRun, package: SlicedPackage, session: object, run: _Run
) -> TokenQuality:
    quality = TokenQuality()
    ids = run.sample.ids[0]
    for start, logits in package.logits(session, _stream(run.package)):
        stop = start + len(logits)
        wanted = reference.logits(run.reference.hidden[0, start:stop]).numpy()
        quality.add(wanted, logits, ids[start + 1 : stop + 1].tolist())
    return quality


def _stream(track: Track) -> np.ndarray:
    assert track.stream is not None
    return track.stream


def _dtype(track: Track) -> np.dtype:
    return _stream(track).dtype
