"""Tokens a second when reading a prompt; with two packages, their ratio, in alternating blocks.

    python -m benchmarks.prefill PACKAGE [--against PACKAGE] [--tokens 512] [--blocks 3]

`--against` a package of the same checkpoint made with `phi4export --all-logits` shows what the cut
inside the shared attention layer saves: that package runs every layer and the head for every token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.machine import describe_machine
from runtime_py import Session


def tokens_per_second(session: Session, tokens: int) -> float:
    """Speed of one prompt from a fresh sequence."""
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, tokens)
    sequence = session.start()
    begin = time.perf_counter()
    sequence.step(ids)
    return tokens / (time.perf_counter() - begin)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    paths = [options.package] + ([options.against] if options.against else [])
    found: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(options.blocks):
        for path in paths:  # one session at a time: idle ones disturb the other by spinning
            session = Session(path, threads=options.threads)
            session.start().step([1, 2, 3])
            found[path].append(tokens_per_second(session, options.tokens))
            del session
    rates = {
        path: {"max": round(max(speeds), 1), "median": round(float(np.median(speeds)), 1)}
        for path, speeds in found.items()
    }
    result = {
        "machine": describe_machine(options.threads),
        "tokens": options.tokens,
        "blocks": options.blocks,
        "tokens_per_second": {path.name: rate for path, rate in rates.items()},
    }
    if options.against:
        first, second = rates[options.package], rates[options.against]
        result["ratio_of_medians"] = round(first["median"] / second["median"], 2)
    Console(stderr=True).print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
