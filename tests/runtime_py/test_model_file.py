from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime_py.model_file import read_metadata_props

LONG = "x" * 300


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = onnx.helper.make_graph([], "g", [], [])
    weight = onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "w")
    graph.initializer.append(weight)
    proto = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(proto, {"sambay.target": "cpu-int4", "long": LONG, "empty": ""})
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_metadata_are_read_without_the_model(model: Path) -> None:
    expected = {"sambay.target": "cpu-int4", "long": LONG, "empty": ""}
    assert read_metadata_props(model) == expected


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 15_000])
def test_a_file_cut_off_anywhere_has_none_or_what_stands_before(model: Path, kept: int) -> None:
    model.write_bytes(model.read_bytes()[:kept])
    assert read_metadata_props(model) == {}


@pytest.mark.parametrize("data", [b"not an ONNX file", b"\xff" * 20, b"{}"])
def test_another_file_has_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    assert read_metadata_props(tmp_path / "model.onnx") == {}
    assert read_metadata_props(tmp_path / "nothing.onnx") == {}
