"""Milliseconds a token when decoding at several depths, against the limit of the memory bus.

    python -m benchmarks.decode PACKAGE [--depths 0,2048,8192,32768] [--threads 2] [--json FILE]

The limit is the time to read every weight, and at a depth the cache as well, once at the bandwidth
measured in the same run. States are filled with noise, so a depth costs no prefill. Run nothing
else meanwhile: one busy process beside a run on two cores triples a figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, summarize
from runtime_py import Sequence, Session


def sequence_at(session: Session, depth: int) -> Sequence:
    """A sequence that looks as if `depth` tokens had been fed; its states are noise."""
    buffers = session.buffers(1, depth + 256)
    rng = np.random.default_rng(0)
    for state, array in zip(session.states, buffers.arrays, strict=True):
        noise = rng.standard_normal(1 << 16) * 0.1
        if array.dtype == np.int8:
            noise = np.clip(noise * 400, -127, 127)
        elif state.past.endswith("_scale"):
            noise = np.full_like(noise, 0.1 / 40)
        array[...] = np.resize(noise.astype(array.dtype), array.shape)
    buffers.mask[:, :depth] = 1
    return Sequence(session, buffers, depth)


def measure(session: Session, depth: int, seconds: float) -> list[float]:
    """Seconds of each step at a depth, after two that are not counted."""
    sequence = sequence_at(session, depth)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 6 or (time.perf_counter() - begin < seconds and len(taken) < 200):
        start = time.perf_counter()
        sequence.step([len(taken) % 100])
        taken.append(time.perf_counter() - start)
    return taken[2:]


def cache_bytes(session: Session, depth: int) -> int:
    """Bytes of growing state read once for `depth` tokens, all cross layers together."""
    config = json.loads(session.model.get_modelmeta().custom_metadata_map["sambay.config"])
    readers = config["num_hidden_layers"] // 4  # the full attention layer and the cross layers
    rows = sum(
        state.dtype.itemsize * np.prod([a for a in state.axes[1:] if isinstance(a, int)], dtype=int)
        for state in session.states
        if state.grows
    )
    return int(rows) * depth * readers


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--depths", default="0,2048,8192,32768")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="at each depth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe_machine(options.threads)
    begin = time.perf_counter()
    session = Session(options.package, threads=options.threads)
    load = time.perf_counter() - begin
    weights = session.path.with_name("model.onnx.data").stat().st_size
    rows = []
    for depth in (int(part) for part in options.depths.split(",")):
        figures = summarize(measure(session, depth, options.seconds))
        read = weights + cache_bytes(session, depth)
        limit = read / machine["read_bandwidth_GB_s"] / 1e6
        states = session.buffers(1, depth).state_bytes
        row = {"depth": depth, **figures, "limit_ms": round(limit, 1), "state_bytes": states}
        rows.append(row)
    result = {
        "machine": machine,
        "load_s": round(load, 1),
        "weights_bytes": weights,
        "depths": rows,
    }
    table = Table("depth", "min ms", "median ms", "bus limit ms", "limit / min", "states MB")
    for row in rows:
        share = row["limit_ms"] / row["min_ms"]
        values = (row["depth"], row["min_ms"], row["median_ms"], row["limit_ms"], f"{share:.2f}")
        table.add_row(*map(str, values), f"{row['state_bytes'] / 1e6:.1f}")
    console = Console(stderr=True)
    console.print(machine, table, f"load {load:.1f} s, weights {weights / 1e9:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
