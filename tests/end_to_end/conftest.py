"""Checkpoints of other sizes than the goldens', and packages made of them."""

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import open_checkpoint
from export.trace import trace
from graph_passes.pipeline import run_passes
from targets import find_target
from targets.caches import with_cache
from targets.package import write_package
from tests.end_to_end.random_weights import write_checkpoint
from tests.end_to_end.sizes import COMMON, REAL_WIDTHS, SIZES


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, and what is in it."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Write a checkpoint of one of the sizes, once a test session: written(name)."""

    @functools.cache
    def write(name: str) -> Written:
        dtype, sizes = SIZES[name]
        folder, config = tmp_path_factory.mktemp("checkpoint"), COMMON | sizes
        return Written(folder, config, write_checkpoint(folder, config, dtype))

    return write


@pytest.fixture(scope="session")
def real_widths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """The published widths in few layers: 0.6 billion weights."""
    folder, config = tmp_path_factory.mktemp("checkpoint"), COMMON | REAL_WIDTHS
    yield Written(folder, config, write_checkpoint(folder, config, "BF16"))
    shutil.rmtree(folder, ignore_errors=True)  # pytest would keep it for two more sessions


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, str], Path]]:
    """Make a package with float32 caches, once a test session: package(checkpoint, target).

    Tracing takes most of an export; all targets share one trace of a checkpoint.
    """
    folder = tmp_path_factory.mktemp("packages")

    @functools.cache
    def traced(checkpoint: Path) -> ir.Model:
        return trace(open_checkpoint(checkpoint))

    @functools.cache
    def make(checkpoint: Path, name: str) -> Path:
        target = with_cache(find_target(name), "float32")
        model = run_passes(traced(checkpoint), target.passes)
        destination = folder / f"{len(list(folder.iterdir()))}-{name}"
        return write_package(model, destination, target=target, facts={})

    yield make
    shutil.rmtree(folder, ignore_errors=True)
