"""What linear layers are fed, against the model run as a whole."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from export.checkpoint import open_checkpoint
from export.quantize import calibration
from export.quantize.calibration import Calibration, CalibrationError, collect
from export.weights import load_weights

CHECKPOINT = open_checkpoint(Path(__file__).parents[1] / "golden" / "A8")
IDS = np.random.default_rng(4).integers(0, CHECKPOINT.config.vocab_size, 200).tolist()
CHUNK = 80
SIDE = 48  # of squares, so that the moments of every layer have several


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(calibration, "CHUNK", CHUNK)
    monkeypatch.setattr(calibration, "_SIDE", SIDE)


def moments_of_the_whole_model() -> dict[str, np.ndarray]:
    """Sums over every functional.linear of a plain run of the torch model."""
    model = load_weights(CHECKPOINT)
    names = {value.untyped_storage().data_ptr(): name for name, value in model.named_parameters()}
    sums: dict[str, torch.Tensor] = {}

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.linear:
                x = args[0].detach().flatten(0, -2).double()
                # layer M+1 makes its queries, and its keys and values, of the same input
                sums[names[args[1].untyped_storage().data_ptr()]] = x.T @ x
            return func(*args, **(kwargs or {}))

    total: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(IDS), CHUNK):
            ids = torch.tensor([IDS[start : start + CHUNK]])
            states = model.initial_states(1, capacity=ids.shape[1])
            sums.clear()
            with Recording():
                model(ids, torch.ones_like(ids), states, all_logits=True)
            for name, moments in sums.items():
                total[name] = total.get(name, 0) + moments
    return {name: (moments / len(IDS)).numpy() for name, moments in total.items()}


def test_layer_by_layer_gives_the_moments_of_the_whole(tmp_path: Path) -> None:
    expected = moments_of_the_whole_model()
    found = collect(CHECKPOINT, IDS, tmp_path)
    assert set(found) == set(expected)
    for name, moments in expected.items():
        actual = found[name].second_moments()
        np.testing.assert_allclose(actual, moments, atol=1e-4 * moments.max(), err_msg=name)
        np.testing.assert_array_equal(found[name].mean_squares(), np.diagonal(actual))
        np.testing.assert_array_equal(actual, actual.T)


def test_rows_of_a_weight_have_its_inputs(tmp_path: Path) -> None:
    found = collect(CHECKPOINT, IDS, tmp_path)
    name = next(name for name in found if name.endswith("Wqkv.weight"))
    assert found[f"{name}.rows_0_64"] == found[name]
    with pytest.raises(KeyError):
        found["model.layers.0.attn.D"]


def contents(found: Calibration) -> dict[str, bytes]:
    return {name: found[name].second_moments().tobytes() for name in found}


@pytest.mark.parametrize("reached", [1, 5, 7])
def test_an_interrupted_collection_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: int
) -> None:
    whole = contents(collect(CHECKPOINT, IDS, tmp_path / "whole"))
    told: list[int] = []

    def interrupt(count: int) -> None:
        told.append(count)
        if sum(told) == reached:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(CHECKPOINT, IDS, tmp_path / "parts", progress=interrupt)
    loaded: list[int] = []
    load = calibration.ReferenceRun.load
    monkeypatch.setattr(
        calibration.ReferenceRun,
        "load",
        lambda run, index: loaded.append(index) or load(run, index),
    )
    assert contents(collect(CHECKPOINT, IDS, tmp_path / "parts")) == whole
    assert loaded == list(range(reached, CHECKPOINT.config.num_hidden_layers))
    loaded.clear()
    assert contents(collect(CHECKPOINT, IDS, tmp_path / "parts")) == whole, "complete: taken as is"
    assert not loaded
    assert not list((tmp_path / "parts").glob("*.part")) + list((tmp_path / "parts").glob("*.pt"))


@pytest.mark.parametrize("file", [
    "model.layers.3.mlp.fc2.weight.npy", "flows_4.pt", "calibration.json"
])  # fmt: skip
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_collection_killed_at_any_file_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, before: bool
) -> None:
    """What is on disk then is all that a resumed collection knows of it."""
    whole = contents(collect(CHECKPOINT, IDS, tmp_path / "whole"))
    reached, replace = [0], os.replace

    def kill(source: Path, destination: Path) -> None:
        if not before:
            replace(source, destination)
        reached[0] += destination.name == file
        if reached[0] == (4 if file == "calibration.json" else 1):
            raise KeyboardInterrupt
        if before:
            replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(calibration.os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            collect(CHECKPOINT, IDS, tmp_path / "parts")
    assert contents(collect(CHECKPOINT, IDS, tmp_path / "parts")) == whole
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} == {".json", ".npy"}


def test_a_folder_of_another_text_is_refused(tmp_path: Path) -> None:
    collect(CHECKPOINT, IDS, tmp_path)
    with pytest.raises(CalibrationError, match="another text or checkpoint"):
        collect(CHECKPOINT, IDS[1:], tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", json.dumps({"digest": "x"})])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "calibration.json").write_text(damage)
    with pytest.raises(CalibrationError, match="cannot be read"):
        collect(CHECKPOINT, IDS, tmp_path)


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has 9 tokens, expected 128 or more"):
        collect(CHECKPOINT, IDS[:9], tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe\x00", "no UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_text_that_is_none_is_refused_by_name(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as raised:
        calibration.read_text(tmp_path / "text.txt")
    assert "text.txt" in str(raised.value)


def test_a_calibration_is_printed_without_its_folder(tmp_path: Path) -> None:
    printed = repr(collect(CHECKPOINT, IDS, tmp_path))
    assert printed.startswith("Calibration(tokens=200, digest='")
    assert str(tmp_path) not in printed
