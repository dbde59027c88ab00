"""Weights that other tools quantized behind DequantizeLinear are read back as a runtime does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.checkpoint import open_checkpoint
from export.verify import stored_weights
from export.verify.compare import error_of
from export.verify.stored_weights import compare_weights
from export.weights import read_weight

CHECKPOINT = open_checkpoint(Path(__file__).parents[1] / "golden" / "C4")
NAME = "model.layers.1.mlp.fc1.weight"

# transposed, axis, block size, zero points, dtype
LAYOUTS = {
    "a scale for each output, transposed": (True, 1, 0, False, np.int8),
    "a scale for each output": (False, 0, 0, True, np.uint8),
    "a scale for each input": (False, 1, 0, False, np.int8),
    "a scale for each input, transposed": (True, 0, 0, True, np.int8),
    "blocks along rows": (False, 1, 16, True, np.uint8),
    "blocks along rows, transposed": (True, 0, 16, True, np.int8),
    "blocks across rows": (False, 0, 32, False, np.int8),
    "blocks across rows, transposed": (True, 1, 32, True, np.uint8),
    "one scale": (False, 1, None, True, np.uint8),
}


def dequantizing(
    weight: np.ndarray, axis: int, block: int | None, zero_points: bool, dtype: type
) -> list[np.ndarray]:
    """Random integers of a weight's shape, and their scales and zero points."""
    random = np.random.default_rng(0)
    shape: list[int] = [] if block is None else [weight.shape[axis]]
    if block:
        shape = list(weight.shape)
        shape[axis] = -(-shape[axis] // block)
    values = random.integers(1, 100, weight.shape).astype(dtype)
    parts = [values, random.uniform(0.001, 0.01, shape).astype(np.float32)]
    if zero_points:
        parts.append(random.integers(40, 60, shape).astype(dtype))
    return parts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_back_is_what_a_runtime_computes_with(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    transposed, axis, block, zero_points, dtype = LAYOUTS[layout]
    wanted = read_weight(CHECKPOINT.tensors[NAME]).numpy()
    parts = dequantizing(wanted.T if transposed else wanted, axis, block, zero_points, dtype)
    stem = f"{NAME}.transposed" if transposed else NAME
    names = [stem, f"{stem}.scales", f"{stem}.zero_points"]
    values = [
        ir.Value(name=name, const_value=ir.tensor(part, name=name))
        for name, part in zip(names, parts, strict=False)
    ]
    node = ir.node("DequantizeLinear", values, {"axis": axis, "block_size": block or 0})
    node.outputs[0].name, node.outputs[0].dtype = "decoded", ir.DataType.FLOAT
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="one"
    )
    model = ir.Model(graph, ir_version=10)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    decoded = session.run(None, {})[0]
    expected = error_of(wanted, decoded.T if transposed else decoded)

    monkeypatch.setattr(stored_weights, "_CHUNK", 5 * wanted.shape[1])  # rows at once
    (found,), left_out = compare_weights(model, CHECKPOINT)
    assert left_out == []
    assert (found.name, found.bits) == (NAME, 8)
    assert found.bytes == sum(part.nbytes for part in parts)
    assert found.snr_db == pytest.approx(expected.snr_db, rel=1e-5)
    assert found.largest == pytest.approx(expected.largest, rel=1e-5)
