"""A device with memory of its own, played by a wrapper of a session on the processor.

What ONNX Runtime does for a device: an input that stands in the processor's memory is copied when
it is bound, so that later changes are not seen; one that stands on the device is read in place.
"""

import threading
from typing import Any

import numpy as np
import onnxruntime as ort

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
