"""Milliseconds of each native operator at the published shape, by tokens, depth and cache type.

    python -m benchmarks.operators [--threads 2] [--seconds 1.0] [--isa avx2] [--json FILE]

Attention over the shared cache is read by the full attention layer and seven cross layers: its last
column says what 1K tokens of depth add to a decode step of all eight. Each call gets a cache of its
own, so that nothing is found in the processor's caches that a model would have driven out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from runtime_py.native import library_path

HEADS, KV_HEADS, SIZE, WINDOW = 40, 20, 64, 512
CHANNELS, STATES, TAPS = 5120, 16, 4
READERS = 8  # of the shared cache
DEPTHS = (2048, 8192, 32_768)
CHUNK = 512  # tokens of a prefill's call
ATTENTION = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "lambda_init": 0.8}
LARGEST = 1 << 29  # bytes of the copies of a call's inputs

FLOAT, HALF, INT8, INT64 = np.float32, np.float16, np.int8, np.int64
TYPES = {
    np.dtype(FLOAT): TensorProto.FLOAT,
    np.dtype(HALF): TensorProto.FLOAT16,
    np.dtype(INT8): TensorProto.INT8,
    np.dtype(INT64): TensorProto.INT64,
}
CELLS = {"float32": FLOAT, "float16": HALF, "int8": INT8}


@dataclass(frozen=True)
class Call:
    """One operator with its inputs.

    Attributes:
        outputs: shape and dtype of each; one that shares an input's memory has that input's index.
        depth: tokens in the cache, if it has one.
    """

    name: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[int | tuple[tuple[int, ...], type], ...]
    tokens: int
    cache: str = ""
    depth: int = 0
    attributes: tuple[tuple[str, float], ...] = ()


def calls(lengths: Sequence[int] = (1, CHUNK)) -> Iterator[Call]:
    """Everything that is measured, for calls of these numbers of tokens."""
    for tokens in lengths:
        yield from _state_space(tokens)
        for cache in CELLS:
            yield _window(cache, tokens)
    for cache in CELLS:
        for depth in DEPTHS:
            yield _cross(cache, depth)


def _state_space(tokens: int) -> Iterator[Call]:
    wide, lengths = (1, tokens, CHANNELS), np.array([tokens])
    x = _noise(wide)
    taps, bias = _noise((CHANNELS, 1, TAPS)), _noise((CHANNELS,))
    state = _noise((1, CHANNELS, TAPS - 1))
    yield Call(
        "CausalConvWithState", (x, taps, bias, state, lengths), ((wide, FLOAT), 3), tokens=tokens
    )
    narrow = (1, tokens, STATES)
    inputs = (x, _noise(wide), bias, -np.abs(_noise((CHANNELS, STATES))), _noise(narrow))
    inputs += (_noise(narrow), bias, _noise((1, CHANNELS, STATES)), lengths)
    yield Call("SelectiveScan", inputs, ((wide, FLOAT), 7), tokens=tokens)
    yield Call("GatedMemoryUnit", (x, _noise(wide)), ((wide, FLOAT),), tokens=tokens)


def _window(cache: str, tokens: int) -> Call:
    caches = _caches(cache, WINDOW)
    inputs = (_noise((1, tokens, HEADS * SIZE)), *_new(tokens), *caches, *_mixing())
    inputs += (np.array([10_000]), np.array([tokens]))
    outputs = ((1, tokens, HEADS * SIZE), FLOAT), *range(3, 3 + len(caches))
    attributes = tuple({**ATTENTION, "window": WINDOW}.items())
    name = "QuantizedDifferentialAttention" if cache == "int8" else "DifferentialAttention"
    return Call(name, inputs, outputs, tokens, cache, WINDOW, attributes)


def _cross(cache: str, depth: int) -> Call:
    inputs = (_noise((1, 1, HEADS * SIZE)), *_caches(cache, depth), *_mixing())
    inputs += (np.array([[depth - 1]]),)
    outputs = (((1, 1, HEADS * SIZE), FLOAT),)
    prefix = "Quantized" if cache == "int8" else ""
    name = f"{prefix}DifferentialCrossAttention"
    return Call(name, inputs, outputs, 1, cache, depth, tuple(ATTENTION.items()))


def _noise(shape: tuple[int, ...], dtype: type = FLOAT) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(1 << 16)
    scale = 40 if dtype == INT8 else 1
    return np.resize((values * scale).clip(-127, 127).astype(dtype), shape)


def _new(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return _noise((1, tokens, KV_HEADS * SIZE)), _noise((1, tokens, KV_HEADS * SIZE))


def _mixing() -> tuple[np.ndarray, np.ndarray]:
    return np.array([0.5], FLOAT), _noise((2 * SIZE,))


def _caches(cache: str, slots: int) -> tuple[np.ndarray, ...]:
    cells = tuple(_noise((1, KV_HEADS, slots, SIZE), CELLS[cache]) for _ in range(2))
    if cache != "int8":
        return cells
    return (*cells, *(np.full((1, KV_HEADS, slots), 0.02, HALF) for _ in range(2)))


def measure(call: Call, threads: int, seconds: float, model: bytes = b"") -> list[float]:
    """Seconds of each run of our operator, or of another model, after two that are not counted."""
    session = open_session(model or make_model(call), threads)
    size = sum(array.nbytes for array in call.inputs)
    bindings = [_bind(session, call) for _ in range(max(1, min(16, LARGEST // size)))]
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 12 or (time.perf_counter() - begin < seconds and len(taken) < 2000):
        binding, _ = bindings[len(taken) % len(bindings)]
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        taken.append(time.perf_counter() - start)
    return taken[2:]


def make_model(call: Call) -> bytes:
    """Our operator alone."""
    names = [f"in{i}" for i, _ in enumerate(call.inputs)]
    results = [f"out{i}" for i, _ in enumerate(call.outputs)]
    dtypes = [call.inputs[o].dtype if isinstance(o, int) else np.dtype(o[1]) for o in call.outputs]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(call.name, names, results, domain="ai.sambay", **dict(call.attributes))],
        "one_node",
        [value(n, TYPES[a.dtype], a.shape) for n, a in zip(names, call.inputs, strict=True)],
        [value(name, TYPES[dtype], None) for name, dtype in zip(results, dtypes, strict=True)],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("ai.sambay", 1)]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())


def open_session(model: bytes, threads: int) -> ort.InferenceSession:
    """A session that has the native operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    library = library_path()
    if library is None:
        raise FileNotFoundError("the native operators were not built; see CONTRIBUTING.md")
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options)


def _bind(session: ort.InferenceSession, call: Call) -> tuple[ort.IOBinding, list[np.ndarray]]:
    """Inputs and outputs in fresh memory; the arrays must live as long as the binding."""
    arrays = [array.copy() for array in call.inputs]
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    binding = session.io_binding()
    for i, value in enumerate(values):
        binding.bind_ortvalue_input(f"in{i}", value)
    for i, output in enumerate(call.outputs):
        if isinstance(output, int):
            shared = values[output]
        else:
            arrays.append(np.empty(*output))
            shared = ort.OrtValue.ortvalue_from_numpy(arrays[-1])
        binding.bind_ortvalue_output(f"out{i}", shared)
    return binding, arrays


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    parser.add_argument("--isa", default="", help="portable, avx2, avx512, neon; default: the best")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="operators with this in the name"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    os.environ["SAMBAY_ISA"] = options.isa
    machine = describe_machine(options.threads)
    table = Table(
        "operator", "tokens", "cache", "depth", "min ms", "median ms", "GB/s", "ms per 1K"
    )
    rows = []
    for call in calls():
        if options.only not in call.name:
            continue
        taken = np.array(measure(call, options.threads, options.seconds)) * 1e3
        figures = {"min_ms": float(taken.min().round(4)), "n": len(taken)}
        figures |= {"median_ms": float(np.median(taken).round(4))}
        size = sum(array.nbytes for array in call.inputs)
        row = {"operator": call.name, "tokens": call.tokens, "cache": call.cache}
        row |= {"depth": call.depth, **figures, "GB_s": round(size / taken.min() / 1e6, 1)}
        if "Cross" in call.name:
            row["ms_per_1K"] = round(figures["min_ms"] * READERS / (call.depth / 1024), 2)
        rows.append(row)
        keys = ("operator", "tokens", "cache", "depth", "min_ms", "median_ms", "GB_s", "ms_per_1K")
        table.add_row(*(str(row.get(key) or "") for key in keys))
    console = Console(stderr=True)
    console.print(machine, table)
    if options.json:
        result = {"machine": machine, "isa": options.isa or "best", "operators": rows}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
