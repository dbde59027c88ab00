"""States on a device, and calls replayed from what it captured."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from runtime_py import Session, states
from runtime_py.errors import BrokenSequenceError, InputError, PackageError
from tests.runtime_py.devices import Capturing, Device, make_value


@pytest.fixture(params=["CUDAExecutionProvider", "OtherExecutionProvider"])
def on_device(
    package: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Session:
    session = Session(package, threads=1)
    session.model = Device(session.model, request.param)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", make_value)
    return session


def test_a_device_sees_what_earlier_calls_left(on_device: Session, package: Path) -> None:
    ids = [index % 3 for index in range(700)]
    sequence, wanted = on_device.start(), Session(package, threads=1).start()
    for start in range(0, 700, 100):  # over several growths
        part = ids[start : start + 100]
        np.testing.assert_array_equal(sequence.step(part), wanted.step(part))
    assert sequence.state_bytes == wanted.state_bytes
    for got, expected in zip(sequence._buffers.arrays, wanted._buffers.arrays, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_fork_and_a_snapshot_of_a_device_go_on(on_device: Session, tmp_path: Path) -> None:
    sequence = on_device.start()
    sequence.step([1, 2, 3])
    sequence.save(tmp_path / "snapshot")
    forked = sequence.fork()
    wanted = sequence.step([4, 5])
    for other in (forked, on_device.load(tmp_path / "snapshot")):
        np.testing.assert_array_equal(other.step([4, 5]), wanted)


def test_only_what_must_travel_travels(on_device: Session) -> None:
    sequence = on_device.start()
    sequence.step([1])
    copied = sequence._buffers.binding.copied
    states_copied = [name for name in copied if name.startswith(states.PAST)]
    on_cuda = on_device.model.get_providers()[0] == "CUDAExecutionProvider"
    assert bool(states_copied) is not on_cuda


@pytest.fixture
def capturing(package: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    session = Session(package, threads=1)
    session.model, session.cuda_graph = Capturing(session.model), True
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", make_value)
    return session


def test_tokens_replayed_from_a_captured_graph_are_those_of_calls(
    capturing: Session, package: Path
) -> None:
    """Prompts in between, growths, a fork, a batch with padding: the states of each are right."""
    plain = Session(package, threads=1)
    got, wanted = capturing.start(2), plain.start(2)
    rng = np.random.default_rng(3)
    for count in (5, 1, 1, 300, 1, 1, 2, 1):  # tokens of a call
        ids, mask = rng.integers(0, 256, (2, count)), np.ones((2, count), int)
        mask[1, 0] = count == 5
        np.testing.assert_array_equal(got.step(ids, mask), wanted.step(ids, mask))
    forked, other = got.fork(), wanted.fork()
    for sequence, expected in ((got, wanted), (forked, other), (got, wanted)):
        ids = rng.integers(0, 256, (2, 1))
        np.testing.assert_array_equal(sequence.step(ids), expected.step(ids))
    for array, expected in zip(got._buffers.arrays, wanted._buffers.arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
    first, second, third = sorted(set(capturing.model.ids) - {-1})
    calls = [-1, first, first, first, -1, second, second, second, -1, second, third, third, second]
    assert [i for i, _ in itertools.groupby(capturing.model.ids)] == [
        i for i, _ in itertools.groupby(calls)
    ]
    assert capturing.model.released == [first]
    del got, forked, sequence
    assert sorted(capturing.model.released) == [first, second, third]


def test_a_thread_captures_for_itself(capturing: Session, package: Path) -> None:
    got, wanted = capturing.start(), Session(package, threads=1).start()
    for ids in ([1, 2], [3], [4]):
        wanted.step(ids)
    got.step([1, 2])
    got.step([3])
    stepping = threading.Thread(target=got.step, args=([4],))
    stepping.start()
    stepping.join()
    np.testing.assert_array_equal(got.logits, wanted.logits)
    assert len(capturing.model.graphs) == 2


def test_a_failure_while_capturing_breaks_the_sequence(
    capturing: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = capturing.start()
    sequence.step([1, 2])

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Capturing, "run_with_iobinding", fail)
    with pytest.raises(BrokenSequenceError, match="not permitted when stream is capturing"):
        sequence.step([3])


@pytest.mark.parametrize(
    ("version", "providers", "message"),
    [
        ("1.32.0", ["CPUExecutionProvider"], "captures on CUDAExecutionProvider, not on CPU"),
        ("1.30.2", ["CUDAExecutionProvider"], "needs ONNX Runtime 1.31 or later, this is 1.30.2"),
    ],
)
def test_capture_that_cannot_be_had_is_an_error(
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    providers: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(ort, "__version__", version)
    with pytest.raises(InputError, match=message):
        Session(package, providers=providers, cuda_graph=True)


def test_several_graphs_are_not_captured(tmp_path: Path) -> None:
    graph = {"file": "decode.onnx", "provider": "CPUExecutionProvider", "tokens": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"graphs": [graph]}), encoding="utf-8")
    with pytest.raises(InputError, match="several graphs, which are not captured; leave cuda_gra"):
        Session(tmp_path, cuda_graph=True)


def test_a_provider_that_cannot_start_is_an_error_and_not_the_processor(
    export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's session would go on with the CPU provider, and say so on stdout."""
    start = ort.InferenceSession._create_inference_session

    def no_adapter(self: Any, providers: list[str], *rest: Any) -> None:
        if providers[0] != "CPUExecutionProvider":
            raise RuntimeError("no adapter")
        start(self, providers, *rest)

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", no_adapter)
    there = ["WebGpuExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: there)
    package = export(None, "webgpu-int4")
    with pytest.raises(PackageError, match=r"no adapter.*WebGpu.* cannot start here, ask for CPU"):
        Session(package)
    assert Session(package, providers=there[1:]).start().step([1]).shape == (1, 800)
