"""Optimum's own export function writes our graph, states included, and finds it equal to torch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from export.cli import REFERENCE
from runtime_py import Session

optimum = pytest.importorskip(
    "optimum.exporters.onnx",
    reason="needs Optimum: pip install -e '.[export,test,optimum]'",
    exc_type=ImportError,
)
from export.optimum_hook import register  # noqa: E402 - where there is Optimum

pytestmark = pytest.mark.optimum
PROMPT = [1, *range(40, 140)]  # past the window


def export_by_optimum(checkpoint: Path, folder: Path) -> Path:
    register()
    task = "text-generation-with-past"
    optimum.main_export(str(checkpoint), folder, task=task, library_name="transformers")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return export_by_optimum(REFERENCE, tmp_path_factory.mktemp("optimum"))


def test_the_model_answers_as_that_of_phi4export(export: Callable[..., Path], made: Path) -> None:
    theirs, ours = (Session(each, threads=1) for each in (made, export(None, "cpu-fp32")))
    a, b, ids = theirs.start(), ours.start(), PROMPT
    for _ in range(24):
        logits = a.step(ids)
        np.testing.assert_array_equal(logits, b.step(ids))
        ids = [int(logits[0].argmax())]
    assert theirs.tokenizer.encode("12 + 30") == ours.tokenizer.encode("12 + 30")


def test_states_keep_their_names_and_symbolic_sizes(made: Path) -> None:
    session = ort.InferenceSession(str(made / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in (*session.get_inputs(), *session.get_outputs())}
    for side in ("past_key_values", "present"):
        assert shapes[f"{side}.0.recurrent_state"] == ["batch", 256, 16]
        assert shapes[f"{side}.1.key"] == ["batch", 4, "window", 16]
        assert shapes[f"{side}.5.value"] == ["batch", 4, "capacity", 16]


def test_no_path_of_this_machine_is_written(made: Path) -> None:
    for file in made.iterdir():
        assert str(REFERENCE).encode() not in file.read_bytes(), file.name
    assert json.loads((made / "config.json").read_text())["model_type"] == "phi4flash"


def test_a_damaged_checkpoint_is_told_by_its_cause(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(REFERENCE, tmp_path / "checkpoint")
    weights = next(checkpoint.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # a NaN in each float type
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        export_by_optimum(checkpoint, tmp_path / "made")
