"""Every weight is quantized alone, and the ranking says what the model loses with it."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint, open_checkpoint
from export.cli import REFERENCE
from export.cli import main as phi4export
from export.quantize.costs import read_costs
from export.quantize.sensitivity import Sensitivity, matrices, rank, ranking_json, work
from export.verify.compare import divergence
from export.weights import load_weights
from graph_passes.block_quantization import dequantize, quantize
from graph_passes.recipe import WeightFormat

GOLDEN = Path(__file__).parents[1] / "golden" / "C4"
IDS = np.random.default_rng(0).integers(0, 256, (1, 20))


@pytest.fixture(scope="module", params=["tied head", "head of its own"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    tied = open_checkpoint(GOLDEN)
    return tied if request.param == "tied head" else untied(tmp_path_factory.mktemp("untied"))


def untied(folder: Path) -> Checkpoint:
    """The golden with a copy of its embedding as a head of its own."""
    tied = open_checkpoint(GOLDEN)
    stored = list(tied.tensors.items())
    stored.append(("lm_head.weight", tied.tensors["model.embed_tokens.weight"]))
    header, contents = {}, b""
    for name, tensor in stored:
        begin, data = len(contents), tensor.path.read_bytes()
        contents += data[tensor.offset : tensor.offset + tensor.nbytes]
        offsets = [begin, len(contents)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + contents)
    config = json.loads((GOLDEN / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def round_trip(weight: np.ndarray, bits: int) -> np.ndarray:
    return dequantize(quantize(weight, WeightFormat(bits=bits, quantizer="rtn")))


@pytest.fixture(scope="module")
def told() -> list[int]:
    """What a ranking told as its progress."""
    return []


@pytest.fixture(scope="module")
def ranking(checkpoint: Checkpoint, told: list[int]) -> list[Sensitivity]:
    told.clear()
    return rank(checkpoint, IDS, round_trip, bits=4, progress=told.append)


def test_every_matrix_is_ranked_once(checkpoint: Checkpoint, ranking) -> None:
    assert sorted(each.name for each in ranking) == sorted(matrices(checkpoint))
    assert [each.kl for each in ranking] == sorted((each.kl for each in ranking), reverse=True)
    for each in ranking:
        assert each.shape == checkpoint.tensors[each.name].shape
        assert each.kl > 0
        assert 15 < each.snr_db < 30


def test_progress_tells_of_all_the_work(checkpoint: Checkpoint, ranking, told) -> None:
    assert min(told) > 0
    assert sum(told) == work(checkpoint, IDS.shape[1])


def test_the_divergence_is_that_of_the_whole_model_with_one_weight_changed(
    checkpoint: Checkpoint, ranking
) -> None:
    clean = logits(checkpoint, None)
    for each in (*ranking[:3], *ranking[len(ranking) // 2 :: 7]):
        expected = divergence(clean, logits(checkpoint, each.name)).mean()
        assert each.kl == pytest.approx(expected, rel=1e-3), each.name


@torch.no_grad()
def logits(checkpoint: Checkpoint, changed: str | None) -> np.ndarray:
    model = load_weights(checkpoint)
    if changed is not None:
        weight = model.get_parameter(changed)
        weight.copy_(torch.from_numpy(round_trip(weight.numpy(), 4)))
    states = model.initial_states(1, capacity=32)
    found, _, _ = model(torch.from_numpy(IDS), torch.ones(1, 20), states, all_logits=True)
    return found[0].numpy()


def test_an_exact_weight_costs_nothing_and_is_valid_json(tmp_path: Path) -> None:
    found = [Sensitivity("a.weight", (2, 2), 4, snr, 0.0, 0.0) for snr in (math.inf, 20.5)]
    contents = ranking_json(found, open_checkpoint(GOLDEN), 8)
    assert [each["snr_db"] for each in contents["weights"]] == [None, 20.5]
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({**contents, "weights": contents["weights"][:1]}, allow_nan=False))
    assert read_costs(file) == {"a.weight": (0.0, math.inf)}


def test_the_command_prints_a_table_and_writes_what_a_budget_reads(tmp_path: Path, capsys) -> None:
    file = tmp_path / "costs.json"
    assert phi4export(["--sensitivity", "--tokens", "32", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    names = matrices(open_checkpoint(REFERENCE))
    assert all(name in printed for name in names)
    costs = read_costs(file)
    assert set(costs) == set(names)
    assert json.loads(file.read_text())["tokens"] == 32


BAD_INPUT = {
    "no tokenizer": (["--sensitivity", "--checkpoint", str(GOLDEN)], "has no tokenizer"),
    "an empty text": (["--sensitivity", "--text", "empty.txt"], "is empty: give"),
    "no folder": (["--sensitivity", "--json", "no/such/costs.json"], "there is no folder"),
    "nothing is measured": (["--html", "page.html"], "--html is for --verify or --sensitivity"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, capsys, monkeypatch, case: str) -> None:
    arguments, told = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    assert phi4export(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
