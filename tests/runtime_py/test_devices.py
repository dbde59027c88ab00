"""States on a device, played by a wrapper of a session on the processor.

What ONNX Runtime does for a device: an input that stands in the processor's memory is copied when
it is bound, so that later changes are not seen; one that stands on the device is read in place.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from runtime_py import Session, states
from runtime_py.errors import PackageError

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

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.copied[name] = array.copy()
        self.binding.bind_cpu_input(name, self.copied[name])

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        if isinstance(value, OnDevice):
            self.binding.bind_ortvalue_input(name, WRAPPED(value.held))
        else:
            self.bind_cpu_input(name, value.numpy())

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        if isinstance(value, OnDevice):
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
