"""A package cut into its layers, each run alone: so a model larger than memory can be measured.

A slice is the part of a graph between two values of the residual stream. Cutting changes no node:
every slice reads its weights from the package's own file and runs as it does in the whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"
_CPU = "CPUExecutionProvider"
_PAST, _PRESENT = "past_key_values.", "present."
_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")
_HEAD_TOKENS = 128  # of one run of the head: 100 MB of logits at a vocabulary of 200,064

# Nodes between a linear layer and the sum it ends in, which keep one number for one number.
_PASSED = {"Cast", "Reshape", "QuantizeLinear", "DequantizeLinear", "Identity", "Transpose"}
_SKIP_NORMS = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class SliceError(ValueError):
    """A package that cannot be cut into layers."""


@dataclass(frozen=True)
class Slice:
    """A part of the graph.

    Attributes:
        layer: number of the layer; -1 for the embedding, the count of layers for the head.
        stream: the residual value it starts from; None for the embedding.
        target: the value it ends in.
        carried_in, carried_out: values besides that pass from slice to slice.
        graph_inputs: inputs of the whole graph that it reads.
        presents: states it writes.
        step: most tokens of one run; None for any number.
    """

    layer: int
    stream: str | None
    target: str
    carried_in: tuple[str, ...]
    carried_out: tuple[str, ...]
    graph_inputs: tuple[str, ...]
    presents: tuple[str, ...]
    step: int | None


@dataclass
class Track:
    """One text on its way through the slices.

    Attributes:
        ids: [1, tokens] int64.
        stream: [1, tokens, hidden], what the latest slice gave.
        carried: [1, tokens, ...] by name.
        states: by the name of the present output, as the last token left them.
    """

    ids: np.ndarray
    stream: np.ndarray | None = None
    carried: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)


class SlicedPackage:
    """A package's graph, cut.

    Attributes:
        slices: embedding, layers, head, in order.
        config: the metadata ``sambay.config``.
    """

    def __init__(
        self, model: ir.Model, folder: Path, *, library: Path | None, threads: int | None = None
    ) -> None:
        """Cut a graph whose weights lie in one folder.

        Args:
            model: a package's, or as traced.
            folder: of the files with its weights.
            library: of native operators, as a session of the whole would register it; used for
                a package for processors.
            threads: of one operator; None lets ONNX Runtime choose.

        Raises:
            SliceError: its layers cannot be told apart.
        """
        self._model, self._folder, self._threads = model, folder, threads
        metadata = model.metadata_props
        # Native operators take what packages for a processor hold; others run by their bodies.
        self._library = library if metadata.get("sambay.provider", _CPU) == _CPU else None
        self.config = json.loads(metadata["sambay.config"])
        most = int(metadata["sambay.max_tokens"]) if "sambay.max_tokens" in metadata else None
        every = metadata.get("sambay.logits") == "all"
        self.slices = _cut(model.graph, self.config, every, most)

    @classmethod
    def of_file(
        cls, path: Path, *, library: Path | None, threads: int | None = None
    ) -> SlicedPackage:
        """A package's model file, beside which its weights lie; these are not read.

        Raises:
            SliceError: this is no graph of ours, or its layers cannot be told apart.
        """
        try:
            model = ir.load(path)
        except Exception as error:  # protobuf's and onnx_ir's errors share no narrower base
            raise SliceError(f"{path} cannot be read as an ONNX model ({error})") from error
        if "sambay.config" not in model.metadata_props:
            raise SliceError(f"{path} has no metadata sambay.config: give a package of phi4export")
        return cls(model, path.parent, library=library, threads=threads)

    @classmethod
    def of_graph(
        cls, model: ir.Model, *, library: Path | None, threads: int | None = None
    ) -> SlicedPackage:
        """A graph as traced, whose weights lie in the checkpoint's files.

        Raises:
            SliceError: these lie in several folders.
        """
        files = {
            os.path.realpath(value.const_value.path)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        folders = {os.path.dirname(file) for file in files}
        if len(folders) > 1:
            raise SliceError(f"the checkpoint's files lie in several folders: {sorted(folders)}")
        return cls(model, Path(folders.pop() if folders else "."), library=library, threads=threads)

    @property
    def model(self) -> ir.Model:
        """The whole graph; weights are read when asked for."""
        return self._model

    @property
    def cache_bits(self) -> int:
        """Fewest bits that keys and values are kept in."""
        caches = [value for value in self._model.graph.inputs if _CACHE.fullmatch(value.name or "")]
        return min(int(value.dtype.bitwidth) for value in caches if value.dtype is not None)

    def open(self, part: Slice, watched: Iterable[str] = ()) -> ort.InferenceSession:
        """Load a slice, with its weights, into ONNX Runtime.

        Args:
            watched: values inside that are outputs, too; those of other slices are left out.

        Raises:
            SliceError: ONNX Runtime refuses it.
        """
        inputs = [*part.graph_inputs, *part.carried_in, *([part.stream] if part.stream else [])]
        outputs = [part.target, *part.presents, *part.carried_out]
        graph = ir.convenience.extract(self._model.graph, inputs, outputs)
        inside = {value.name: value for node in graph for value in node.outputs}
        for name in watched:
            if name in inside and name not in outputs:
                graph.outputs.append(inside[name])
        if part.layer == self.config["num_hidden_layers"]:
            # The head takes any number of tokens, whatever a call of the package ends with.
            for value in (graph.inputs[-1], *inside.values()):
                value.shape = None
        functions = list(self._model.functions.values())
        proto = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version, functions=functions))
        _name_files(proto)
        try:
            return ort.InferenceSession(
                proto.SerializeToString(),
                self._options(proto.graph.node),
                providers=[_CPU],
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise self._refused(part, error) from error

    def _refused(self, part: Slice, error: Exception) -> SliceError:
        reason = " ".join(str(error).split())[:300]
        return SliceError(f"layer {part.layer} of {self._folder} cannot run: {reason}")

    def _options(self, nodes: Iterable[object]) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        folder = str(self._folder.absolute())
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
        if not any(getattr(node, "op_type", "") == "MatMulNBits" for node in nodes):
            # A second, rearranged copy of float weights changes speed only, and a float32 head
            # takes 2 GB. Quantized products compute otherwise without theirs.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def run(
        self,
        part: Slice,
        session: ort.InferenceSession,
        track: Track,
        see: Callable[[str, np.ndarray], object] | None = None,
    ) -> None:
        """Move a track through a slice that is no head: its stream, carried values, states.

        Args:
            see: given the name and the numbers of every output, call by call.
        """
        streams: list[np.ndarray] = []
        carried: dict[str, list[np.ndarray]] = {name: [] for name in part.carried_out}
        states = self._zero_states(session, track.ids.shape[1])
        for start, stop in _steps(track.ids.shape[1], part.step):
            feeds = self._feeds(part, session, track, start, stop) | states
            try:
                results = session.run(None, feeds)
            except Exception as error:  # as above
                raise self._refused(part, error) from error
            found = dict(zip(_names(session.get_outputs()), results, strict=True))
            if see is not None:
                for name, numbers in found.items():
                    see(name, numbers)
            streams.append(found[part.target])
            for name in part.carried_out:
                if name not in part.presents:
                    carried[name].append(found[name])
            for name in part.presents:
                states[name.replace(_PRESENT, _PAST, 1)] = found[name]
        track.stream = np.concatenate(streams, axis=1)
        for name in part.presents:
            # A copy: what a session returns keeps all memory of the session.
            track.states[name] = states[name.replace(_PRESENT, _PAST, 1)].copy()
        for name, pieces in carried.items():
            if pieces:
                track.carried[name] = np.concatenate(pieces, axis=1)

    def logits(
        self, session: ort.InferenceSession, stream: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the head makes of a stream [1, tokens, hidden].

        Yields:
            The first token's index and float32 [some tokens, vocab].
        """
        name = session.get_inputs()[-1].name
        for start in range(0, stream.shape[1], _HEAD_TOKENS):
            part = np.ascontiguousarray(stream[:, start : start + _HEAD_TOKENS])
            yield start, session.run([_LOGITS], {name: part})[0][0].astype(np.float32)

    def _zero_states(self, session: ort.InferenceSession, tokens: int) -> dict[str, np.ndarray]:
        sizes = {"batch": 1, "window": self.config["sliding_window"], "capacity": tokens}
        states = {}
        for value in session.get_inputs():
            if value.name.startswith(_PAST):
                shape = [sizes.get(size, size) for size in value.shape]
                states[value.name] = np.zeros(shape, _DTYPES[value.type])
        return states

    def _feeds(
        self, part: Slice, session: ort.InferenceSession, track: Track, start: int, stop: int
    ) -> dict[str, np.ndarray]:
        feeds: dict[str, np.ndarray] = {}
        for name in _names(session.get_inputs()):
            if name == _IDS:
                feeds[name] = track.ids[:, start:stop]
            elif name == _MASK:
                feeds[name] = np.ones((1, stop), np.int64)
            elif name == part.stream:
                assert track.stream is not None
                feeds[name] = np.ascontiguousarray(track.stream[:, start:stop])
            elif name in track.states:
                feeds[name] = track.states[name]  # the filled shared cache
            elif name in track.carried:
                feeds[name] = np.ascontiguousarray(track.carried[name][:, start:stop])
        return feeds


def _name_files(proto: Any) -> None:
    """Call external files by their names alone, as ONNX Runtime wants them."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and os.path.isabs(entry.value):
                entry.value = os.path.basename(os.path.realpath(entry.value))


def _cut(
    graph: ir.Graph, config: dict[str, object], all_logits: bool, most: int | None
) -> tuple[Slice, ...]:
    """Cut a graph; ``most`` tokens of one call are what its portable bodies take."""
    layers = int(str(config["num_hidden_layers"]))
    inputs = {value.name for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    stream = [_embedded(graph)]
    stream += [_residual(graph, f"model.layers.{i}.mlp.fc2.weight")[0] for i in range(layers)]
    derived = _descendants(graph, stream[0])
    again = _from_states(graph, derived)
    owner: dict[ir.Node, int] = {}
    drafts: list[tuple[list[str], set[str], set[str]]] = []
    for k in range(layers + 2):
        start = stream[k - 1] if k else None
        target = outputs[_LOGITS] if k > layers else stream[k]
        presents = [name for name in outputs if name and name.startswith(f"{_PRESENT}{k - 1}.")]
        wanted = [target, *(outputs[name] for name in presents)]
        read, carried = _walk(wanted, start, inputs, derived - again, owner, k)
        drafts.append((presents, read, carried))
    slices = []
    for k, (presents, read, carried) in enumerate(drafts):
        own = {str(v.name) for node, at in owner.items() if at == k for v in node.outputs}
        later = {name for _, _, names in drafts[k + 1 :] for name in names}
        slices.append(
            Slice(
                layer=k - 1,
                stream=stream[k - 1].name if k else None,
                target=_LOGITS if k > layers else str(stream[k].name),
                carried_in=tuple(sorted(carried)),
                carried_out=tuple(sorted((own & later) - set(presents))),
                graph_inputs=tuple(sorted(read)),
                presents=tuple(presents),
                # Without all logits, layer M+1 goes on with the last token of a run alone.
                step=1 if not all_logits and k - 1 > layers // 2 else most,
            )
        )
    return tuple(slices)


def _walk(
    wanted: list[ir.Value],
    start: ir.Value | None,
    inputs: set[str | None],
    derived: set[ir.Value],
    owner: dict[ir.Node, int],
    k: int,
) -> tuple[set[str], set[str]]:
    """Own the nodes that lead to what is wanted; graph inputs read, values of earlier slices."""
    read: set[str] = set()
    carried: set[str] = set()
    waiting, seen = list(wanted), set()
    while waiting:
        value = waiting.pop()
        if value is start or value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            if value.name in inputs:
                read.add(str(value.name))
            continue
        if value in derived and owner.setdefault(node, k) != k:
            carried.add(str(value.name))
            continue
        waiting.extend(each for each in node.inputs if each is not None)
    return read, carried


def _embedded(graph: ir.Graph) -> ir.Value:
    """What enters layer 0: the other half of its first sum."""
    return _residual(graph, "model.layers.0.attn.out_proj.weight")[1]


def _residual(graph: ir.Graph, weight: str) -> tuple[ir.Value, ir.Value]:
    """The sum that a linear layer's output is added in, and what it is added to.

    Raises:
        SliceError: the weight or the sum is not to be found.
    """
    waiting = [value for name, value in graph.initializers.items() if name.startswith(weight)]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for node, _ in value.uses():
            others = [each for each in node.inputs if each is not None and each is not value]
            sums = node.op_type == "Add" or node.op_type in _SKIP_NORMS
            if sums and not value.is_initializer() and not _constant(others[0]):
                return (node.outputs[0] if node.op_type == "Add" else node.outputs[3]), others[0]
            if node.op_type in ("Add", "MatMul", "MatMulNBits", "Gemm") or node.op_type in _PASSED:
                waiting.append(node.outputs[0])
    raise SliceError(f"the graph has no sum that {weight!r} leads to: its layers cannot be cut")


def _constant(value: ir.Value) -> bool:
    """Whether a value is a weight, or one converted."""
    node = value.producer()
    while node is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")


def _descendants(graph: ir.Graph, first: ir.Value) -> set[ir.Value]:
    found = {first}
    for node in graph:  # in an order that runs
        if any(value in found for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found


def _from_states(graph: ir.Graph, derived: set[ir.Value]) -> set[ir.Value]:
    """Derived values that follow from filled caches: a slice computes them again.

    Bodies in place of operators share such values, whose axes are those of a cache.
    """
    states = {value for value in graph.outputs if (value.name or "").startswith(_PRESENT)}
    found: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value in derived]
        if inputs and all(value in states or value in found for value in inputs):
            found.update(value for value in node.outputs if value not in states)
    return found


def _steps(tokens: int, step: int | None) -> Iterator[tuple[int, int]]:
    size = step or tokens
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _names(values: Iterable[object]) -> list[str]:
    return [str(getattr(value, "name", "")) for value in values]
