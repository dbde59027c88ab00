"""Every operator on a CUDA device: its kernel against its portable body, at the published sizes.

    python -m benchmarks.cuda_operators [--depth 8192] [--json FILE]

Needs a GPU, onnxruntime-gpu and the library of `python setup.py build_cuda`. Inputs and outputs
stay on the device, past and present share memory. A time is one run of a session of one node, ONNX
Runtime's own share of some ten microseconds included, with both kinds alternating in blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from export.ops.custom_op import Sample
from graph_passes.lower_opset import lower_opset
from graph_passes.replace_scan_loop import replace_scan_loop
from runtime_py.native import CUDA, library_path
from tests.kernels.samples import CASES, Case, Sizes, as_activations
from tests.kernels.single_node import as_model, kinds_of, reference_outputs

INNER, HEAD, PAIRS, GROUP, WINDOW = 5120, 64, 10, 2, 512
TOKENS = (1, 128)  # decode, and the longest call of a package for CUDA


def sizes_of(case: Case, tokens: int, depth: int) -> Sizes:
    """The published model's sizes; caches as a session at this depth has them."""
    sizes = Sizes(batch=1, tokens=tokens, width=INNER, pairs=PAIRS, group=GROUP, depth=depth)
    if case.cell is None:
        return sizes
    slots = WINDOW + 3 if "window" in case.attributes else depth + tokens  # 3: see Sizes
    return replace(sizes, width=HEAD, slots=slots, all_seen="window" not in case.attributes)


def open_session(
    case: Case, sample: Sample, provider: str, library: Path | None
) -> ort.InferenceSession:
    """A session of one node, on the library's kernel or on the body a package for CUDA has."""
    outputs = reference_outputs(case.op, sample)
    proto = as_model(case.op, kinds_of(sample.tensors), kinds_of(outputs), sample.attributes)
    model = ir.from_proto(onnx.load_from_string(proto))
    model = lower_opset(replace_scan_loop(model, max_tokens=max(TOKENS)), version=18)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=[provider]
    )


def bind(session: ort.InferenceSession, case: Case, sample: Sample, device: str) -> Any:
    """Inputs and outputs on the device, once and for all."""
    binding = session.io_binding()
    arrays = [tensor.numpy() for tensor in sample.tensors]
    values = [ort.OrtValue.ortvalue_from_numpy(array.copy(), device, 0) for array in arrays]
    for i, value in enumerate(values):
        binding.bind_ortvalue_input(f"in{i}", value)
    shared = {output: values[i] for i, output in case.shared.items()}
    for j, output in enumerate(reference_outputs(case.op, sample)):
        value = shared.get(j)
        if value is None:
            value = ort.OrtValue.ortvalue_from_numpy(output.numpy().copy(), device, 0)
        binding.bind_ortvalue_output(f"out{j}", value)
    return binding


def measure(sessions: list[Any], seconds: float) -> list[list[float]]:
    """Seconds of every run, of each session; blocks of ten runs in turn."""
    taken: list[list[float]] = [[] for _ in sessions]
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken[-1]) < 20:
        for times, (session, binding) in zip(taken, sessions, strict=True):
            for _ in range(10):
                start = time.perf_counter()
                session.run_with_iobinding(binding)
                times.append(time.perf_counter() - start)
    return [times[10:] for times in taken]  # the first block warms up


def microseconds(seconds: list[float]) -> dict[str, float]:
    """Minimum and median."""
    return {
        "min_us": round(min(seconds) * 1e6, 1),
        "median_us": round(statistics.median(seconds) * 1e6, 1),
        "n": len(seconds),
    }


def compare(provider: str, library: Path, depth: int, seconds: float) -> list[dict[str, Any]]:
    """Kernel and body of every operator, float16 activations, at each number of tokens."""
    device = "cuda" if provider == CUDA else "cpu"
    rows = []
    for case in CASES:
        if case.cell == torch.float32:
            continue  # packages for CUDA have float16
        for tokens in TOKENS:
            sample = case.sample(sizes_of(case, tokens, depth))
            sample = as_activations(case, sample, torch.float16)
            sessions = []
            for each in (library, None):
                session = open_session(case, sample, provider, each)
                sessions.append((session, bind(session, case, sample, device)))
            kernel, body = (microseconds(times) for times in measure(sessions, seconds))
            rows.append({"operator": str(case), "tokens": tokens, "kernel": kernel, "body": body})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_operators", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--depth", type=int, default=8192, help="tokens in the shared cache")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each operator")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    library = library_path(CUDA)
    if library is None or CUDA not in ort.get_available_providers():
        missing = "onnxruntime-gpu" if library else "the library: python setup.py build_cuda"
        print(f"this needs a GPU, and what is missing first is {missing}", file=sys.stderr)
        return 2
    rows = compare(CUDA, library, options.depth, options.seconds)
    table = Table("operator", "tokens", "kernel min us", "median", "body min us", "median", "ratio")
    for row in rows:
        kernel, body = row["kernel"], row["body"]
        ratio = f"{body['median_us'] / kernel['median_us']:.1f}"
        figures = (kernel["min_us"], kernel["median_us"], body["min_us"], body["median_us"])
        table.add_row(row["operator"], str(row["tokens"]), *map(str, figures), ratio)
    Console(stderr=True).print(table)
    if options.json:
        result = {"machine": describe_setup(), "depth": options.depth, "operators": rows}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
