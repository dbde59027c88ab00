import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graph_passes.pipeline import describe_pass, run_passes
from graph_passes.streamed_tensor import StreamedTensor
from targets import DEFAULT, TARGETS
from targets.destination import DestinationError
from targets.package import package_size, write_package
from targets.target import Target

Make = Callable[[], ir.Model]
# Packages of several graphs need a whole model: tests/end_to_end/test_qnn.py.
ONE_GRAPH = [target for target in TARGETS if not target.graphs]
by_target = pytest.mark.parametrize("target", ONE_GRAPH, ids=lambda target: target.name)
FACTS = {"name": "tiny", "parameters": 42}


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    ids = np.arange(6).reshape(1, 6) * 5
    return session.run(["logits"], {"input_ids": ids})[0]


@by_target
def test_a_package_runs_after_checkpoint_and_folder_are_gone(
    traced: Make, tmp_path: Path, target: Target
) -> None:
    model = run_passes(traced(), target.passes)
    expected = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}
    package = write_package(model, tmp_path / "package", target=target, facts=FACTS)
    (tmp_path / "checkpoint").unlink()
    moved = package.rename(tmp_path / "moved")
    assert np.isfinite(run(moved / "model.onnx")).all()
    stored = ir.load(moved / "model.onnx").graph.initializers
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name].const_value.numpy(), array, err_msg=name)


def test_weights_are_the_same_bytes_however_they_are_cut_into_blocks(
    traced: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = run_passes(traced(), TARGETS[0].passes)
    packages = []
    for size in (4 << 20, 1000, 64):
        monkeypatch.setattr("targets.package._BLOCK", size)
        packages.append(write_package(model, tmp_path / str(size), target=TARGETS[0], facts=FACTS))
    whole, *cut = ((package / "model.onnx.data").read_bytes() for package in packages)
    assert len(whole) > 10_000
    assert cut == [whole, whole]


def test_the_float32_package_computes_what_the_trace_computes(traced: Make, tmp_path: Path) -> None:
    ir.save(traced(), tmp_path / "traced.onnx", external_data="traced.data")
    model = run_passes(traced(), TARGETS[0].passes)
    package = write_package(model, tmp_path / "package", target=TARGETS[0], facts=FACTS)
    actual, expected = run(package / "model.onnx"), run(tmp_path / "traced.onnx")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@by_target
def test_the_manifest_tells_target_passes_and_digests(
    traced: Make, tmp_path: Path, target: Target
) -> None:
    model = run_passes(traced(), target.passes)
    package = write_package(
        model,
        tmp_path / "package",
        target=target,
        facts=FACTS,
        extra_files=lambda folder: (folder / "tokenizer.json").write_bytes(b"{}") and None,
    )
    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["target"] == target.name
    assert manifest["passes"] == [describe_pass(apply) for apply in target.passes]
    assert manifest["checkpoint"] == FACTS
    assert manifest["versions"].keys() >= {"onnx", "onnx-ir"}
    present = {path.name for path in package.iterdir()}
    assert present == {"manifest.json", *manifest["files"]}
    assert present >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"}
    for name, described in manifest["files"].items():
        data = (package / name).read_bytes()
        assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@by_target
def test_no_file_names_a_folder_of_this_machine(
    traced: Make, tmp_path: Path, target: Target
) -> None:
    model = run_passes(traced(), target.passes)
    package = write_package(model, tmp_path / "package", target=target, facts=FACTS)
    for path in package.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_target_is_written_into_the_model_and_the_argument_unchanged(
    traced: Make, tmp_path: Path
) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    package = write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)
    session = onnxruntime.InferenceSession(str(package / "model.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    made_for = {"sambay.target": DEFAULT.name, "sambay.provider": DEFAULT.provider}
    assert metadata == model.metadata_props | made_for
    assert "sambay.target" not in model.metadata_props
    for name, value in model.graph.initializers.items():
        assert value.const_value is tensors[name]


@by_target
def test_progress_adds_up_to_the_size_known_before(
    traced: Make, tmp_path: Path, target: Target
) -> None:
    model, told = run_passes(traced(), target.passes), []
    size = package_size(model)
    write_package(model, tmp_path / "p", target=target, facts=FACTS, progress=told.append)
    assert sum(told) == size
    assert size <= (tmp_path / "p" / "model.onnx.data").stat().st_size < size * 1.1


def test_large_weights_start_on_a_page_and_small_ones_on_a_cache_line(
    traced: Make, tmp_path: Path
) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    large = ir.Tensor(np.ones((513, 512), np.float32), name="large")
    graph = model.graph
    graph.register_initializer(ir.Value(name="large", shape=large.shape, const_value=large))
    package = write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)
    for name, value in ir.load(package / "model.onnx").graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.offset % (4096 if name == "large" else 64) == 0
        else:
            assert value.const_value.nbytes < 1024


def failing_after(pieces: int, error: BaseException) -> StreamedTensor:
    def chunks() -> Iterator[np.ndarray]:
        for _ in range(pieces):
            yield np.ones((100, 64), np.float32)
        raise error

    return StreamedTensor(
        chunks, dtype=ir.DataType.FLOAT, shape=(100 * (pieces + 1), 64), name="broken"
    )


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("NaN in weight"), ValueError),
        (OSError(errno.ENOSPC, "No space left on device"), DestinationError),
    ],
    ids=["interrupt", "bad weight", "full disk"],
)
def test_a_writing_that_ends_in_the_middle_of_a_weight_leaves_what_was_there(
    traced: Make,
    tmp_path: Path,
    existing: bool,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    folder = tmp_path / "here"
    folder.mkdir()
    if existing:
        write_package(model, folder / "package", target=DEFAULT, facts=FACTS)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tensor = failing_after(2, error)
    model.graph.register_initializer(
        ir.Value(name="broken", shape=tensor.shape, const_value=tensor)
    )
    with pytest.raises(raised):
        write_package(model, folder / "package", target=DEFAULT, facts=FACTS, force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.iterdir()] == (["package"] if existing else [])


def test_a_weight_of_another_length_than_it_says_is_refused(traced: Make, tmp_path: Path) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    tensor = StreamedTensor(
        lambda: [np.ones((9, 64), np.float32)],
        dtype=ir.DataType.FLOAT,
        shape=(10, 64),
        name="short",
    )
    model.graph.register_initializer(ir.Value(name="short", shape=tensor.shape, const_value=tensor))
    with pytest.raises(ValueError, match="'short' wrote 2304 bytes, expected 2560"):
        write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)


def test_a_model_larger_than_the_disk_is_refused_before_it_is_read(
    traced: Make, tmp_path: Path
) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    tensor = StreamedTensor(
        lambda: pytest.fail("read"), dtype=ir.DataType.FLOAT, shape=(1 << 28, 1 << 28), name="huge"
    )
    model.graph.register_initializer(ir.Value(name="huge", shape=tensor.shape, const_value=tensor))
    with pytest.raises(DestinationError, match="no room"):
        write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_extra_files_come_first_and_may_fail(traced: Make, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        assert not list(folder.iterdir())
        raise RuntimeError("no tokenizer")

    model = run_passes(traced(), DEFAULT.passes)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        write_package(model, tmp_path / "p", target=DEFAULT, facts=FACTS, extra_files=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_genai_configuration_follows_the_model(traced: Make, tmp_path: Path) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    package = write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)
    written = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    described = written["model"]
    assert described["type"] == "decoder"
    assert described["eos_token_id"] == [2, 1]
    assert "pad_token_id" not in described, "a token the checkpoint does not have"
    assert described["context_length"] == written["search"]["max_length"] == 4096
    decoder = described["decoder"]
    assert (package / decoder["filename"]).is_file()
    assert decoder["head_size"] == 8
    assert decoder["sliding_window"]["layers"] == [1]
    assert written["search"]["past_present_share_buffer"] is True


def test_a_model_with_states_that_genai_does_not_know_has_no_configuration_for_it(
    traced: Make, tmp_path: Path
) -> None:
    model = run_passes(traced(), DEFAULT.passes)
    scale = ir.Value(
        name="past_key_values.1.key_scale",
        shape=ir.Shape(["batch", 4, "window"]),
        type=ir.TensorType(ir.DataType.FLOAT16),
    )
    model.graph.inputs.append(scale)
    package = write_package(model, tmp_path / "package", target=DEFAULT, facts=FACTS)
    assert not (package / "genai_config.json").exists()
    assert "genai_config.json" not in (package / "manifest.json").read_text(encoding="utf-8")
