"""What every linear layer is fed on a text: the second moments of its inputs.

A quantizer that compensates errors needs, of each linear layer, the mean of x x^T over the tokens
of a text. They are collected from the float model one layer at a time, all texts through a layer
before the next is loaded, and kept in a folder: an interrupted collection goes on at the layer it
was at. At the published size memory holds one layer, its moments and what one text needs on its way
(2.5 GB), and of every token 10 KB, behind the memory layer 40; the folder takes 18 GB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from export.checkpoint import Checkpoint
from export.model import Flow, Layer
from export.reference_run import ReferenceRun
from export.tensors import EMBEDDING, HEAD
from export.weights import read_weight

CHUNK = 1024  # tokens of a text that are run as a text of their own

_INDEX = "calibration.json"
_FEWEST = 128  # tokens
_SIDE = 1280  # of the squares that symmetric moments are added in


class CalibrationError(ValueError):
    """A text or a folder that no calibration can be taken from."""


@dataclass(frozen=True)
class LayerInputs:
    """What one linear layer was fed.

    Attributes:
        path: of the second moments.
    """

    path: Path

    def second_moments(self) -> np.ndarray:
        """Mean of x x^T over the tokens, [in, in] float32."""
        moments: np.ndarray = np.load(self.path)
        return moments

    def mean_squares(self) -> np.ndarray:
        """Mean of x squared, [in] float32."""
        moments = np.load(self.path, mmap_mode="r")
        return np.diagonal(moments).copy()


class Calibration(Mapping[str, LayerInputs]):
    """Inputs of linear layers by the name of their weight, from a complete folder.

    A weight's rows have its inputs: the name may end in ``.rows_<first>_<end>``.
    """

    def __init__(self, folder: Path, layers: Sequence[str], *, tokens: int, digest: str) -> None:
        self._folder, self._names = folder, layers
        self._tokens, self._digest = tokens, digest

    def __getitem__(self, name: str) -> LayerInputs:
        """Inputs of the layer of a weight, or of some of its rows."""
        stem = name.partition(".rows_")[0]
        if stem not in self._names:
            raise KeyError(name)
        return LayerInputs(_moments_path(self._folder, stem))

    def __iter__(self) -> Iterator[str]:
        """Names of whole weights."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count of whole weights."""
        return len(self._names)

    def __repr__(self) -> str:
        """Short, without a path: it is printed into manifests."""
        return f"Calibration(tokens={self._tokens}, digest={self._digest[:12]!r})"


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        CalibrationError: it is missing, no UTF-8 or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {path} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise CalibrationError(f"calibration file {path} is empty: give text of the kind it is for")
    return text


def check_length(ids: Sequence[int]) -> None:
    """Refuse a text that is too short to tell anything.

    Raises:
        CalibrationError: it is.
    """
    if len(ids) < _FEWEST:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, expected {_FEWEST} or more: "
            "a few thousand are a good number"
        )


def collect(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    folder: Path,
    *,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Run a text through the float model and keep what its linear layers are fed.

    Args:
        ids: tokens of the text; every ``CHUNK`` of them are a text of their own.
        folder: is made if need be. A collection of the same text and checkpoint that was
            interrupted there goes on; a complete one is taken as it is.
        progress: told 1 after every layer.

    Raises:
        CalibrationError: fewer tokens than can tell anything, or the folder holds another
            calibration.
    """
    check_length(ids)
    collection = _Collection(checkpoint, np.asarray(ids, np.int64), folder)
    return collection.run(progress or (lambda _: None))


class _Collection:
    """A collection under way in a folder."""

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, folder: Path) -> None:
        self._reference, self._ids, self._folder = ReferenceRun(checkpoint), ids, folder
        self._digest = _digest(checkpoint, ids)
        folder.mkdir(parents=True, exist_ok=True)
        self._done = 0  # layers
        self._names: list[str] = []
        if (folder / _INDEX).exists():
            self._resume()

    def run(self, progress: Callable[[int], object]) -> Calibration:
        layers = self._reference.config.num_hidden_layers
        progress(self._done)
        if self._done < layers:
            flows = self._flows()
            for index in range(self._done, layers):
                self._collect_layer(index, flows)
                if index + 1 < layers:
                    _save_flows(self._flows_path(index + 1), flows)
                else:
                    self._collect_head(flows)
                self._write_index(index + 1)
                progress(1)
        return Calibration(self._folder, self._names, tokens=len(self._ids), digest=self._digest)

    def _collect_layer(self, index: int, flows: list[Flow]) -> None:
        layer = self._reference.load(index)
        names = _weight_names(layer)
        with torch.no_grad(), _Recorder(names) as recorder:
            for flow in flows:
                self._reference.advance(index, layer, flow)
        for name, moments in recorder.moments.items():
            self._keep(f"model.layers.{index}.{name}", moments)

    def _collect_head(self, flows: list[Flow]) -> None:
        checkpoint, config = self._reference.checkpoint, self._reference.config
        scale, shift = (
            read_weight(checkpoint.tensors[f"model.final_layernorm.{part}"])
            for part in ("weight", "bias")
        )
        moments = torch.zeros(config.hidden_size, config.hidden_size)
        for flow in flows:
            normed = functional.layer_norm(
                flow.hidden[0], scale.shape, scale, shift, config.layer_norm_eps
            )
            _add_products(moments, normed)
        self._keep(EMBEDDING if checkpoint.tied_head else HEAD, moments)

    def _keep(self, name: str, moments: Tensor) -> None:
        moments /= len(self._ids)
        for start in range(0, len(moments), _SIDE):  # what was left out
            part = slice(start, start + _SIDE)
            moments[start + _SIDE :, part] = moments[part, start + _SIDE :].T
        with _replacing(_moments_path(self._folder, name)) as path, path.open("wb") as file:
            np.save(file, moments.numpy())
        self._names.append(name)

    def _flows(self) -> list[Flow]:
        if self._done:
            return _load_flows(self._flows_path(self._done))
        starts = range(0, len(self._ids), CHUNK)
        return [self._reference.begin(self._ids[None, start : start + CHUNK]) for start in starts]

    def _flows_path(self, layers: int) -> Path:
        """Of the flows behind so many layers: never another's, whatever an interrupt leaves."""
        return self._folder / f"flows_{layers}.pt"

    def _resume(self) -> None:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            found, self._done, self._names = index["digest"], index["layers"], index["weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{self._folder / _INDEX} cannot be read ({error}): give an empty folder"
            ) from error
        if found != self._digest:
            raise CalibrationError(
                f"{self._folder} holds the calibration of another text or checkpoint: "
                "give another folder, or delete this one"
            )

    def _write_index(self, layers: int) -> None:
        index = {"digest": self._digest, "layers": layers, "weights": self._names}
        with _replacing(self._folder / _INDEX) as path:
            path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        self._done = layers
        for path in self._folder.glob("flows_*.pt*"):
            if path != self._flows_path(layers):
                path.unlink()


class _Recorder(TorchFunctionMode):
    """Sums x x^T of every functional.linear by a known weight, or by some rows of one."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names  # by the address of the weight's memory
        self._seen: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            name = self._names.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                self._add(name, args[0])
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, x: Tensor) -> None:
        if self._seen.get(name) is x:  # queries, then keys and values, of the same input
            return
        self._seen[name] = x
        rows = x.detach().reshape(-1, x.shape[-1])
        if name not in self.moments:
            self.moments[name] = torch.zeros(rows.shape[1], rows.shape[1])
        _add_products(self.moments[name], rows)


def _add_products(moments: Tensor, rows: Tensor) -> None:
    """Add x x^T of every row; of what stands twice, being symmetric, only the upper squares."""
    for start in range(0, len(moments), _SIDE):
        part = slice(start, start + _SIDE)
        moments[part, start:].addmm_(rows[:, part].T, rows[:, start:])


def _weight_names(layer: Layer) -> dict[int, str]:
    """Names of a layer's matrices by the address of their memory."""
    return {
        parameter.untyped_storage().data_ptr(): name
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 2
    }


def _digest(checkpoint: Checkpoint, ids: np.ndarray) -> str:
    """Of the text and of the checkpoint's headers, sizes and times."""
    digest = hashlib.sha256(ids.tobytes())
    digest.update(checkpoint.config.to_json().encode())
    for path in sorted({tensor.path for tensor in checkpoint.tensors.values()}):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _moments_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _save_flows(path: Path, flows: list[Flow]) -> None:
    with _replacing(path) as partial:
        torch.save([vars(flow) for flow in flows], partial)


def _load_flows(path: Path) -> list[Flow]:
    try:
        flows = torch.load(path, weights_only=True)
    except Exception as error:  # torch and pickle raise what they like
        raise CalibrationError(
            f"{path} cannot be read ({error}): delete its folder and start anew"
        ) from error
    return [Flow(**flow) for flow in flows]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write beside, then rename: an interrupt leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.part")
    yield partial
    os.replace(partial, path)
