"""Olive runs our passes: a package as phi4export's, and the quantizer on models of others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from runtime_py import Session

olive = pytest.importorskip(
    "olive.workflows",
    reason="needs Olive: pip install -e '.[export,test,olive]'",
    exc_type=ImportError,
)
from export.olive_passes import package_config  # noqa: E402 - where there is Olive

pytestmark = pytest.mark.olive
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/olive"
PROMPT = [1, *range(40, 140)]  # past the window, and past a call without control flow

FLOAT, HALF, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Olive notes that it was started before it looks whether it may; not where it sees CI.
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(ROOT)


def written_to(folder: Path, recipe: str, changes: dict[str, Any]) -> dict[str, Any]:
    contents = json.loads((RECIPES / recipe).read_text(encoding="utf-8"))
    places = {"cache_dir": str(folder / "cache"), "output_dir": str(folder / "made")}
    return contents | places | changes


@pytest.fixture
def olive_run(tmp_path: Path):
    """olive_run(recipe, changes) -> the folder that Olive has written."""

    def run(recipe: str, **changes: Any) -> Path:
        olive.run(written_to(tmp_path, recipe, changes), package_config=package_config())
        return tmp_path / "made"

    return run


@pytest.fixture
def olive_command(tmp_path: Path):
    """olive_command(recipe) -> the same, by the two commands that examples/README.md tells."""

    def run(recipe: str) -> Path:
        config, package = tmp_path / "run.json", tmp_path / "olive_package.json"
        config.write_text(json.dumps(written_to(tmp_path, recipe, {})), encoding="utf-8")
        python = [sys.executable, "-m"]
        package.write_bytes(subprocess.check_output([*python, "export.olive_passes"]))
        options = ["--config", str(config), "--package-config", str(package)]
        subprocess.run([*python, "olive", "run", *options, "--disable_telemetry"], check=True)
        return tmp_path / "made"

    return run


def greedy(package: Path) -> tuple[list[int], np.ndarray]:
    sequence = Session(package, threads=1, providers=["CPUExecutionProvider"]).start()
    first = logits = sequence.step(PROMPT)
    tokens = []
    for _ in range(24):
        tokens.append(int(logits[0].argmax()))
        logits = sequence.step(tokens[-1:])
    return tokens, first


@pytest.mark.parametrize("target", ["cpu-int4", "directml-int4"])
def test_a_recipe_makes_the_package_that_phi4export_makes(export, olive_command, target) -> None:
    expected, made = export(None, target), olive_command(f"{target.replace('-', '_')}.json")
    (tokens, logits), (found, found_logits) = greedy(expected), greedy(made)
    assert found == tokens
    np.testing.assert_array_equal(found_logits, logits)
    names = {path.name for path in expected.iterdir()}
    assert names <= {path.name for path in made.iterdir()}
    # The manifest tells the day and the tool; the graph may name its nodes otherwise.
    for name in names - {"manifest.json", "model.onnx"}:
        assert (made / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_recipe_may_say_which_bits_a_weight_gets(export, olive_run, tmp_path) -> None:
    weights = {"default": {"bits": 8}, "rules": {"*.x_proj.*": None, "*.dt_proj.*": None}}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(weights), encoding="utf-8")
    expected = export(None, "cpu-int4", "--portable", "--recipe", str(recipe))
    step = {"type": "SambaYTarget", "target": "cpu-int4", "recipe": weights, "portable": True}
    made = olive_run("cpu_int4.json", passes={"trace": {"type": "SambaYExport"}, "package": step})
    assert not list(made.glob("sambay_ops*"))
    data = "model.onnx.data"
    assert (made / data).read_bytes() == (expected / data).read_bytes()
    assert greedy(made)[0] == greedy(expected)[0]


def other_model(folder: Path, dtype: ir.DataType) -> Path:
    """A network of somebody else: two layers by weights, one product of activations, rows alone."""
    random = np.random.default_rng(2)
    inputs = [
        ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for name, shape in (("x", ["rows", 48]), ("row", [40]))
    ]
    weights = [
        ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape),
            const_value=ir.tensor(random.normal(size=shape).astype(dtype.numpy()), name=name),
        )
        for name, shape in (("first[0].weight", (48, 96)), ("second.weight", (96, 40)))
    ]  # fmt: skip
    nodes = [ir.node("MatMul", [inputs[0], weights[0]]), ir.node("Relu", [])]
    nodes[1] = ir.node("Relu", nodes[0].outputs)
    nodes.append(ir.node("MatMul", [nodes[1].outputs[0], weights[1]]))
    nodes.append(ir.node("MatMul", [nodes[2].outputs[0], inputs[1]], name="activations"))
    output = nodes[3].outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape(["rows"])
    graph = ir.Graph(
        inputs, [output], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="other"
    )
    path = folder / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def answers(model: Path, dtype: ir.DataType) -> np.ndarray:
    random = np.random.default_rng(3)
    feeds = {
        "x": random.normal(size=(5, 48)).astype(dtype.numpy()),
        "row": random.normal(size=40).astype(dtype.numpy()),
    }
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def quantized_products(model: Path) -> list[str]:
    return [node.op_type for node in ir.load(model).graph if "MatMul" in node.op_type]


@pytest.mark.parametrize(
    ("dtype", "bits", "worst"), [(FLOAT, 8, 0.02), (FLOAT, 4, 0.2), (HALF, 8, 0.02)]
)
def test_the_quantizer_takes_a_model_of_others(olive_run, tmp_path, dtype, bits, worst) -> None:
    model = other_model(tmp_path, dtype)
    quantize = {
        "type": "BlockQuantization",
        "recipe": {"default": {"bits": bits}},
        "accuracy_level": 0,
    }
    made = olive_run(
        "quantize.json",
        input_model={"type": "ONNXModel", "model_path": str(model)},
        passes={"quantize": quantize},
    )
    assert quantized_products(made / "model.onnx") == ["MatMulNBits", "MatMulNBits", "MatMul"]
    expected, found = answers(model, dtype), answers(made / "model.onnx", dtype)
    assert found.dtype == expected.dtype
    assert np.linalg.norm((found - expected).astype(float)) < worst * np.linalg.norm(
        expected.astype(float)
    )
    assert not np.array_equal(found, expected)


def test_products_that_no_kernel_quantizes_stay(olive_run, tmp_path) -> None:
    made = olive_run("quantize.json", input_model={
        "type": "ONNXModel", "model_path": str(other_model(tmp_path, DOUBLE))})  # fmt: skip
    assert quantized_products(made / "model.onnx") == ["MatMul"] * 3


def test_ours_and_olives_own_passes_run_in_one_workflow(olive_run, tmp_path) -> None:
    """A package config replaces Olive's: its passes must still be found."""
    model = other_model(tmp_path, FLOAT)
    rules = {"second*": None}
    made = olive_run(
        "quantize.json",
        input_model={"type": "ONNXModel", "model_path": str(model)},
        passes={
            "ours": {"type": "BlockQuantization", "recipe": {"rules": rules}},
            "theirs": {"type": "OnnxBlockWiseRtnQuantization", "block_size": 16},
        },
    )
    assert quantized_products(made / "model.onnx") == ["MatMulNBits", "MatMulNBits", "MatMul"]
    assert np.isfinite(answers(made / "model.onnx", FLOAT)).all()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"type": "SambaYExport"}, "expected a PyTorchModel"),
        ({"type": "SambaYTarget", "target": "cpu-int4"}, "put a SambaYExport before"),
        ({"type": "SambaYTarget", "target": "cpu-int5"}, "did you mean cpu-int"),
        ({"type": "BlockQuantization", "recipe": {"embedding": {}}}, "products only"),
        ({"type": "BlockQuantization", "recipe": {"equalize": True}}, "needs calibration text"),
        (
            {
                "type": "SambaYTarget",
                "target": "cpu-int4",
                "recipe": {"default": {"quantizer": "gptq"}},
            },
            "needs calibration text",
        ),
        ({"type": "BlockQuantization", "recipe": {"rules": {"third*": None}}}, "'third\\*'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_input_is_told_by_its_cause(olive_run, tmp_path, step, message) -> None:
    source = {"type": "ONNXModel", "model_path": str(other_model(tmp_path, FLOAT))}
    with pytest.raises(ValueError, match=message):
        olive_run("quantize.json", input_model=source, passes={"step": step})
