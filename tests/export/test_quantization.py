"""What the command line says about quantization."""

import functools
import json
import re
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE, main
from export.quantize.calibration import Calibration
from export.quantize.options import Quantization, quantized_as_told
from export.trace import trace
from graph_passes.recipe import WeightFormat
from targets import DEFAULT, find_target
from targets.recipes import recipe_of
from targets.target import Target

NPU = ["--target", "qnn-npu-w4a16", "--activations", "uint16"]
TEXT = "<|user|>What is 12 + 7?<|end|><|assistant|>2+7+0=9c0 1+0+0=1c0 19<|end|>" * 12


def told(**options: object) -> Quantization:
    nothing = {"recipe": None, "quantizer": None, "calibration": None, "folder": None}
    return Quantization(**{**nothing, **options})


def shaped(target: Target, quantization: Quantization, said: list[str] | None = None) -> Target:
    progress = [].append if said is None else said.append
    checkpoint = open_checkpoint(REFERENCE)
    with quantized_as_told(target, quantization, checkpoint, traced(), progress) as result:
        return result


@functools.cache
def traced() -> ir.Model:
    return trace(open_checkpoint(REFERENCE))


def test_nothing_told_changes_nothing() -> None:
    assert recipe_of(shaped(DEFAULT, told())) == recipe_of(DEFAULT)
    full = find_target("cpu-fp32")
    assert shaped(full, told()) is full


def test_a_recipe_file_and_a_quantizer_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"default": {"bits": 8}, "rules": {"*.fc1.*": None}}))
    result = recipe_of(shaped(DEFAULT, told(recipe=file, quantizer="rtn")))
    scale_type = recipe_of(DEFAULT).default.scale_type  # what the target reads
    assert result.default == WeightFormat(bits=8, quantizer="rtn", scale_type=scale_type)
    assert result.rules == (("*.fc1.*", None),)


def test_gptq_collects_what_it_needs_and_keeps_it_where_told(tmp_path: Path) -> None:
    text, folder, said = tmp_path / "text", tmp_path / "kept", []
    text.write_text(TEXT)
    target = shaped(DEFAULT, told(quantizer="gptq", calibration=text, folder=folder), said)
    assert said[0] == "calibrating: 0 of 8 layers"
    assert "calibrating: 8 of 8 layers" in said
    assert said[-1] == "evening out inputs: 8 of 8 layers"
    found = next(
        apply.keywords["calibration"]
        for apply in target.passes
        if "calibration" in getattr(apply, "keywords", {})
    )
    assert isinstance(found, Calibration)
    assert (folder / "model.layers.7.mlp.fc2.weight.npy").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantizer", "awq"], "quantizer is 'awq', expected one of"),
        (["--calibration", "{text}"], "add --quantizer gptq"),
        (["--calibration-cache", "x", "--quantizer", "rtn"], "add --quantizer gptq"),
        (["--quantizer", "gptq", "--calibration", "{empty}"], "empty.txt is empty"),
        (["--quantizer", "gptq", "--calibration", "{short}"], "tokens, expected 128 or more"),
        (["--quantizer", "gptq", "--calibration", "{none}"], "none.txt cannot be read"),
        (["--quantizer", "rtn", "--target", "cpu-fp32"], "stores weights in full"),
        (["--recipe", "{none}"], "none.txt cannot be read"),
        (["--recipe", "{text}"], "recipe .*text.txt is no JSON"),
        (["--recipe", "{wrong}"], r"wrong.txt: format of 'default': block_size is 24"),
        (["--recipe", "{nowhere}"], r"no weight of a linear layer matches '\*\.fc3\.\*'"),
        (["--recipe", "{wrong}", "--size-budget", "1MB"], "both choose the bits"),
        (["--activations", "uint16"], "choice of NPU targets, and cpu-int4 is for CPU"),
        (["--activations", "float16", "--target", "directml-int4"], "choice of NPU targets"),
        ([*NPU, "--calibration", "{empty}"], "empty.txt is empty"),
        ([*NPU, "--calibration", "{none}"], "none.txt cannot be read"),
        ([*NPU, "--calibration-cache", "x"], "add --quantizer gptq"),
        ([*NPU, "--checkpoint", "{bare}"], "activations need text of the kind .*--calibration"),
        (["--ranges", "mse"], "--ranges mse would not be used: .*add --activations uint16"),
    ],
)
def test_bad_input_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    files = {
        "text": TEXT,
        "empty": "\n",
        "short": "Hello",
        "wrong": '{"default": {"block_size": 24}}',
        "nowhere": '{"default": {"quantizer": "gptq"}, "rules": {"*.fc3.*": null}}',
    }
    for name, contents in files.items():
        (tmp_path / f"{name}.txt").write_text(contents)
    paths = {name: tmp_path / f"{name}.txt" for name in (*files, "none")}
    paths["bare"] = tmp_path / "bare"
    shutil.copytree(REFERENCE, paths["bare"], ignore=lambda *_: ["quantization.txt"])
    output = tmp_path / "package"
    status = main([*(argument.format(**paths) for argument in arguments), "-o", str(output)])
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert error.splitlines()[-1].startswith("phi4export: error: ")
    assert re.search(message, error), error
    assert not output.exists()
