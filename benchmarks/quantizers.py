"""Error, time and memory of weight quantizers, ours, ONNX Runtime's and Olive's, on one matrix.

    python -m benchmarks.quantizers [--rows 2560] [--columns 2560] [--weights NAME ...] [--json]

Each quantizer gets the same ONNX file, a matrix product with its weight beside it, in a process of
its own. The error is that of the weight as ONNX Runtime reads it back: the product of the identity
and the quantized matrix. Memory is what the process grows by at its peak, in bytes a weight.
Olive takes part where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from graph_passes.pipeline import run_passes
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.recipe import BITS, WeightFormat
from runtime_py.peak_memory import peak_bytes

WEIGHTS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape, np.float32),
    "heavy tails": lambda rng, shape: rng.standard_t(4, shape).astype(np.float32),
    "outlier columns": lambda rng, shape: (
        rng.standard_normal(shape, np.float32) * np.exp(rng.standard_normal(shape[1]) * 0.5)
    ).astype(np.float32),
}
BLOCK_SIZES = (32, 128)
FORMATS = tuple(
    WeightFormat(bits=bits, block_size=block_size, zero_points=zero_points)
    for bits in BITS
    for block_size in BLOCK_SIZES
    for zero_points in (False, True)
)


@dataclass(frozen=True)
class Row:
    """One quantizer on one matrix in one format.

    Attributes:
        snr_db: weights' energy over their error's.
        bits_per_weight: stored, scales and zero points included.
        ns_per_weight: time.
        peak_bytes_per_weight: growth of the process, the float weights it holds included.
    """

    weight: str
    quantizer: str
    bits: int
    block_size: int
    zero_points: bool
    snr_db: float
    bits_per_weight: float
    ns_per_weight: float
    peak_bytes_per_weight: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantizers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=_size, default=2560, help="outputs of the layer (2560)")
    parser.add_argument("--columns", type=_size, default=2560, help="inputs of the layer (2560)")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for weight in options.weights:
            path = Path(scratch) / "model.onnx"
            write_model(path, make_weight(weight, (options.rows, options.columns)))
            for quantizer, form in _runs():
                with console.status(f"{weight}: {quantizer}, {form.bits} bits"):
                    rows.append(_in_a_process(str(path), weight, quantizer, form))
    if options.json:
        results = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"machine": describe_setup(), "rows": results}, indent=2))
    else:
        Console(width=100).print(_table(rows))
    return 0


def make_weight(name: str, shape: tuple[int, int]) -> np.ndarray:
    """A matrix [outputs, inputs] float32, the same every time."""
    return WEIGHTS[name](np.random.default_rng(11), shape)


def write_model(path: Path, weight: np.ndarray) -> None:
    """An ONNX file of one MatMul by the transposed weight, its data in a file beside it."""
    columns = weight.shape[1]
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["tokens", columns]), type=floats)
    stored = ir.Tensor(np.ascontiguousarray(weight.T), name="weight")
    w = ir.Value(name="weight", shape=stored.shape, type=floats, const_value=stored)
    node = ir.node("MatMul", [x, w], name="product")
    node.outputs[0].name, node.outputs[0].type = "y", floats
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20}, name="g"
    )
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.stem}.data")


def read_back(model: bytes, columns: int) -> np.ndarray:
    """The weight [outputs, inputs] that ONNX Runtime computes with."""
    session = onnxruntime.InferenceSession(model)
    parts = []
    for start in range(0, columns, 512):
        x = np.eye(min(512, columns - start), columns, start, dtype=np.float32)
        parts.append(session.run(None, {"x": x})[0])
    return np.concatenate(parts).T


def quantize_ours(path: str, form: WeightFormat) -> tuple[bytes, int]:
    """The model with the weight quantized by our passes, and the bytes the weight takes."""
    settings = dataclasses.asdict(form)
    # accuracy_level 1: the runtime computes in float32, so that only weights are compared
    model = run_passes(
        ir.load(path), [lambda model: quantize_matmul(model, **settings, accuracy_level=1)]
    )
    stored = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        file = io.BytesIO()
        tensor.tofile(file)
        stored += file.tell()
        array = np.frombuffer(file.getbuffer(), tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        value.const_value = ir.Tensor(array, name=value.name)
    return ir.to_proto(model).SerializeToString(), stored


def quantize_theirs(path: str, algorithm: str, form: WeightFormat) -> tuple[bytes, int]:
    """The same by ONNX Runtime's MatMulNBitsQuantizer."""
    from onnxruntime.quantization import matmul_nbits_quantizer as theirs

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    config = None
    if algorithm == "hqq":
        config = theirs.HQQWeightOnlyQuantConfig(block_size=form.block_size, bits=form.bits)
    elif algorithm == "k-quant":
        config = theirs.KQuantWeightOnlyQuantConfig(
            customized_weight_config={"product": {"bits": form.bits}}
        )
    quantizer = theirs.MatMulNBitsQuantizer(
        path,
        bits=form.bits,
        block_size=form.block_size,
        is_symmetric=not form.zero_points,
        accuracy_level=1,
        algo_config=config,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # k-quant draws a progress bar
        quantizer.process()
    proto = getattr(quantizer.model, "model", quantizer.model)
    node = next(node for node in proto.graph.node if node.op_type == "MatMulNBits")
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in node.input]
    return proto.SerializeToString(), sum(len(tensor.raw_data) for tensor in tensors)


def quantize_with_olive(path: str, form: WeightFormat) -> tuple[bytes, int]:
    """The same by Olive's k-quant."""
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.kquant_quantization import OnnxKQuantQuantization

    logging.disable(logging.WARNING)
    settings = {"bits": form.bits, "block_size": form.block_size, "accuracy_level": 1}
    quantizer = create_pass_from_dict(OnnxKQuantQuantization, settings, disable_search=True)
    with tempfile.TemporaryDirectory() as folder:
        written = quantizer.run(ONNXModelHandler(path), str(Path(folder) / "model.onnx"))
        proto = onnx.load(written.model_path)
    node = next(node for node in proto.graph.node if node.op_type == "MatMulNBits")
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in node.input]
    return proto.SerializeToString(), sum(len(tensor.raw_data) for tensor in tensors)


def _runs() -> Iterator[tuple[str, WeightFormat]]:
    for form in FORMATS:
        for name in ("rtn", "search"):
            yield f"ours, {name}", dataclasses.replace(form, quantizer=name)
        yield "ORT, rtn", form
        if not form.zero_points:
            continue
        # Both have zero points always; those of hqq are floats, which no 8-bit product takes.
        yield "ORT, k-quant", form
        if importlib.util.find_spec("olive") is not None:
            yield "Olive, k-quant", form
        if form.bits == 4:
            yield "ORT, hqq", form


def _in_a_process(path: str, weight: str, quantizer: str, form: WeightFormat) -> Row:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (path, weight, quantizer, form))


def _measure(path: str, weight: str, quantizer: str, form: WeightFormat) -> Row:
    def quantize(source: str) -> tuple[bytes, int]:
        author, _, algorithm = quantizer.partition(", ")
        if author == "ours":
            return quantize_ours(source, form)
        if author == "Olive":
            return quantize_with_olive(source, form)
        return quantize_theirs(source, algorithm, form)

    with tempfile.TemporaryDirectory() as scratch:  # imports and warms up
        small = Path(scratch) / "small.onnx"
        write_model(small, make_weight(weight, (256, 256)))
        quantize(str(small))
    before = _peak()
    begin = time.perf_counter()
    model, stored = quantize(path)
    seconds, grown = time.perf_counter() - begin, _peak() - before
    proto = ir.load(path).graph.initializers["weight"].const_value
    assert proto is not None
    wanted = proto.numpy().T
    noise = float(np.square(read_back(model, wanted.shape[1]) - wanted, dtype=np.float64).sum())
    energy = float(np.square(wanted, dtype=np.float64).sum())
    return Row(
        weight=weight,
        quantizer=quantizer,
        bits=form.bits,
        block_size=form.block_size,
        zero_points=form.zero_points,
        snr_db=round(10 * math.log10(energy / noise), 2),
        bits_per_weight=round(8 * stored / wanted.size, 3),
        ns_per_weight=round(seconds * 1e9 / wanted.size, 1),
        peak_bytes_per_weight=round(grown / wanted.size, 2),
    )


def _peak() -> int:
    peak = peak_bytes()
    if peak is None:
        raise OSError("this system does not tell the peak memory of a process")
    return peak


def _table(rows: list[Row]) -> Table:
    table = Table("weights", "format", "quantizer")
    for title in ("SNR dB", "bits", "ns", "peak bytes"):
        table.add_column(title, justify="right")
    table.caption = "bits, time and memory are those of a weight"
    for row in rows:
        zero = "zero points" if row.zero_points else "symmetric"
        table.add_row(
            row.weight,
            f"{row.bits} bits, {row.block_size}, {zero}",
            row.quantizer,
            f"{row.snr_db:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.ns_per_weight:.1f}",
            f"{row.peak_bytes_per_weight:.2f}",
        )
    return table


def _size(text: str) -> int:
    size = int(text)
    if size < 256 or size % 256:
        raise ValueError
    return size


if __name__ == "__main__":
    sys.exit(main())
