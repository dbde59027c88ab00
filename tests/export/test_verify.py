"""A verification finds what a package has lost, and says which bound is exceeded."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE
from export.verify.bounds import LIMITS, token_bounds
from export.verify.command import main, read_sample
from export.verify.compare import TokenQuality
from export.verify.options import Settings
from export.verify.package_slices import SlicedPackage, Track
from runtime_py.package import find_model
from runtime_py.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "C4"
TEXT = "<|user|>What is 61 * 0?<|end|><|assistant|><think>1*0+0=0c0 6*0+0=0c0</think>"


@pytest.fixture(scope="session")
def verified(export, tmp_path_factory):
    """Verify an export once a test session: (exit status, JSON, HTML) of a target."""
    made: dict[str, tuple[int, dict, str]] = {}

    def run(target: str, *options: str) -> tuple[int, dict, str]:
        key = " ".join((target, *options))
        if key not in made:
            folder = tmp_path_factory.mktemp("verified")
            package = export(None, target, *options)
            status = verify(package, REFERENCE, folder, "--tokens", "128")
            html = (folder / "report.html").read_text(encoding="utf-8")
            made[key] = status, read(folder), html
        return made[key]

    return run


def verify(package: Path, checkpoint: Path, folder: Path, *options: str) -> int:
    files = ["--json", str(folder / "report.json"), "--html", str(folder / "report.html")]
    return main([str(package), "--checkpoint", str(checkpoint), *files, *options])


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("options", [(), ("--all-logits",)], ids=["last logits", "all logits"])
def test_a_float32_package_has_only_rounding_errors(verified, options: tuple[str, ...]) -> None:
    status, report, _ = verified("cpu-fp32", *options)
    assert status == 0
    assert report["held"]
    assert len(report["layers"]) == 2 * 8
    for layer in report["layers"]:
        assert layer["error"]["relative"] < 1e-5
        assert layer["own"]["relative"] < 1e-6
    for state in report["states"]:
        assert state["error"]["relative"] < 1e-5, state["state"]
    for weight in report["weights"]:
        assert weight["largest"] == 0.0, weight["name"]
        assert weight["snr_db"] is None  # exact
    for quality in report["next_tokens"]:
        assert quality["kl_mean"] < 1e-9
        assert quality["top1_agreement"] == 1.0
        assert quality["perplexity_ratio"] == pytest.approx(1, abs=1e-4)


def test_fewer_bits_cost_more(verified) -> None:
    (_, eight, _), (_, four, _) = verified("cpu-int8"), verified("cpu-int4")
    for at_eight, at_four in zip(eight["layers"], four["layers"], strict=True):
        assert at_eight["own"]["relative"] < at_four["own"]["relative"]
    for at_eight, at_four in zip(eight["next_tokens"], four["next_tokens"], strict=True):
        assert 0 < at_eight["kl_mean"] < at_four["kl_mean"]
    assert text_quality(eight)["top1_agreement"] >= 0.98
    assert text_quality(four)["kl_mean"] < LIMITS[4].kl


@pytest.mark.parametrize(("target", "bits", "least", "most"), [
    ("cpu-int4", 4, 17, 24), ("cpu-int8", 8, 40, 55)
])  # fmt: skip
def test_quantized_weights_have_the_ratio_of_their_bits(
    verified, target: str, bits: int, least: float, most: float
) -> None:
    _, report, _ = verified(target)
    quantized = [weight for weight in report["weights"] if weight["bits"] == bits]
    assert len(quantized) > 20
    for weight in quantized:
        assert least < weight["snr_db"] < most, weight["name"]
        assert weight["worst_row_db"] <= weight["snr_db"]


def test_every_weight_of_the_checkpoint_is_compared(verified) -> None:
    _, report, _ = verified("cpu-int4")
    compared = {weight["name"].partition("[")[0] for weight in report["weights"]}
    assert compared == set(open_checkpoint(REFERENCE).tensors)
    sizes = report["bytes_by_kind"]
    total = sum(count for by_bits in sizes.values() for count in by_bits.values())
    assert total == sum(weight["bytes"] for weight in report["weights"])


def text_quality(report: dict) -> dict:
    return next(each for each in report["next_tokens"] if each["sample"] == "calibration.txt")


def test_the_page_is_well_formed_and_has_its_figures(verified) -> None:
    _, report, page = verified("cpu-int4")
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if open_tags and tag == open_tags[-1]:
                open_tags.pop()

    Checker().feed(page)
    assert open_tags == []
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    samples = [quality["sample"] for quality in report["next_tokens"]]
    assert captions == [
        "Error by layer",
        "Size by kind",
        *(f"KL divergence of next tokens, {sample}" for sample in samples),
    ]
    shapes = [len(re.findall("<(?:rect|polyline)", figure)) for figure in figures]
    for figure in figures:
        ElementTree.fromstring(figure)
    assert shapes[0] == 2 * len(samples)
    assert min(shapes) > 0
    assert "<script" not in page
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("options", [
    ("directml-int4",), ("cuda-fp16",), ("cpu-fp32", "--cache", "int8")
], ids=" ".join)  # fmt: skip
def test_other_recipes_are_verified_too(export, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert verify(export(None, *options), REFERENCE, tmp_path, "--tokens", "80") == 0
    report = read(tmp_path)
    assert len(report["states"]) == 2 * 12
    for state in report["states"]:  # none is left out, as if its shape were another
        assert state["error"]["snr_db"] > 10, state["state"]


def test_the_histogram_counts_every_token(verified) -> None:
    _, report, _ = verified("cpu-int4")
    for quality in report["next_tokens"]:
        assert sum(quality["histogram"]["counts"]) == quality["tokens"]


def test_without_a_tokenizer_random_tokens_are_measured(export, tmp_path: Path, capsys) -> None:
    assert verify(export(GOLDEN, "cpu-int8"), GOLDEN, tmp_path) == 0
    report = read(tmp_path)
    assert [quality["sample"] for quality in report["next_tokens"]] == ["random tokens"]
    assert "no tokenizer" in capsys.readouterr().out


def test_without_options_the_shipped_model_is_the_reference(export, capsys) -> None:
    assert main([str(export(None, "cpu-int8")), "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"  model\.layers\.\d\.[a-z_.0-9]+weight(\[\d+:\d+])? *$", out, re.MULTILINE)
    assert "…" not in out, "a pipe gets whole lines"


def test_a_checkpoint_without_a_text_is_measured_on_the_shipped_one() -> None:
    sample = read_sample(Tokenizer(REFERENCE), open_checkpoint(GOLDEN), Settings(tokens=60))
    assert sample.ids.shape == (1, 60)


def damage(package: Path, folder: Path, weight: str) -> Path:
    """A copy of a package in which the first quarter of a stored weight is zeros."""
    copy = folder / "damaged"
    shutil.copytree(package, copy)
    tensor = ir.load(copy / "model.onnx").graph.initializers[weight].const_value
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(tensor.nbytes // 4))
    return copy


@pytest.mark.parametrize(("target", "stored"), [
    ("cpu-fp32", "model.layers.2.mlp.fc1.weight.transposed"),
    ("cpu-int8", "model.layers.2.mlp.fc1.weight.packed"),
    ("cpu-int4", "model.layers.2.mlp.fc1.weight.scales"),
])  # fmt: skip
def test_a_damaged_weight_is_found_and_named(
    export, tmp_path: Path, capsys, target: str, stored: str
) -> None:
    package = damage(export(None, target), tmp_path, stored)
    assert verify(package, REFERENCE, tmp_path, "--tokens", "16") == 1
    told = capsys.readouterr().err
    assert "model.onnx.data is not the file that was written" in told
    assert re.search(r"ratio \(dB\) of model\.layers\.2\.mlp\.fc1\.weight .* the bound is", told)
    report = read(tmp_path)
    assert not report["held"]
    assert all(failure in told for failure in report["failures"])
    damaged = min(report["layers"], key=lambda layer: layer["own"]["snr_db"])
    assert damaged["layer"] == 2


def test_a_weight_that_is_no_number_is_found(export, tmp_path: Path, capsys) -> None:
    package = damage(export(None, "cpu-int8"), tmp_path, "model.layers.2.mlp.fc1.weight.scales")
    tensor = ir.load(package / "model.onnx").graph.initializers[
        "model.layers.2.mlp.fc1.weight.scales"
    ]
    with (package / "model.onnx.data").open("r+b") as file:
        file.seek(tensor.const_value.offset)
        file.write(np.float32("nan").tobytes())
    assert verify(package, REFERENCE, tmp_path, "--tokens", "16") == 1
    assert "model.layers.2.mlp.fc1.weight" in capsys.readouterr().err
    weights = {weight["name"]: weight for weight in read(tmp_path)["weights"]}
    found = weights["model.layers.2.mlp.fc1.weight"]
    assert [found[key] for key in ("snr_db", "worst_row_db", "largest")] == [None] * 3
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = re.search(r"<tr><td>model\.layers\.2\.mlp\.fc1\.weight</td>.*?</tr>", page)
    assert row is not None
    assert row[0].count("no number") == 3


@pytest.mark.parametrize(("options", "told"), [
    (("--max-kl", "1e-9"), r"mean KL divergence of sum\.txt is .* at most 1e-09"),
    (("--min-top1", "1"), r"top-1 agreement of sum\.txt is 0\..*, the bound is at least 1"),
])  # fmt: skip
def test_a_stated_bound_holds_for_any_text(
    export, tmp_path: Path, capsys, options: tuple[str, ...], told: str
) -> None:
    text = tmp_path / "sum.txt"
    text.write_text("Questions nobody asked: why is the sky so blue, and the sea? " + TEXT)
    status = verify(export(None, "cpu-int4"), REFERENCE, tmp_path, "--text", str(text), *options)
    assert status == 1
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_logits_that_are_no_numbers_exceed_every_bound(damage: float) -> None:
    quality = TokenQuality()
    wanted = np.random.default_rng(0).standard_normal((3, 8))
    found = wanted.copy()
    found[1, wanted[1].argmax()] = damage
    quality.add(wanted, found, [1, 2])
    assert quality.divergences == [0, np.inf, 0]
    assert quality.agreed == [True, False, True]
    assert sum(quality.histogram()[1]) == 3
    bounds = token_bounds("text", quality, 4, vocabulary=8, kl=1e9, top1=0)
    assert [bound.held for bound in bounds] == [False, True]


def test_a_surprise_beyond_all_numbers_is_infinite() -> None:
    quality = TokenQuality()
    quality.add(np.zeros((2, 8)), 1e6 * np.eye(2, 8), [5])
    found = quality.summary()
    assert found["perplexity"] == found["perplexity_ratio"] == np.inf
    assert found["reference_perplexity"] == pytest.approx(8)


def test_states_keep_no_session_in_memory(export) -> None:
    package = SlicedPackage.of_file(find_model(export(None, "cpu-int8")), library=None, threads=1)
    track = Track(np.arange(40)[None])
    for part in package.slices[:7]:
        package.run(part, package.open(part), track)
    assert len(track.states) == 12
    assert all(state.flags.owndata for state in track.states.values())


BAD_INPUT = {
    "another checkpoint": (["--checkpoint", str(GOLDEN)], "exported from another model than"),
    "no checkpoint": (["--checkpoint", "missing/folder/here"], "missing/folder/here"),
    "no text": (["--text", "missing.txt"], "missing.txt"),
    "an empty text": (["--text", "empty.txt"], "is empty: give"),
    "no text at all": (["--text", "binary.txt"], "no UTF-8 text"),
    "one token": (["--text", "short.txt"], "expected 2 or more"),
    "no tokens": (["--tokens", "0"], "--tokens is 0, expected 2 or more"),
    "no threads": (["--threads", "0"], "--threads is 0, expected 1 or more"),
    "a folder for figures": (["--json", "."], "--json . is a folder, expected a file"),
    "a share above one": (["--min-top1", "99"], "expected a share between 0 and 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(
    export, tmp_path: Path, capsys, monkeypatch, case: str
) -> None:
    options, told = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("<|user|>")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    package = export(None, "cpu-int4")
    capsys.readouterr()
    checkpoint = [] if "--checkpoint" in options else ["--checkpoint", str(REFERENCE)]
    assert main([str(package), *checkpoint, *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("verify: error:")
    assert error.count("\n") == 1


def test_options_that_are_not_known_are_refused_in_one_line(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["package", "--no-such-option"])
    error = capsys.readouterr().err
    assert error.startswith("verify: error: unrecognized arguments: --no-such-option")
    assert error.count("\n") == 1


def test_a_package_of_several_graphs_is_refused(tmp_path: Path, capsys) -> None:
    graph = {"file": "decode.onnx", "provider": "QNNExecutionProvider", "tokens": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"graphs": [graph]}))
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} has several graphs" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("contents", [None, b"", b"no model"], ids=["none", "empty", "other"])
def test_what_is_no_package_is_refused(tmp_path: Path, capsys, contents: bytes | None) -> None:
    if contents is not None:
        (tmp_path / "model.onnx").write_bytes(contents)
    assert main([str(tmp_path), "--checkpoint", str(REFERENCE)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("verify: error:")
    assert error.count("\n") == 1
