"""The tensors a sequence carries from one call to the next.

The model file is the contract: ``past_key_values.3.conv_state`` goes in and comes back as
``present.3.conv_state``. Nothing here knows which layer is attention and which is a scan; the
name of a dimension says how long it is: ``batch``, ``window`` (fixed) or ``capacity`` (grows).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from runtime_py.errors import PackageError
from runtime_py.native import CPU, CUDA

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
POSITIONS = "position_ids"  # which some of several graphs take and none reads
PAST, PRESENT = "past_key_values.", "present."
GROWING = "capacity"
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
}
# Where states live: what ONNX Runtime's Python can make tensors in. Another provider's states live
# in the processor's memory and travel in every run.
DEVICES = {CPU: "cpu", CUDA: "cuda"}
BLOCK = 256  # slots; capacities are multiples of it
GROWTH = 1.25  # amortises copying to at most 5 copies of a slot, wastes at most a quarter


@dataclass(frozen=True)
class State:
    """One state: its two names in the graph, its axes (sizes or dimension names), its dtype."""

    past: str
    present: str
    axes: tuple[int | str, ...]
    dtype: np.dtype[Any]

    @property
    def grows(self) -> bool:
        """Whether it holds one slot for every token of the sequence."""
        return GROWING in self.axes

    def zeros(self, sizes: Mapping[str, int]) -> np.ndarray:
        """A fresh state. Pages of a large one take memory only once they are written.

        Zeros, also where no token was written yet: attention multiplies unused slots by 0, and
        0 times a NaN left in the memory would be NaN.
        """
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)
        return np.zeros(shape, self.dtype)

    def copy(self, array: np.ndarray, sizes: Mapping[str, int], used: int) -> np.ndarray:
        """A copy of ``array`` in fresh memory of the given sizes.

        Of a growing state the first ``used`` slots are copied and the others are zeros.
        """
        fresh = self.zeros(sizes)
        fresh[self.used(used)] = array[self.used(used)]
        return fresh

    def used(self, slots: int) -> tuple[slice, ...]:
        """Index of the part of the array that holds something after ``slots`` tokens."""
        return tuple(slice(slots) if axis == GROWING else slice(None) for axis in self.axes)


def find_states(inputs: Iterable[Any], outputs: Iterable[Any]) -> tuple[State, ...]:
    """Pair every past input of a model with its present output.

    Args:
        inputs, outputs: what ONNX Runtime tells of them: name, shape and type.

    Raises:
        PackageError: a state would be lost, or its shape or dtype is none of the contract's.
    """
    produced = {output.name for output in outputs}
    states = []
    for past in inputs:
        if not past.name.startswith(PAST):
            continue
        present = past.name.replace(PAST, PRESENT, 1)
        if present not in produced:
            raise PackageError(
                f"input {past.name!r} has no output {present!r}: export the model again"
            )
        axes = tuple(past.shape)
        if past.type not in DTYPES or not set(axes) <= {"batch", "window", GROWING, *_sizes(axes)}:
            raise PackageError(
                f"input {past.name!r} is {past.type} {list(axes)}; expected a float, float16 or "
                "int8 tensor of sizes, 'batch', 'window' and 'capacity': export the model again"
            )
        states.append(State(past.name, present, axes, DTYPES[past.type]))
    return tuple(states)


def grown_capacity(capacity: int, needed: int, most: int) -> int:
    """Slots to have next, when ``needed`` of them are more than the ``capacity`` there is.

    Args:
        capacity: slots there are, 0 at the start.
        needed: slots that must be there, at most ``most``.
        most: tokens no sequence may exceed.
    """
    wanted = min(max(needed, int(capacity * GROWTH)), most)
    return -(-wanted // BLOCK) * BLOCK


def _sizes(axes: Iterable[Any]) -> set[int]:
    return {axis for axis in axes if isinstance(axis, int)}


Memory: TypeAlias = "np.ndarray | ort.OrtValue"  # of the processor, or of a device


@dataclass(frozen=True)
class Buffers:
    """The memory a sequence lives in, bound to a model's inputs and outputs.

    Past and present of a state are the same memory: a run changes it in place.
    """

    model: Any  # ort.InferenceSession or Pipeline
    states: tuple[State, ...]
    window: int
    memory: tuple[Memory, ...]  # one a state
    mask: np.ndarray  # int64 [batch, capacity]: 1 a token; 0 padding, or not there yet
    binding: Any  # ort.IOBinding; ids and logits are bound for each run

    @staticmethod
    def allocate(
        model: Any,
        states: tuple[State, ...],
        *,
        window: int,
        batch: int,
        capacity: int,
    ) -> Buffers:
        """Zero states for ``batch`` rows of up to ``capacity`` tokens."""
        sizes = {"batch": batch, "window": window, GROWING: capacity}
        memory = tuple(on_device(model, state.zeros(sizes)) for state in states)
        mask = np.zeros((batch, capacity), np.int64)
        return Buffers(model, states, window, memory, mask, _bind(model, states, memory, mask))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The states, one array each: their memory itself, or a copy of what a device has."""
        return tuple(_as_array(each) for each in self.memory)

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.mask.shape[1]

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        sizes = (
            each.nbytes if isinstance(each, np.ndarray) else each.tensor_size_in_bytes()
            for each in self.memory
        )
        return sum(sizes)

    def bind_states(self) -> Any:
        """A binding of the states alone."""
        return _bind_states(self.model, self.states, self.memory)

    def bind_again(self) -> None:
        """Make the next run see what changed since the last.

        A binding reads the processor's memory in place, but for another device it takes a copy of
        it when it is bound.
        """
        if _device(self.model) != "cpu":
            _bind_pasts(self.binding, self.states, self.memory)
            self.binding.bind_cpu_input(MASK, self.mask)

    def fill(self, stored: Iterable[np.ndarray], mask: np.ndarray) -> None:
        """Take over states, each as far as it is used, and the mask [batch, tokens] up to here.

        Raises:
            ValueError: a shape is not that of the state.
        """
        used = mask.shape[1]
        self.mask[:, :used] = mask
        for state, memory, part in zip(self.states, self.memory, stored, strict=True):
            array = _as_array(memory)
            array[state.used(used)] = part
            if not isinstance(memory, np.ndarray):
                memory.update_inplace(array)

    def grown(self, capacity: int, used: int) -> Buffers:
        """Buffers with more room; those that do not grow are shared with these."""
        return self._moved(capacity, used, share=True)

    def forked(self, used: int) -> Buffers:
        """Buffers with the same content that share nothing with these."""
        return self._moved(self.capacity, used, share=False)

    def _moved(self, capacity: int, used: int, *, share: bool) -> Buffers:
        sizes = {"batch": len(self.mask), "window": self.window, GROWING: capacity}
        memory = tuple(
            each
            if share and not state.grows
            else on_device(self.model, state.copy(_as_array(each), sizes, used))
            for state, each in zip(self.states, self.memory, strict=True)
        )
        mask = np.zeros((len(self.mask), capacity), np.int64)
        mask[:, :used] = self.mask[:, :used]
        binding = _bind(self.model, self.states, memory, mask)
        return Buffers(self.model, self.states, self.window, memory, mask, binding)


def _device(model: Any) -> str:
    """Where the model's states live; empty where they travel."""
    return DEVICES.get(model.get_providers()[0], "")


def on_device(model: Any, array: np.ndarray) -> Memory:
    """The array itself, or a copy where the model's states live."""
    device = _device(model)
    if device in ("", "cpu"):
        return array
    return ort.OrtValue.ortvalue_from_numpy(array, device)


def _as_array(memory: Memory) -> np.ndarray:
    if isinstance(memory, np.ndarray):
        return memory
    return np.asarray(memory.numpy())


def _as_value(memory: Memory) -> Any:
    if isinstance(memory, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(memory)  # wraps the array, copies nothing
    return memory


def _bind(
    model: Any,
    states: tuple[State, ...],
    memory: tuple[Memory, ...],
    mask: np.ndarray,
) -> Any:
    binding = _bind_states(model, states, memory)
    binding.bind_cpu_input(MASK, mask)
    return binding


def _bind_states(model: Any, states: tuple[State, ...], memory: tuple[Memory, ...]) -> Any:
    binding = model.io_binding()
    _bind_pasts(binding, states, memory)
    for state, each in zip(states, memory, strict=True):
        binding.bind_ortvalue_output(state.present, _as_value(each))
    return binding


def _bind_pasts(binding: Any, states: tuple[State, ...], memory: tuple[Memory, ...]) -> None:
    for state, each in zip(states, memory, strict=True):
        binding.bind_ortvalue_input(state.past, _as_value(each))
