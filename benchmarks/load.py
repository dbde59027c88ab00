"""From the start of a process to the first token of a short prompt, and the memory it takes.

    python -m benchmarks.load PACKAGE [--against PACKAGE] [--rounds 5] [--threads 2] [--json FILE]

Each round starts a fresh interpreter, in turn for each package; files are in the system's cache
after a round that is not counted. Times are in seconds since the process was started; memory is
what was resident at most, also as a ratio to the model's files. On Linux memory of the process
itself (anonymous) is told from mapped files, which others share and the system may take back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine

PROMPT = 10  # tokens
STAGES = ("import_s", "session_s", "first_token_s", "second_token_s")

# Run in a fresh interpreter; CLOCK_MONOTONIC is one for all processes of a system.
CHILD = f"""
import json, sys, time
from pathlib import Path
from runtime_py import Session
from runtime_py.peak_memory import peak_bytes
times = [time.monotonic()]
session = Session(sys.argv[1], threads=int(sys.argv[2]))
times.append(time.monotonic())
sequence = session.start()
logits = sequence.step(range(10, 10 + {PROMPT}))
times.append(time.monotonic())
sequence.step([int(logits[0].argmax())])
times.append(time.monotonic())
memory = {{"peak_bytes": peak_bytes()}}
status = Path("/proc/self/status")
for line in status.read_text().splitlines() if status.exists() else ():
    name, _, value = line.partition(":")
    if name in ("RssAnon", "RssFile"):
        memory[name + "_bytes"] = int(value.split()[0]) * 1024
print(json.dumps({{"times": times, **memory}}))
"""


def start_once(package: Path, threads: int) -> dict[str, Any]:
    """One process: seconds to the end of each stage, and its memory."""
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(package), str(threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    told: dict[str, Any] = json.loads(child.stdout)
    times = [moment - begin for moment in told.pop("times")]
    return {**dict(zip(STAGES, times, strict=True)), **told}


def summarize_rounds(package: Path, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Minimum and median of each stage, the most memory."""
    weights = sum(file.stat().st_size for file in package.glob("model.onnx*"))
    row: dict[str, Any] = {"package": package.name, "model_bytes": weights, "rounds": len(rounds)}
    for stage in STAGES:
        seconds = [found[stage] for found in rounds]
        row[stage] = {
            "min": round(min(seconds), 3),
            "median": round(float(np.median(seconds)), 3),
        }
    for name in rounds[0]:
        if name.endswith("_bytes"):
            row[name] = max(found[name] for found in rounds)
    row["peak_over_model"] = round(row["peak_bytes"] / weights, 3)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    packages = [options.package] + ([options.against] if options.against else [])
    found: dict[Path, list[dict[str, Any]]] = {package: [] for package in packages}
    for number in range(options.rounds + 1):
        for package in packages:
            told = start_once(package, options.threads)
            if number > 0:
                found[package].append(told)
    rows = [summarize_rounds(package, rounds) for package, rounds in found.items()]
    machine = describe_machine(options.threads)
    table = Table("package", *(f"{stage} min" for stage in STAGES), "peak / model", "own memory MB")
    for row in rows:
        own = row.get("RssAnon_bytes")
        values = [row["package"], *(row[stage]["min"] for stage in STAGES), row["peak_over_model"]]
        table.add_row(*map(str, values), str(own // 10**6 if own else ""))
    Console(stderr=True).print(machine, table)
    if options.json:
        result = {"machine": machine, "prompt_tokens": PROMPT, "packages": rows}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
