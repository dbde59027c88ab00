"""Run one node of domain ``ai.sambay``, on its native kernel or on its portable body."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export.ops.custom_op import CustomOp, Sample
from runtime_py.native import library_path

TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.int64: onnx.TensorProto.INT64,
}
# Those of them that end in _vnni or _dot differ in the quantized product alone.
ISAS = ("portable", "neon", "avx2", "avx512")
Kind = tuple[torch.dtype, int | None]  # of a tensor: dtype and rank, None for any rank


def find_library() -> Path | None:
    """The library to test: the one named by SAMBAY_TEST_LIBRARY, else the one that was built."""
    named = os.environ.get("SAMBAY_TEST_LIBRARY")
    return Path(named) if named else library_path()


def as_model(
    op: CustomOp,
    inputs: Sequence[Kind],
    outputs: Sequence[Kind],
    attributes: Mapping[str, Any],
) -> bytes:
    """One bare node and its functions, as an exported file holds them; sizes are unknown."""

    def values(prefix: str, kinds: Iterable[Kind]) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(
                f"{prefix}{i}", TYPES[dtype], None if rank is None else [None] * rank
            )
            for i, (dtype, rank) in enumerate(kinds)
        ]

    into, out = values("in", inputs), values("out", outputs)
    names = [[value.name for value in side] for side in (into, out)]
    node = onnx.helper.make_node(op.name, *names, domain="ai.sambay", **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", into, out),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("ai.sambay", 1)],
        functions=[ir.to_proto(function) for function in op.functions()],
        ir_version=10,
    )
    return model.SerializeToString()


def session_of(
    op: CustomOp, sample: Sample, *, isa: str | None = None, threads: int = 1
) -> ort.InferenceSession:
    """A session on the kernels of an instruction set; without one, on the portable body.

    Skips the test where this machine or build lacks the instruction set.
    """
    inputs, outputs = kinds_of(sample.tensors), kinds_of(reference_outputs(op, sample))
    attributes = tuple(sorted(sample.attributes.items()))
    return _session(op, inputs, outputs, attributes, isa, threads)


def kinds_of(tensors: Iterable[torch.Tensor]) -> tuple[Kind, ...]:
    """What a model declares of these tensors."""
    return tuple((tensor.dtype, tensor.dim()) for tensor in tensors)


@functools.lru_cache(maxsize=256)
def _session(
    op: CustomOp,
    inputs: tuple[Kind, ...],
    outputs: tuple[Kind, ...],
    attributes: tuple[tuple[str, Any], ...],
    isa: str | None,
    threads: int,
) -> ort.InferenceSession:
    return open_session(as_model(op, inputs, outputs, dict(attributes)), isa=isa, threads=threads)


def open_session(model: bytes, *, isa: str | None, threads: int = 1) -> ort.InferenceSession:
    """As ``session_of``, for any model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores may be fewer
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # a buffer of its own for each tensor: overruns show
    with pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            patch.setenv("SAMBAY_ISA", isa)
            library = find_library()
            if library is None:
                pytest.skip("the native operators were not built: needs a C++ compiler")
            options.register_custom_ops_library(str(library))
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "SAMBAY_ISA is" in str(error):
                pytest.skip(f"no {isa} on this machine or in this build")
            raise


def run(session: ort.InferenceSession, sample: Sample) -> list[np.ndarray]:
    """Outputs, in memory apart from the inputs."""
    return session.run(None, {f"in{i}": t.numpy() for i, t in enumerate(sample.tensors)})


def run_in_place(
    session: ort.InferenceSession, sample: Sample, shared: Mapping[int, int]
) -> list[np.ndarray]:
    """Outputs, where output ``shared[i]`` is the memory of input i, as the runtime binds it."""
    binding = session.io_binding()
    arrays = [tensor.numpy().copy() for tensor in sample.tensors]  # an OrtValue keeps none alive
    device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
    values = [ort.OrtValue.ortvalue_from_numpy(array, device) for array in arrays]
    for i, value in enumerate(values):
        binding.bind_ortvalue_input(f"in{i}", value)
    there = {output: values[i] for i, output in shared.items()}
    for j, _ in enumerate(session.get_outputs()):
        if j in there:
            binding.bind_ortvalue_output(f"out{j}", there[j])
        else:
            binding.bind_output(f"out{j}")
    session.run_with_iobinding(binding)
    return [value.numpy().copy() for value in binding.get_outputs()]


def reference_outputs(op: CustomOp, sample: Sample) -> list[torch.Tensor]:
    """What the torch reference computes."""
    outputs = op.torch_op(*sample.tensors, **sample.attributes)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
