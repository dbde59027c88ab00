"""The quantized product against ONNX Runtime's own, at the published shapes, by number of tokens.

    python -m benchmarks.products [--tokens 1,8,64,512] [--blocks 3] [--threads 2] [--json FILE]

Each block makes a session of one product, times it, drops it, and does the same with the other:
idle sessions disturb each other by spinning. Many weights take turns, so that none is found in the
processor's caches. Both have blocks as packages have them; ours has scales in float16, theirs in
float32, which is all it takes beside float32 inputs. A GOP is 10^9 multiplications and additions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, gemm_rate
from runtime_py.native import library_path

BLOCKS = {4: 32, 8: 128}  # by bits: weights that share a scale
OURS, THEIRS = "ai.sambay", "com.microsoft"
SCALES = {OURS: np.float16, THEIRS: np.float32}
WEIGHTS = 1 << 30  # bytes that take turns at one token: no cache holds them


@dataclass(frozen=True)
class Shape:
    """One product of the published model: inputs, outputs, bits of a weight."""

    inputs: int
    outputs: int
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return BLOCKS[self.bits]

    def nbytes(self, domain: str) -> int:
        """Of the weight and its scales."""
        scale = np.dtype(SCALES[domain]).itemsize
        return self.inputs * self.outputs // self.block * (self.block * self.bits // 8 + scale)


SHAPES = (
    Shape(2560, 20480, 4),  # mlp.fc1
    Shape(10240, 2560, 4),  # mlp.fc2
    Shape(2560, 10240, 4),  # in_proj
    Shape(5120, 2560, 4),  # out_proj
    Shape(2560, 2560, 4),  # attention
    Shape(2560, 10240, 8),
)


def make_model(shape: Shape, domain: str, count: int) -> bytes:
    """`count` products of one input with a weight each."""
    rng, blocks = np.random.default_rng(0), shape.inputs // shape.block
    sizes = [shape.outputs, blocks, shape.block * shape.bits // 8]
    scales = rng.uniform(0.001, 0.002, sizes[:2]).astype(SCALES[domain])
    scale_type = helper.np_dtype_to_tensor_dtype(scales.dtype)
    value, tensor = helper.make_tensor_value_info, helper.make_tensor
    settings: dict[str, Any] = {"K": shape.inputs, "N": shape.outputs, "bits": shape.bits}
    settings |= {"block_size": shape.block, "accuracy_level": 4}
    nodes, weights, results = [], [], []
    for i in range(count):
        packed = rng.bytes(math.prod(sizes))  # each its own: equal ones might be stored once
        weights.append(tensor(f"B{i}", TensorProto.UINT8, sizes, packed, raw=True))
        weights.append(tensor(f"scales{i}", scale_type, sizes[:2], scales.tobytes(), raw=True))
        names = ["x", f"B{i}", f"scales{i}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain=domain, **settings))
        results.append(value(f"y{i}", TensorProto.FLOAT, None))
    x = value("x", TensorProto.FLOAT, ["tokens", shape.inputs])
    graph = helper.make_graph(nodes, "products", [x], results, weights)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return bytes(model.SerializeToString())


def measure(model: bytes, x: np.ndarray, threads: int, seconds: float, count: int) -> list[float]:
    """Seconds of one product, each the mean of a run of `count`; the first run is not counted."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    library = library_path()
    if library is None:
        raise FileNotFoundError("the native operators were not built; see CONTRIBUTING.md")
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model, options)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        session.run(None, {"x": x})
        taken.append((time.perf_counter() - start) / count)
    return taken[1:]


def compare(shape: Shape, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of both products."""
    count = max(1, round(WEIGHTS / shape.nbytes(THEIRS) / tokens)) if tokens < 64 else 1
    x = np.random.default_rng(1).standard_normal((tokens, shape.inputs), np.float32)
    models = {domain: make_model(shape, domain, count) for domain in (OURS, THEIRS)}
    taken: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(options.blocks):
        for domain, model in models.items():
            taken[domain] += measure(model, x, options.threads, options.seconds, count)
    row: dict[str, Any] = {"inputs": shape.inputs, "outputs": shape.outputs, "bits": shape.bits}
    row["tokens"] = tokens
    for name, domain in (("ours", OURS), ("onnxruntime", THEIRS)):
        least = min(taken[domain])
        row[name] = {
            "min_ms": round(least * 1e3, 4),
            "median_ms": round(float(np.median(taken[domain])) * 1e3, 4),
            "GB_s": round(shape.nbytes(domain) / least / 1e9, 1),
            "GOP_s": round(2 * tokens * shape.inputs * shape.outputs / least / 1e9, 1),
        }
    row["times_faster"] = round(min(taken[THEIRS]) / min(taken[OURS]), 2)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one product in one block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="", help="avx2, avx2_vnni, avx512, ...; default: the best")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    os.environ["SAMBAY_ISA"] = options.isa
    machine = describe_machine(options.threads)
    machine["float32_GEMM_GOP_s"] = round(gemm_rate() / 1e9, 1)
    table = Table("inputs", "outputs", "bits", "tokens", "ours ms", "GB/s", "GOP/s", "ORT ms", "x")
    rows = []
    for shape in SHAPES:
        for tokens in (int(part) for part in options.tokens.split(",")):
            row = compare(shape, tokens, options)
            rows.append(row)
            ours, theirs = row["ours"], row["onnxruntime"]
            sizes = (shape.inputs, shape.outputs, shape.bits, tokens)
            figures = (ours["min_ms"], ours["GB_s"], ours["GOP_s"], theirs["min_ms"])
            table.add_row(*map(str, (*sizes, *figures, row["times_faster"])))
    Console(stderr=True).print(machine, table)
    if options.json:
        result = {"machine": machine, "isa": options.isa or "best", "products": rows}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
