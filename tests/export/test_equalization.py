"""Loud inputs are evened out: exactly, where it helps, and so that weights can be compared."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import Checkpoint, open_checkpoint
from export.cli import REFERENCE, main
from export.quantize import options
from export.quantize.calibration import Calibration, collect
from export.quantize.equalization import find_scalings, first_projection
from export.quantize.options import TEXT, Quantization
from export.trace import trace
from export.verify.stored_weights import compare_weights
from graph_passes.equalize import EQUALIZED, EqualizedCalibration, Scaling, Scalings, equalize
from graph_passes.recipe import WeightFormat
from runtime_py import Session
from runtime_py.tokenizer import Tokenizer
from targets import find_target
from targets.package import write_package

FORM = WeightFormat()
LOUD = 4  # doublings
TOKENS = 2000


def loud_scalings(checkpoint: Checkpoint) -> tuple[Scalings, dict[str, np.ndarray]]:
    """The inverse of what is to be found, and the loud channels of every layer's inputs."""
    random, found, loud = np.random.default_rng(0), Scalings(), {}
    for index in range(checkpoint.config.num_hidden_layers):
        layer = f"model.layers.{index}."
        fc1, fc2 = f"{layer}mlp.fc1.weight", f"{layer}mlp.fc2.weight"
        for name in (first_projection(checkpoint, index), fc1, fc2):
            exponents = np.zeros(checkpoint.tensors[name].shape[1], np.int8)
            exponents[random.permutation(len(exponents))[: len(exponents) // 40]] = LOUD
            loud[name] = exponents
        for norm, name in (
            ("input_layernorm", first_projection(checkpoint, index)),
            ("post_attention_layernorm", fc1),
        ):
            found[name] = Scaling(columns=-loud[name])
            for part in ("weight", "bias"):
                found[f"{layer}{norm}.{part}"] = Scaling(rows=loud[name])
        rows = np.concatenate([np.zeros_like(loud[fc2]), loud[fc2]])
        found[fc1] = Scaling(rows=rows, columns=-loud[fc1])
        found[fc2] = Scaling(columns=-loud[fc2])
    return found, loud


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with a few loud inputs everywhere; it computes what it computed."""
    folder = tmp_path_factory.mktemp("loud") / "checkpoint"
    shutil.copytree(REFERENCE, folder)
    checkpoint = open_checkpoint(folder)
    for name, scaling in loud_scalings(checkpoint)[0].items():
        tensor = checkpoint.tensors[name]
        numbers = np.memmap(
            tensor.path, ml_dtypes.bfloat16, "r+", offset=tensor.offset, shape=tensor.shape
        )
        scaled = np.asarray(numbers, np.float32)
        if scaling.columns is not None:
            scaled = np.ldexp(scaled, scaling.columns)
        if scaling.rows is not None:
            rows = scaling.rows
            scaled = np.ldexp(scaled, rows.reshape(-1, *[1] * (scaled.ndim - 1)))
        numbers[...] = scaled.astype(ml_dtypes.bfloat16)
        numbers.flush()
    return folder


@pytest.fixture(scope="module")
def traced(loud: Path) -> ir.Model:
    return trace(open_checkpoint(loud))


@pytest.fixture(scope="module")
def calibration(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    ids = Tokenizer(REFERENCE).encode((REFERENCE / TEXT).read_text(encoding="utf-8"))
    return collect(open_checkpoint(loud), ids[:TOKENS], tmp_path_factory.mktemp("moments"))


@pytest.fixture(scope="module")
def scalings(loud: Path, calibration: Calibration) -> Scalings:
    return find_scalings(open_checkpoint(loud), lambda _: FORM, calibration)


def test_loud_inputs_are_found_and_what_makes_them_is_scaled_back(
    loud: Path, scalings: Scalings
) -> None:
    checkpoint = open_checkpoint(loud)
    for name, exponents in loud_scalings(checkpoint)[1].items():
        found = scalings[name].columns
        assert found is not None
        raised = found[exponents > 0].mean() - found[exponents == 0].mean()
        assert 0.5 < raised <= LOUD, name
    norm = scalings["model.layers.0.input_layernorm.weight"]
    reader = scalings["model.layers.0.attn.in_proj.weight"]
    np.testing.assert_array_equal(norm.rows, -reader.columns)
    both, fc2 = scalings["model.layers.3.mlp.fc1.weight"], scalings["model.layers.3.mlp.fc2.weight"]
    np.testing.assert_array_equal(both.rows, [*np.zeros_like(fc2.columns), *-fc2.columns])


def test_an_even_model_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(REFERENCE)
    ids = Tokenizer(REFERENCE).encode((REFERENCE / TEXT).read_text(encoding="utf-8"))
    told: list[int] = []
    known = collect(checkpoint, ids[:TOKENS], tmp_path)
    assert find_scalings(checkpoint, lambda _: FORM, known, told.append) == {}
    assert told == [1] * checkpoint.config.num_hidden_layers
    loudest = find_scalings(checkpoint, lambda _: None, known)  # nothing is quantized
    assert loudest == {}


def test_the_float_model_computes_the_same_bits(
    traced: ir.Model, scalings: Scalings, tmp_path: Path
) -> None:
    target, logits = find_target("cpu-fp32"), []
    for name, first in (("as-it-is", ()), ("evened", (partial(equalize, scalings=scalings),))):
        passes = (*first, *target.passes)
        made = traced
        for apply in passes:
            made = apply(made)
        package = write_package(
            made, tmp_path / name, target=replace(target, passes=passes), facts={}
        )
        sequence = Session(package).start()
        logits.append([sequence.step(list(range(100, 160))), sequence.step([7])])
    np.testing.assert_array_equal(*logits)


def test_moments_of_scaled_inputs_are_scaled(calibration: Calibration, scalings: Scalings) -> None:
    name = "model.layers.5.attn.Wqkv.weight"
    known = EqualizedCalibration(calibration, scalings)[f"{name}.rows_0_64"]
    factor = np.exp2(-scalings[name].columns.astype(np.float32))
    expected = calibration[name].second_moments() * factor * factor[:, None]
    np.testing.assert_array_equal(known.second_moments(), expected)
    np.testing.assert_array_equal(known.mean_squares(), np.diagonal(expected))
    untouched = "model.layers.0.attn.out_proj.weight"
    assert untouched not in scalings
    unscaled = EqualizedCalibration(calibration, scalings)[untouched]
    np.testing.assert_array_equal(
        unscaled.second_moments(), calibration[untouched].second_moments()
    )


@pytest.mark.parametrize("quantizer", ["search", "gptq"])
def test_a_loud_model_loses_less_evened_out_and_its_weights_are_compared_as_they_were(
    loud: Path, tmp_path: Path, quantizer: str
) -> None:
    cache = str(tmp_path / "moments")
    lost = {}
    for name, even in (("loud", False), ("even", True)):
        recipe, report = tmp_path / "recipe.json", tmp_path / f"{name}.json"
        default = {"bits": 4, "quantizer": quantizer}
        rules = {"*.x_proj.*": {"bits": 8}, "*.dt_proj.*": {"bits": 8}}
        told = {"default": default, "rules": rules, "equalize": even}
        recipe.write_text(json.dumps(told))
        keep = ["--calibration-cache", cache] if even or quantizer == "gptq" else []
        arguments = ["--checkpoint", str(loud), "-o", str(tmp_path / name), "--verify", *keep]
        main([*arguments, "--recipe", str(recipe), "--json", str(report)])
        lost[name] = json.loads(report.read_text(encoding="utf-8"))
    text = {name: each["next_tokens"][-1]["kl_mean"] for name, each in lost.items()}
    assert text["even"] < 0.7 * text["loud"]
    model = ir.load(tmp_path / "even" / "model.onnx")
    assert EQUALIZED in model.metadata_props
    errors, left_out = compare_weights(model, open_checkpoint(loud))
    assert not left_out
    norms = [each for each in errors if "layernorm" in each.name]
    assert norms
    assert all(each.snr_db == np.inf for each in norms)
    assert min(each.snr_db for each in errors) > 8  # columns that weigh little lose more
    del model.metadata_props[EQUALIZED]
    errors, _ = compare_weights(model, open_checkpoint(loud))
    assert min(each.snr_db for each in errors) < 3
    model.metadata_props[EQUALIZED] = "x"
    with pytest.raises(ValueError, match=r"'sambay\.equalized' cannot be read"):
        compare_weights(model, open_checkpoint(loud))


def test_ranges_of_activations_are_those_of_the_evened_graph(
    loud: Path, traced: ir.Model, scalings: Scalings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ir.Model] = []

    def look(model: ir.Model, *_: object, **__: object) -> dict[str, tuple[float, float]]:
        seen.append(model)
        return {}

    monkeypatch.setattr(options, "measure_ranges", look)
    target = find_target("qnn-npu-w4a16")
    target = replace(target, passes=(partial(equalize, scalings=scalings), *target.passes))
    told = Quantization(
        recipe=None, quantizer=None, calibration=None, folder=None, activations="uint16"
    )
    monkeypatch.setattr(options, "values_to_measure", lambda *_: [])
    options.with_activations_as_told(
        target, told, open_checkpoint(loud), traced, traced, lambda _: None
    )
    assert EQUALIZED in seen[0].metadata_props


@pytest.mark.parametrize(
    ("scalings", "message"),
    [
        ({"model.layers.9.mlp.fc2.weight": Scaling()}, "no weight 'model.layers.9"),
        (
            {"model.layers.0.mlp.fc2.weight": Scaling(columns=np.zeros(3, np.int8))},
            "exponents are of another shape",
        ),
    ],
)
def test_scalings_of_another_model_are_refused(
    traced: ir.Model, scalings: dict[str, Scaling], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        equalize(traced, scalings=scalings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu-fp32"], "stores weights in full"),
        (["--checkpoint", "{bare}"], "--equalize needs text"),
    ],
)
def test_bad_input_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(REFERENCE, bare, ignore=lambda *_: [TEXT])
    output = tmp_path / "package"
    told = [argument.format(bare=bare) for argument in arguments]
    assert main(["--equalize", *told, "-o", str(output)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("phi4export: error: ")
    assert re.search(message, error), error
    assert not output.exists()
