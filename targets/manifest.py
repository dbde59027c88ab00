"""manifest.json: what a package is, how it was made, and the digest of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from graph_passes.pipeline import describe_pass
from targets.destination import FORMAT, MANIFEST
from targets.graphs import file_of
from targets.target import Graph, Target

FORMAT_VERSION = 1

_TOOLS = ("phi4export", "torch", "onnx", "onnx-ir", "onnxscript", "numpy")


def manifest(
    folder: Path, *, target: Target, facts: Mapping[str, Any], known: Mapping[str, str]
) -> dict[str, Any]:
    """Describe the package in a folder.

    Args:
        folder: complete but for the manifest.
        target: the recipe it was made by.
        facts: of the checkpoint, to be printed as JSON.
        known: SHA-256 by name of files that need not be read again.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "target": target.name,
        "provider": target.provider,
        "cache": target.cache,
        "passes": [describe_pass(apply) for apply in target.passes],
        **({"graphs": [_described(graph) for graph in target.graphs]} if target.graphs else {}),
        "checkpoint": dict(facts),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {tool: found for tool in _TOOLS if (found := _installed(tool))},
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": known.get(name) or _digest(path)}
            for name, path in files.items()
        },
    }


def _described(graph: Graph) -> dict[str, Any]:
    """What a runtime must know of one of several graphs."""
    return {
        "file": file_of(graph),
        "provider": graph.provider,
        "tokens": graph.tokens,
        "passes": [describe_pass(apply) for apply in graph.passes],
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
