"""A package exported once runs in the oldest ONNX Runtime that we take, native and portable."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime_py import Session
from runtime_py.native import library_path

pytestmark = pytest.mark.oldest
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("OLDEST_PYTHON")  # as seen from where pytest was started
CALLS = (10, 1, 1, 40, 1, 130, 5)  # tokens: a step each, prompts of both kinds, past the window
# Versions round the inputs of products to 8 bits each in their way, one no worse than the other.
NO_WORSE, EXACT = 1.3, 1e-4

RUN = f"""
import sys
import numpy as np
import onnxruntime
from runtime_py import Session
sequence, random = Session(sys.argv[1], threads=1).start(), np.random.default_rng(3)
logits = [sequence.step(random.integers(0, 256, count)) for count in {CALLS}]
np.save(sys.argv[2], np.concatenate(logits))
print(onnxruntime.__version__)
"""


@pytest.mark.skipif(PYTHON is None, reason="set OLDEST_PYTHON as CONTRIBUTING.md says")
@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
@pytest.mark.parametrize(
    "options",
    [("cpu-fp32",), ("cpu-int8",), ("cpu-int4",), ("cpu-int4", "--cache", "int8")],
    ids=" ".join,
)
def test_the_oldest_runtime_gives_the_logits_of_this_one(
    export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    native: bool,
) -> None:
    if native and library_path() is None:
        pytest.skip("the native operators were not built: needs a C++ compiler")
    package = export(None, *options)
    monkeypatch.setenv("SAMBAY_NATIVE", str(int(native)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    python = str(Path(str(PYTHON)).absolute())
    command = [python, "-c", RUN, str(package), str(tmp_path / "logits.npy")]
    done = subprocess.run(
        command, check=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.startswith("1.24.")
    found, expected = np.load(tmp_path / "logits.npy"), logits_of(package)
    exact = logits_of(export(None, "cpu-fp32"))
    assert error(found, exact) <= NO_WORSE * error(expected, exact) + EXACT


def logits_of(package: Path) -> np.ndarray:
    """What this ONNX Runtime gives for the same tokens."""
    sequence, random = Session(package, threads=1).start(), np.random.default_rng(3)
    return np.concatenate([sequence.step(random.integers(0, 256, count)) for count in CALLS])


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.square(found - exact).mean()))
