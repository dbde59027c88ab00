"""The machine a figure was taken on, and its limit: how fast memory can be read."""

from __future__ import annotations

import datetime
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("onnxruntime", "numpy", "torch", "onnx", "onnx-ir", "onnxscript", "tokenizers")


def describe_machine(threads: int) -> dict[str, Any]:
    """What a reader needs to judge a speed: processor, versions, date, read bandwidth."""
    bandwidth = round(read_bandwidth(threads) / 1e9, 1)
    return {**describe_setup(), "threads": threads, "read_bandwidth_GB_s": bandwidth}


def describe_setup() -> dict[str, Any]:
    """What a reader needs to judge any figure: date, processor, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def read_bandwidth(threads: int, size: int = 1 << 30, rounds: int = 8) -> float:
    """Bytes a second that `threads` threads read from memory, best of `rounds`.

    Each thread takes dot products of its part with itself: numpy's BLAS reads the part once and
    computes less than memory takes.
    """
    data = np.ones(size // 4, np.float32)
    blocks = [
        np.array_split(part, max(1, part.nbytes >> 22)) for part in np.array_split(data, threads)
    ]

    def read(pieces: list[np.ndarray]) -> None:
        for piece in pieces:
            np.dot(piece, piece)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begin = time.perf_counter()
            list(pool.map(read, blocks))
            best = min(best, time.perf_counter() - begin)
    return size / best


def gemm_rate(size: int = 1536, rounds: int = 8) -> float:
    """Operations a second of numpy's float32 matrix product, best of `rounds`, its own threads."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return float(2 * size**3 / best)


def summarize(seconds: list[float]) -> dict[str, float]:
    """Minimum and median in milliseconds, and how many there were."""
    return {
        "min_ms": round(min(seconds) * 1e3, 2),
        "median_ms": round(float(np.median(seconds)) * 1e3, 2),
        "n": len(seconds),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
