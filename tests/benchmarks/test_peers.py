import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import peers
from benchmarks.peer_models import Shape, write_gguf, write_onnx
from benchmarks.peer_ort import FullAttention
from benchmarks.peers import compare, find_version, main
from runtime_py.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_size=64, mlp=96, vocab=300)


def test_ratios_take_the_best_setting_by_each_statistic() -> None:
    ours = [{"package": {"depth 0": [0.1, 0.3]}}, {"package": {"depth 0": [0.2, 0.2]}}]
    theirs = [
        {"a": {"depth 0": [0.3, 0.9]}, "b": {"depth 0": [0.5, 0.5]}},
        {"a": {"depth 0": [0.9, 0.9]}, "b": {"depth 0": [0.8, 0.8]}},
    ]
    (row,) = compare(ours, theirs)
    assert row["package"] == {"min_ms": 100, "median_ms": 200, "n": 4}
    assert row["best"] == {"min_ms": "a", "median_ms": "b"}
    assert row["ratio_min"] == 3.0
    assert row["ratio_median"] == 3.25  # b: median of .5 .5 .8 .8
    assert row["ratio_by_block"] == [2.5, 4.0]


def test_every_place_is_compared_with_its_own() -> None:
    ours = [{"package": {"depth 0": [0.1], "prompt 8": [1.0]}}]
    theirs = [{"only": {"depth 0": [0.1], "prompt 8": [4.0]}}]
    rows = compare(ours, theirs)
    assert [(row["place"], row["ratio_median"]) for row in rows] == [
        ("depth 0", 1),
        ("prompt 8", 4),
    ]


def test_a_package_is_measured_beside_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[..., Path]
) -> None:
    monkeypatch.setattr(peers, "PHI_4_MINI", TINY)
    monkeypatch.setattr(peers, "describe_machine", lambda threads: {"threads": threads})
    package = export(GOLDEN / "A8", "cpu-fp32")
    out, models = tmp_path / "out.json", tmp_path / "models"
    command = [str(package), "--peer", "ort-full-attention", "--json", str(out)]
    command += ["--depths", "0,9", "--prompts", "5", "--blocks", "2", "--threads", "1"]
    assert main([*command, "--seconds", "0", "--peer-models", str(models)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    peer = result["peers"]["ort-full-attention"]
    assert peer["version"] == ort.__version__
    assert [row["place"] for row in peer["places"]] == ["depth 0", "depth 9", "prompt 5"]
    for row, runs in zip(peer["places"], (8, 8, 2), strict=True):
        (times,) = row["peer"].values()
        assert times["n"] == row["package"]["n"] == runs
        assert row["ratio_min"] == pytest.approx(
            times["min_ms"] / row["package"]["min_ms"], abs=0.006
        )
        assert len(row["ratio_by_block"]) == 2
    names = {"phi4mini-random-int4.onnx", "phi4mini-random-int4.onnx.data"}
    assert {path.name for path in models.iterdir()} == names


def test_an_engine_that_is_not_there_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = "__import__('no_such_engine').__version__"
    peer = peers.PEERS["llama.cpp"]
    monkeypatch.setitem(
        peers.PEERS, "llama.cpp", peers.Peer(peer.file, peer.write, peer.worker, lacking, "X")
    )
    arguments = [str(tmp_path), "--peer", "llama.cpp", "--peer-models", str(tmp_path)]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "llama.cpp is not installed" in message
    assert "--peer-python" in message
    assert not list(tmp_path.iterdir())  # found out before a model was written
    with pytest.raises(InputError, match="no-python: No such file"):
        find_version("ort-full-attention", str(tmp_path / "no-python"))


def test_a_failed_process_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "PHI_4_MINI", TINY)
    monkeypatch.setattr(peers, "describe_machine", lambda threads: {})
    assert main([str(tmp_path / "nothing"), "--peer", "ort-full-attention"]) == 2
    told, message = capsys.readouterr().err.splitlines()
    assert told == "block 1 of 3: nothing"
    assert "nothing does not exist" in message


@pytest.mark.parametrize("peer", ["vllm", ""])
def test_an_unknown_peer_is_refused(peer: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["package", "--peer", peer])


def test_full_attention_reads_and_extends_its_cache(tmp_path: Path) -> None:
    write_onnx(tmp_path / "tiny.onnx", TINY)
    session = ort.InferenceSession(str(tmp_path / "tiny.onnx"), providers=["CPUExecutionProvider"])

    def logits(model: FullAttention, before: int) -> np.ndarray:
        model.step(before, 1)
        return model.binding.copy_outputs_to_cpu()[-1]

    shallow, deep = (logits(FullAttention(session, 64), depth) for depth in (7, 7))
    np.testing.assert_array_equal(shallow, deep)
    model = FullAttention(session, 64)
    keys = model.caches["past.0.key"]
    before = keys.copy()
    assert logits(model, 7).shape == (1, 1, TINY.vocab)
    changed = np.flatnonzero((keys != before).any(axis=(0, 1, 3)))
    assert changed.tolist() == [7]  # written in place, after the seven that were read
    keys[:, :, 3] += 1
    assert np.abs(logits(model, 7) - shallow).max() > 1e-4


def test_gguf_holds_what_it_declares(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY)
    raw = (tmp_path / "tiny.gguf").read_bytes()
    magic, version, tensors, settings = struct.unpack_from("<4sIQQ", raw)
    assert (magic, version) == (b"GGUF", 3)
    assert (tensors, settings) == (2 + 6 * TINY.layers, 21)
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight")
    assert struct.unpack_from("<IQQIQ", raw, at) == (2, TINY.hidden, TINY.vocab, 2, 0)
    weights = TINY.vocab * TINY.hidden + TINY.layers * sum(
        outputs * inputs for outputs, inputs in TINY.products.values()
    )
    small = len(raw) - weights // 32 * 18  # the rest: norms, tokens, padding
    assert 0 < small < 20_000
