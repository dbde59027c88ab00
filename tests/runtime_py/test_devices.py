"""States on a device, played by a wrapper of a session on the processor.

What ONNX Runtime does for a device: an input that stands in the processor's memory is copied when
it is bound, so that later changes are not seen; one that stands on the device is read in place.
"""

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

WRAPPED = ort.OrtValue.ortvalue_from_numpy


class OnDevice:
    """A tensor that the processor can only copy to and from."""

    def __init__(self, array: np.ndarray) -> None:
        self.held = array.copy()

    def numpy(self) -> np.ndarray:
        return self.held.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        self.held[...] = array

    def tensor_size_in_bytes(self) -> int:
        return self.held.nbytes


class Binding:
    def __init__(self, binding: ort.IOBinding) -> None:
        self.binding = binding
        self.copied: dict[str, np.ndarray] = {}
        self.bound: dict[str, Any] = {}  # what stands on the device

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.copied[name] = array.copy()
        self.binding.bind_cpu_input(name, self.copied[name])

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        if isinstance(value, OnDevice):
            self.bound[name] = value
            self.binding.bind_ortvalue_input(name, WRAPPED(value.held))
        else:
            self.bind_cpu_input(name, value.numpy())

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        if isinstance(value, OnDevice):
            self.bound[name] = value
            value = WRAPPED(value.held)
        self.binding.bind_ortvalue_output(name, value)


class Device:
    """A session whose provider has memory of its own."""

    def __init__(self, session: ort.InferenceSession, provider: str) -> None:
        self.session, self.provider = session, provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self.session.io_binding())

    def run_with_iobinding(self, binding: Binding) -> None:
        self.session.run_with_iobinding(binding.binding)


class Capturing(Device):
    """Captures as ONNX Runtime does.

    In every thread for itself; the first call of an id runs the model three times; later ones read
    and write what was bound in the first, whatever is bound now.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__(session, "CUDAExecutionProvider")
        self.graphs: dict[tuple[int, int], tuple[Binding, dict[str, Any]]] = {}
        self.ids: list[int] = []
        self.released: list[int] = []

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions | None = None) -> None:
        assert options is not None, "without an id it would be captured"
        graph_id = int(options.get_run_config_entry("gpu_graph_id"))
        self.ids.append(graph_id)
        if graph_id == -1:
            super().run_with_iobinding(binding)
            return
        names = [value.name for value in (*self.get_inputs(), *self.get_outputs())]
        assert sorted(binding.bound) == sorted(names), "a replay sees nothing but the device"
        key = (threading.get_ident(), graph_id)
        if key not in self.graphs:
            self.graphs[key] = binding, dict(binding.bound)
            for _ in range(2):
                super().run_with_iobinding(binding)
        captured, bound = self.graphs[key]
        assert all(captured.bound[name] is value for name, value in bound.items())
        super().run_with_iobinding(captured)

    def release_captured_graph(self, graph_id: int) -> None:
        self.released.append(graph_id)


def make_value(array: np.ndarray, device_type: str = "cpu") -> Any:
    """As ONNX Runtime's own, with that device."""
    return OnDevice(array) if device_type == "cuda" else WRAPPED(array)


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
