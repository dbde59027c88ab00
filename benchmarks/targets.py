"""What packages of every target are at a checkpoint's size: export, nodes, kernels, a few calls.

    python -m benchmarks.targets CHECKPOINT --folder DIR [--target NAME]... [--json FILE]
                                 [--options="--quantizer gptq --calibration FILE"]

For each target in turn a package is exported into DIR, held to its provider's table of kernels
(`targets.lint`), run on the CPU provider, and removed. Each of these is a process of its own, so
its peak of resident memory is its own. Random weights serve as well as others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from targets import TARGETS
from targets.target import CPU

PROMPT, STEPS = 10, 3  # tokens of the first call, calls of one token after it

# The last line that a process prints is its result; the memory is added to it.
EXPORT = """
import sys
from export.cli import main
if main(["--checkpoint", sys.argv[1], "--target", sys.argv[2], "-o", *sys.argv[3:]]):
    sys.exit("the export failed")
result = {}
"""
LINT = """
import sys
from pathlib import Path
import onnx_ir as ir
from targets.lint import count_nodes, find_graphs, lint
nodes, faults = 0, []
for path in find_graphs(Path(sys.argv[1])):
    model = ir.load(path)
    nodes += count_nodes(model)
    faults += lint(model, model.metadata_props["sambay.provider"])
result = {"nodes": nodes, "faults": len(faults), "first_faults": faults[:5]}
"""
RUN = f"""
import sys, time
from pathlib import Path
import numpy as np
from runtime_py import Session
begin = time.perf_counter()
session = Session(Path(sys.argv[1]), providers=[{CPU!r}], threads=2)
times = [time.perf_counter() - begin]
sequence = session.start()
ids = list(range(10, 10 + {PROMPT}))
for _ in range(1 + {STEPS}):
    begin = time.perf_counter()
    logits = sequence.step(ids)
    times.append(time.perf_counter() - begin)
    assert np.isfinite(logits).all()
    ids = [int(logits[0].argmax())]
result = dict(zip(("session_s", "prompt_s"), times))
result["step_s"] = min(times[2:])
"""
PRINT = """
import json, time
from runtime_py.peak_memory import peak_bytes
print(json.dumps({**result, "cpu_seconds": time.process_time(), "peak_bytes": peak_bytes()}))
"""


def measure(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a script in a process of its own: what it tells, its seconds, its peak of memory.

    ``cpu_seconds`` are those of all its threads, which a busy machine changes less.
    A failure is told as ``{"failed": last line of stderr, or the signal that ended it}``.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-c", script + PRINT, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"ended with {child.returncode}"]
        return {"failed": lines[-1]}
    told: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in told.items()}
    return {"seconds": round(time.perf_counter() - begin, 1), **rounded}


def measure_target(
    checkpoint: Path, name: str, folder: Path, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Export a checkpoint to one target, look at the package, run it, remove it.

    ``options`` are further ones of phi4export.
    """
    package = Path(tempfile.mkdtemp(dir=folder)) / name
    row: dict[str, Any] = {"target": name, "options": list(options)}
    try:
        row["export"] = measure(EXPORT, checkpoint, name, package, *options)
        if "failed" not in row["export"]:
            row["bytes"] = {p.name: p.stat().st_size for p in sorted(package.iterdir())}
            row["lint"] = measure(LINT, package)
            row["run_on_cpu"] = measure(RUN, package)
    finally:
        shutil.rmtree(package.parent)
    return row


def show(rows: list[dict[str, Any]]) -> Table:
    """The measurements, one row a target; memory is in GB, the second time on the CPU provider."""
    names = ("target", "size", "export s", "peak", "nodes", "faults", "load s", "step s", "peak")
    table = Table(*names)
    for row in rows:
        size = sum(row.get("bytes", {}).values())
        cells = [f"{size / 1e9:.2f}"]
        for stage, keys in (
            ("export", ("seconds", "peak_bytes")),
            ("lint", ("nodes", "faults")),
            ("run_on_cpu", ("session_s", "step_s", "peak_bytes")),
        ):
            told = row.get(stage, {})
            values = [told.get(key, "failed" if "failed" in told else "-") for key in keys]
            cells += [
                f"{value / 1e9:.2f}" if key == "peak_bytes" and isinstance(value, int) else value
                for key, value in zip(keys, values, strict=True)
            ]
        table.add_row(row["target"], *map(str, cells))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; status 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where packages are made")
    parser.add_argument("--target", action="append", choices=[each.name for each in TARGETS])
    parser.add_argument("--options", type=shlex.split, default=[], help="more for phi4export")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names = options.target or [each.name for each in TARGETS]
    options.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"setup": describe_setup(), "prompt_tokens": PROMPT, "targets": []}
    for name in names:
        result["targets"].append(
            measure_target(options.checkpoint, name, options.folder, options.options)
        )
        if options.json:  # after each: a long run may be ended
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(show(result["targets"]))
    stages = [row.get(stage, {}) for row in result["targets"] for stage in row]
    return int(any("failed" in stage for stage in stages if isinstance(stage, dict)))


if __name__ == "__main__":
    sys.exit(main())
