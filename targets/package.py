"""Write a model as a package: a folder with all that a runtime needs.

model.onnx, model.onnx.data    the graph and its weights; or several graphs that share them
genai_config.json              for ONNX Runtime GenAI, where that knows all the model's states
sambay_ops.so, .dll, .dylib    native operators, for the CPU; sambay_ops_cuda.so, .dll for CUDA
tokenizer files                from the caller
manifest.json                  how it was made, digests
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from targets.destination import MANIFEST, complete_folder
from targets.genai import genai_config
from targets.graphs import MODEL as MODEL
from targets.graphs import file_of, make_graphs
from targets.manifest import manifest
from targets.target import CPU, CUDA, Target

DATA, GENAI = "model.onnx.data", "genai_config.json"
LIBRARIES = {CPU: "sambay_ops", CUDA: "sambay_ops_cuda"}  # and the suffix of the system

# Smaller tensors stand in the graph itself, where shape inference finds the constants it needs.
OUTSIDE = 1024

# Large weights start on a page, so that a runtime can map them; small ones on a cache line.
_LARGE, _PAGE, _LINE = 1 << 20, 4096, 64

# Written at once, from multiples of this on: systems that keep files in large pages make them so.
_BLOCK = 4 << 20


def write_package(
    model: ir.Model,
    destination: Path,
    *,
    target: Target,
    facts: Mapping[str, Any],
    extra_files: Callable[[Path], None] | None = None,
    library: Path | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Compute a model's weights and write it with everything beside it.

    Memory holds a piece of one weight at a time. The package appears at its destination when it is
    complete; an error or an interrupt leaves nothing.

    Args:
        model: after ``target.passes``; unchanged.
        destination: the folder to make.
        target: whose passes ran.
        facts: of the source checkpoint, for the manifest; JSON, no paths.
        library: native operators for the target's provider, to put in if it takes any; ONNX Runtime
            GenAI then loads the package on this library's system only, other runtimes anywhere.
        extra_files: puts further files, such as the tokenizer's, into the folder it is given.
        force: replace a package at the destination, once the new one is complete.
        progress: told the number of bytes written since it was last called; they add up to
            ``package_size(model)``.

    Returns:
        The destination, absolute.

    Raises:
        DestinationError: the destination exists, cannot be written or is full.
        ValueError: a weight cannot be converted, such as one with a NaN.
    """
    with complete_folder(destination, force=force, size=package_size(model)) as folder:
        if extra_files is not None:  # first: a damaged tokenizer must not cost the weights' minutes
            extra_files(folder)
        graphs = {name: graph.clone() for name, graph in make_graphs(model, target).items()}
        providers = {file_of(graph): graph.provider for graph in target.graphs}
        with (folder / DATA).open("wb") as file:
            data = _Data(file, progress or _silent)
            for graph in graphs.values():
                _move_weights(graph, data)
            data.finish()
        for name, graph in graphs.items():
            graph.metadata_props["sambay.target"] = target.name
            graph.metadata_props["sambay.provider"] = providers.get(name, target.provider)
            ir.save(graph, folder / name)
        options = dict(target.session_options)
        if library is not None and target.native:
            options["custom_ops_library"] = LIBRARIES[target.provider] + library.suffix
            shutil.copyfile(library, folder / options["custom_ops_library"])
        config = genai_config(graphs, target=target, session_options=options)
        if config is not None:
            _write_json(folder / GENAI, config)
        contents = manifest(folder, target=target, facts=facts, known={DATA: data.digest()})
        _write_json(folder / MANIFEST, contents)
    return Path(destination).resolve()


def package_size(model: ir.Model) -> int:
    """Bytes of weights a package of this model will hold, nearly its whole size; reads nothing."""
    return sum(tensor.nbytes for tensor in map(_data, _weights(model)) if tensor.nbytes >= OUTSIDE)


def alignment(nbytes: int) -> int:
    """What the place of a weight of this size in the file of weights is a multiple of."""
    return _PAGE if nbytes >= _LARGE else _LINE


class _Data:
    """The file of weights: counts, digests and reports what is written to it.

    Attributes:
        position: bytes written.
        written: by what tells a tensor from others, the tensor and where it begins.
    """

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress
        self._block = bytearray()  # what is not written yet
        self._digest = hashlib.sha256()
        self.position = 0
        self.written: dict[object, tuple[Any, int]] = {}

    def write(self, data: bytes | memoryview) -> int:
        self._put(data)
        self._progress(len(data))
        return len(data)

    def align(self, boundary: int) -> None:
        self._put(bytes(-self.position % boundary))

    def digest(self) -> str:
        return self._digest.hexdigest()

    def finish(self) -> None:
        self._file.write(self._block)
        self._block.clear()

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.position += len(data)
        rest = memoryview(data).cast("B")
        while len(rest):
            count = _BLOCK - len(self._block)
            self._block += rest[:count]
            rest = rest[count:]
            if len(self._block) == _BLOCK:
                self.finish()


def _move_weights(model: ir.Model, file: _Data) -> None:
    """Write large weights to the file, each once, and take small ones into the graph."""
    for value in _weights(model):
        tensor = _data(value)
        if tensor.nbytes < OUTSIDE:
            # read now: its place in the checkpoint must not be written into the package
            value.const_value = ir.Tensor(
                tensor.numpy().copy(), dtype=tensor.dtype, name=value.name
            )
            continue
        key = _identity(value.name, tensor)
        if key not in file.written:
            file.align(alignment(tensor.nbytes))
            start = file.position
            tensor.tofile(file)
            if file.position - start != tensor.nbytes:
                raise ValueError(
                    f"weight {value.name!r} wrote {file.position - start} bytes, "
                    f"expected {tensor.nbytes} for {tensor.dtype} {tensor.shape}"
                )
            file.written[key] = tensor, start  # the tensor too, so that its id stays its own
        value.const_value = ir.ExternalTensor(
            DATA,
            file.written[key][1],
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
        )


def _identity(name: str | None, tensor: Any) -> object:
    """The same for tensors that several graphs share.

    What is computed while it is written is a weight, which its name in the graph tells from others;
    what is in memory is told by its contents.
    """
    if isinstance(tensor, ir.LazyTensor):
        return name, str(tensor.dtype)
    if isinstance(tensor, ir.Tensor):
        return str(tensor.dtype), hashlib.sha256(tensor.tobytes()).digest()
    return id(tensor)


def _weights(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def _data(value: ir.Value) -> Any:
    if value.const_value is None:
        raise ValueError(f"initializer {value.name!r} has no data: bind it to the checkpoint first")
    return value.const_value


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _silent(_: int) -> None:
    pass
