"""Compile a package's graphs for the NPU of this machine, so that opening it takes no time.

    python -m runtime_py.compile PACKAGE

What it makes stands beside the graphs and fits this device and this version of the provider only:
compile again after a change of either. Every session of the package takes it from then on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from runtime_py.errors import InputError, PackageError
from runtime_py.package import MANIFEST, find_model
from runtime_py.pipeline import read_stages
from runtime_py.plugins import MODULES, add_plugin, compiled_file, is_installed


@dataclass(frozen=True)
class Compiled:
    """One graph compiled: its file, bytes with those beside it, seconds it took."""

    file: Path
    size: int
    seconds: float


def compile_package(path: str | Path) -> Iterator[Compiled]:
    """Compile every graph for a provider of its own, one after the other.

    Args:
        path: the package folder.

    Raises:
        PackageError: there is no package, or its provider cannot compile a graph.
        InputError: it has nothing to compile, or the provider is not installed.
    """
    manifest = find_model(path)
    stages = read_stages(manifest) if manifest.name == MANIFEST else ()
    stages = tuple(stage for stage in stages if stage.provider in MODULES)
    if not stages:
        raise InputError(f"{path} has no graph for {', '.join(MODULES)}: nothing to compile")
    for stage in stages:
        if not is_installed(stage.provider):
            module = MODULES[stage.provider].replace("_", "-")
            raise InputError(f"{stage.provider} is not installed: pip install {module}")
    for stage in stages:
        yield _compile(manifest.with_name(stage.file), stage.provider)


def _compile(graph: Path, provider: str) -> Compiled:
    made, begin = compiled_file(graph), time.perf_counter()
    beside = f"{made.stem}*"  # the provider names the second file after the first
    _remove(made, beside)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        add_plugin(options, provider, made)
        ort.InferenceSession(str(graph), options)
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        _remove(made, beside)
        reason = " ".join(str(error).split())[:300]
        raise PackageError(f"{graph} cannot be compiled for {provider} ({reason})") from error
    size = sum(file.stat().st_size for file in made.parent.glob(beside))
    return Compiled(made, size, time.perf_counter() - begin)


def _remove(made: Path, beside: str) -> None:
    for file in made.parent.glob(beside):
        file.unlink()


def main(arguments: Many[str] | None = None) -> int:
    """Run the command; status 2 with one line on stderr for a wrong input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m runtime_py.compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path, help="the package folder")
    options = parser.parse_args(arguments)
    try:
        for made in compile_package(options.package):
            print(f"{made.file}: {made.size / 1e6:,.1f} MB in {made.seconds:.1f} s")
    except (InputError, PackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
