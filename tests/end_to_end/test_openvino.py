"""OpenVINO, in a Python of its own with its own onnxruntime, runs the package made for it."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from runtime_py import Session

pytestmark = pytest.mark.openvino
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("OPENVINO_PYTHON")  # as seen from where pytest was started
CALLS = (10, 1, 1, 40, 1, 130, 5)  # tokens: past the window, and past the longest call

# Runs where torch and onnx are missing; the default provider is the package's.
SCRIPT = f"""
import sys
import numpy as np
from runtime_py import Session
session = Session(sys.argv[1])
assert session.model.get_providers()[0] == "OpenVINOExecutionProvider"
sequence, random = session.start(), np.random.default_rng(3)
logits = [sequence.step(random.integers(0, 256, count)) for count in {CALLS}]
np.save(sys.argv[2], np.concatenate(logits))
"""


@pytest.mark.skipif(PYTHON is None, reason="set OPENVINO_PYTHON as CONTRIBUTING.md says")
def test_openvino_gives_the_logits_of_the_cpu_provider(export, tmp_path: Path) -> None:
    package = export(None, "openvino-int4")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [
        str(Path(str(PYTHON)).absolute()),
        "-c",
        SCRIPT,
        str(package),
        str(tmp_path / "logits.npy"),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    sequence, random = (
        Session(package, providers=["CPUExecutionProvider"]).start(),
        np.random.default_rng(3),
    )
    expected = [sequence.step(random.integers(0, 256, count)) for count in CALLS]
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), np.concatenate(expected), atol=2e-3, rtol=0
    )
