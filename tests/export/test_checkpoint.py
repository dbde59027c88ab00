import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import (
    INDEX_FILE,
    CheckpointError,
    find_non_finite,
    open_checkpoint,
    read_header,
)
from export.config import SambaYConfig
from export.tensors import EMBEDDING, HEAD, expected_tensors

GOLDENS = Path(__file__).parents[1] / "golden"
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NORM = "model.final_layernorm.weight"

PUBLISHED = SambaYConfig(
    vocab_size=200_064,
    hidden_size=2560,
    intermediate_size=10_240,
    num_hidden_layers=32,
    num_attention_heads=40,
    num_key_value_heads=20,
    sliding_window=512,
)

Arrays = dict[str, np.ndarray]


def save(path: Path, arrays: Arrays, **changes: Any) -> None:
    """Write a safetensors file. ``changes`` replace entries of the header."""
    names = {np.dtype(dtype): name for name, dtype in NUMPY.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {
            "dtype": names.get(array.dtype, "I64"),
            "shape": array.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header | changes).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def small_weights() -> Arrays:
    """The golden C4's, in bfloat16."""
    stored = open_checkpoint(GOLDENS / "C4").tensors.values()
    return {tensor.name: tensor.to_ir().numpy().astype(NUMPY["BF16"]) for tensor in stored}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden C4, for a test to damage."""
    return Path(shutil.copytree(GOLDENS / "C4", tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The golden C4 in bfloat16, in two shards."""
    arrays = small_weights()
    shutil.copy(GOLDENS / "C4" / "config.json", tmp_path)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(weight_map.values()):
        held = {name: array for name, array in arrays.items() if weight_map[name] == shard}
        save(tmp_path / shard, held)
    total = sum(array.nbytes for array in arrays.values())
    write_index(tmp_path, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tmp_path


def write_index(folder: Path, content: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps(content), encoding="utf-8")


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    edit(content)
    write_index(folder, content)


def refusal(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["A8", "C4"])
def test_the_table_of_tensors_is_that_of_the_goldens(name: str) -> None:
    checkpoint = open_checkpoint(GOLDENS / name)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values()}
    assert shapes == expected_tensors(checkpoint.config)
    assert checkpoint.tied_head


def test_the_published_shape_has_434_tensors_and_3852562944_parameters() -> None:
    shapes = expected_tensors(PUBLISHED)
    assert len(shapes) == 434
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == 3_852_562_944


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_tensor_reads_back_from_any_offset(tmp_path: Path, dtype: str) -> None:
    expected = np.linspace(-3, 3, 35).astype(NUMPY[dtype]).reshape(5, 7)
    for padding in range(4):
        path = tmp_path / f"{padding}.safetensors"
        save(path, {"x": expected}, __metadata__={"pad": "." * padding})
        tensor = read_header(path)["x"].to_ir()
        assert tensor.name == "x"
        np.testing.assert_array_equal(tensor.numpy(), expected)
        assert tensor.tobytes() == expected.tobytes()


def test_shards_read_as_the_single_file_does(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    for name, expected in small_weights().items():
        np.testing.assert_array_equal(checkpoint.tensors[name].to_ir().numpy(), expected)
    assert checkpoint.total_bytes == open_checkpoint(GOLDENS / "C4").total_bytes // 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_is_used_whatever_the_config_says(folder: Path, tied: bool) -> None:
    arrays = small_weights()
    save(folder / "model.safetensors", arrays | {HEAD: arrays[EMBEDDING]})
    edit_config(folder, tie_word_embeddings=tied)
    assert not open_checkpoint(folder).tied_head


def test_an_untied_head_must_be_stored(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    assert f"lacks {HEAD}" in refusal(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(sorted(NUMPY)),
    bad=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]),
    place=st.integers(0, 62),
    filler=st.sampled_from([0.0, -0.0, 6e4, -6e4, 1e-7]),
)
def test_one_number_that_is_not_finite_is_found(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, bad: float, place: int, filler: float
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(GOLDENS / "C4" / "config.json", folder)
    arrays = {
        name: np.full(shape, filler, NUMPY[dtype])
        for name, shape in expected_tensors(open_checkpoint(GOLDENS / "C4").config).items()
    }
    save(folder / "model.safetensors", arrays)
    assert find_non_finite(open_checkpoint(folder)) is None
    arrays[NORM][place] = bad
    save(folder / "model.safetensors", arrays)
    assert find_non_finite(open_checkpoint(folder)) == NORM


def test_the_scan_reports_every_byte(sharded: Path) -> None:
    counts: list[int] = []
    checkpoint = open_checkpoint(sharded)
    find_non_finite(checkpoint, counts.append)
    assert sum(counts) == checkpoint.total_bytes


def test_a_file_cut_during_the_scan_is_an_error(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        find_non_finite(checkpoint)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal(str(tmp_path / "nothing"))
    assert "does not exist" in refusal("nothing-of-this-name")
    assert "does not exist" in refusal("./owner/name")


def test_a_file_or_an_empty_folder_is_no_checkpoint(folder: Path) -> None:
    assert "is a file" in refusal(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "holds neither" in refusal(folder)


def test_a_hub_id_without_the_hub_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal("owner/name")


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    assert "cannot fetch owner/name from the hub (no route)" in refusal("owner/name")


def test_a_hub_id_opens_what_the_hub_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "owner/name"
        return str(GOLDENS / "C4")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=deliver))
    assert len(open_checkpoint("owner/name").tensors) == 63


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=192)
    assert "mlp.fc1.weight has shape [320, 64], config.json implies [384, 64]" in refusal(folder)
    edit_config(folder, num_hidden_layers=8)
    assert "lacks model.layers.4" in refusal(folder)
    assert "more: " in refusal(folder)


def test_an_unexpected_tensor_is_refused(folder: Path) -> None:
    save(folder / "model.safetensors", small_weights() | {"extra": np.zeros(1, np.float32)})
    assert "holds the unexpected extra" in refusal(folder)


def test_an_unsupported_dtype_is_refused(folder: Path) -> None:
    save(folder / "model.safetensors", small_weights() | {NORM: np.zeros(64, np.int64)})
    assert f"{NORM} has dtype I64, expected F32, F16, BF16" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(folder)


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "longer than its header says" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [b"not json", b"[]", b"\xff\xff", b'{"a": 1, "a": 2}', b'{"a": 1}', b"[" * 100_000],
    ids=["text", "list", "bytes", "twice", "number", "deep"],
)
def test_a_header_that_is_none_is_refused(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "download it again" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "BF16", "shape": [64]}, "lacks dtype, shape or data_offsets"),
        ({"dtype": "BF16", "shape": [64], "data_offsets": [0]}, "expected lists of counts"),
        ({"dtype": "BF16", "shape": [-64], "data_offsets": [0, 128]}, "expected lists of counts"),
        ({"dtype": "BF16", "shape": [64.0], "data_offsets": [0, 128]}, "expected lists of counts"),
        ({"dtype": "BF16", "shape": [63], "data_offsets": [0, 128]}, "takes 126"),
        ({"dtype": "F32", "shape": [64], "data_offsets": [0, 128]}, "takes 256"),
        ({"dtype": "BF16", "shape": [64], "data_offsets": [128, 0]}, "spans -128 bytes"),
        ({"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}, "overlaps"),
        ({"dtype": "BF16", "shape": [64], "data_offsets": [10**12, 10**12 + 128]}, "gap"),
        ({"dtype": ["BF16"], "shape": [64], "data_offsets": [0, 128]}, "has dtype ['BF16']"),
    ],
    ids=str,
)
def test_a_lying_entry_is_refused(folder: Path, entry: dict[str, Any], message: str) -> None:
    save(folder / "model.safetensors", small_weights(), **{NORM: entry})
    assert message in refusal(folder)


@settings(max_examples=150)
@given(place=st.integers(0, 6000), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(GOLDENS / "C4", folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == (
        expected_tensors(checkpoint.config)
    )


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "part-1.safetensors").unlink()
    assert "part-1.safetensors is missing" in refusal(sharded)


def test_an_index_with_another_total_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["metadata"].update(total_size=5))
    assert "says total_size 5, the shards hold" in refusal(sharded)


def test_an_index_that_misplaces_a_tensor_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(ghost="part-0.safetensors"))
    assert "places ghost in part-0.safetensors, which does not hold it" in refusal(sharded)
    edit_index(sharded, lambda index: index["weight_map"].pop(NORM))
    assert f"holds {NORM}, which" in refusal(sharded)


@pytest.mark.parametrize("shard", ["../elsewhere", "/etc/passwd", "a\\b", 3, ""])
def test_an_index_that_leaves_its_folder_is_refused(sharded: Path, shard: Any) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(ghost=shard))
    assert "expected the name of a file beside it" in refusal(sharded)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_refused(sharded: Path, content: Any) -> None:
    write_index(sharded, content)
    assert INDEX_FILE in refusal(sharded)
