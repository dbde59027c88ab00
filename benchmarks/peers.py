"""A package against other engines on Phi-4-mini's shape: how many times faster, by depth.

    python -m benchmarks.peers PACKAGE --peer ort-full-attention --peer llama.cpp
        [--peer-python PATH] [--peer-models DIR] [--depths 0,2048,8192,32768] [--prompts 512]
        [--blocks 3] [--threads 2] [--seconds 4] [--json FILE]

In every block each of them runs once, in a process of its own that ends before the next begins:
sessions side by side disturb each other by spinning. Models of the peers have random weights and
are made once in `--peer-models` (2.4 GB each; default: a temporary folder). Caches are filled
without a prefill. A peer with several settings is represented by its fastest at each depth.
Run nothing else meanwhile: one busy process beside a run on two cores triples a figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, gemm_rate, summarize
from benchmarks.peer_models import PHI_4_MINI, Shape, write_gguf, write_onnx
from runtime_py.errors import InputError, PackageError

ROOT = Path(__file__).parents[1]
INSTALL = "pip install llama-cpp-python (it compiles for minutes)"

SUMMARY = ("min_ms", "median_ms")

# What a worker prints last: setting -> place ("depth 2048", "prompt 512") -> seconds of each run.
Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Job:
    """What one process times, given to it as JSON; it prints `Times` as its last line.

    Attributes:
        depths: tokens before a step of one token, repeated for `seconds`.
        prompts: lengths of prompts, each read once after a short one.
    """

    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    threads: int
    seconds: float


@dataclass(frozen=True)
class Peer:
    """Another engine: its model's file, who writes it, and what runs it."""

    file: str
    write: Callable[[Path, Shape], None]
    worker: tuple[str, ...]
    version: str  # Python expression, after which the engine is known to be there
    install: str


PEERS = {
    "ort-full-attention": Peer(
        "phi4mini-random-int4.onnx",
        write_onnx,
        ("-m", "benchmarks.peer_ort"),
        "__import__('onnxruntime').__version__",
        "pip install onnxruntime numpy",
    ),
    "llama.cpp": Peer(
        "phi4mini-random-q4_0.gguf",
        write_gguf,
        (str(ROOT / "benchmarks" / "peer_llama.py"),),
        "__import__('llama_cpp').__version__",
        INSTALL,
    ),
}


def find_version(name: str, python: str) -> str:
    """The version of a peer that an interpreter has.

    Raises:
        InputError: there is no such interpreter, or it lacks the peer.
    """
    peer = PEERS[name]
    try:
        child = subprocess.run(
            [python, "-c", f"print({peer.version})"], capture_output=True, text=True, cwd=ROOT
        )
    except OSError as error:
        raise InputError(f"--peer-python {python}: {error.strerror}; give a Python") from error
    if child.returncode:
        raise InputError(
            f"peer {name} is not installed for {python}: in a venv, {peer.install}; "
            "then give its interpreter as --peer-python PATH"
        )
    return child.stdout.strip()


def run_worker(command: list[str], job: Job) -> Times:
    """Time one engine in a process of its own.

    Raises:
        PackageError: the process failed.
    """
    child = subprocess.run(
        [*command, json.dumps(asdict(job))], capture_output=True, text=True, cwd=ROOT
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise PackageError(f"{' '.join(command)} ended with {child.returncode}: {last}")
    times: Times = json.loads(child.stdout.strip().splitlines()[-1])
    return times


def make_model(peer: Peer, folder: Path, shape: Shape) -> Path:
    """The peer's model in a folder, written if it is not there."""
    path = folder / peer.file
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            peer.write(Path(partial, peer.file), shape)
            for made in sorted(Path(partial).iterdir(), reverse=True):  # weights before the model
                made.rename(folder / made.name)
    return path


def compare(ours: list[Times], theirs: list[Times]) -> list[dict[str, Any]]:
    """Ratios of a peer's times to the package's at each place.

    Args:
        ours: one entry a block, of one setting.
        theirs: the same blocks of the peer, any number of settings.

    Returns:
        For each place both summaries, and how many times faster the package is by minimum, by
        median and by the median of each block; each takes the peer's best setting there.
    """
    rows = []
    for place in next(iter(ours[0].values())):
        mine = [next(iter(block.values()))[place] for block in ours]
        settings = {name: [block[name][place] for block in theirs] for name in theirs[0]}
        package = summarize(list(chain(*mine)))
        peer = {name: summarize(list(chain(*blocks))) for name, blocks in settings.items()}
        best = {part: min(peer, key=lambda name: peer[name][part]) for part in SUMMARY}
        row: dict[str, Any] = {"place": place, "package": package, "peer": peer, "best": best}
        for part, name in best.items():
            row[f"ratio_{part.removesuffix('_ms')}"] = round(peer[name][part] / package[part], 2)
        chosen = settings[best["median_ms"]]
        row["ratio_by_block"] = [
            round(float(np.median(b) / np.median(a)), 2) for a, b in zip(mine, chosen, strict=True)
        ]
        rows.append(row)
    return rows


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every block and compare."""
    job = Job(options.depths, options.prompts, options.threads, options.seconds)
    commands = {"": [sys.executable, "-m", "benchmarks.peer_package", str(options.package)]}
    versions = {}
    for name in options.peer:
        python = options.peer_python if name == "llama.cpp" else sys.executable
        versions[name] = find_version(name, python)
        commands[name] = [python, *PEERS[name].worker]
    for name in options.peer:
        commands[name].append(str(make_model(PEERS[name], folder, PHI_4_MINI)))
    machine = describe_machine(options.threads)
    machine["float32_GEMM_GOP_s"] = round(gemm_rate() / 1e9, 1)
    found: dict[str, list[Times]] = {name: [] for name in commands}
    for block in range(options.blocks):
        for name, command in commands.items():
            told = f"block {block + 1} of {options.blocks}: {name or options.package.name}"
            print(told, file=sys.stderr, flush=True)
            found[name].append(run_worker(command, job))
    peers = {
        name: {"version": version, "places": compare(found[""], found[name])}
        for name, version in versions.items()
    }
    return {"machine": machine, "blocks": options.blocks, "peers": peers}


def show(result: dict[str, Any]) -> None:
    """Print a table for each peer."""
    console = Console(stderr=True)
    console.print(result["machine"])
    for name, peer in result["peers"].items():
        columns = ("package ms: min", "median", "peer: min", "median", "best setting")
        title = f"{name} {peer['version']}"
        table = Table("", *columns, "x: min", "median", "by block", title=title)
        for row in peer["places"]:
            best, package = row["best"], row["package"]
            values = [row["place"], package["min_ms"], package["median_ms"]]
            values += [row["peer"][best[part]][part] for part in SUMMARY]
            values += [best["median_ms"], row["ratio_min"], row["ratio_median"]]
            values.append(" ".join(map(str, row["ratio_by_block"])))
            table.add_row(*map(str, values))
        console.print(table)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--peer", action="append", choices=PEERS, required=True)
    parser.add_argument("--peer-python", default=sys.executable, help="that has llama-cpp-python")
    parser.add_argument("--peer-models", type=Path, help="folder that keeps the peers' models")
    parser.add_argument("--depths", type=_numbers, default=(0, 2048, 8192, 32768))
    parser.add_argument("--prompts", type=_numbers, default=(512,))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="at each depth of each block")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.package = options.package.resolve()  # workers start in this project's root
    try:
        with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
            folder = (options.peer_models or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            result = measure(options, folder)
    except (InputError, PackageError) as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 2
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
