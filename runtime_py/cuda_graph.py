"""Calls of one token, replayed from a CUDA graph.

ONNX Runtime captures what a call launches on a device, under an id, and replays it in later calls
of that id: the processor launches one graph instead of hundreds of kernels. A replay reads and
writes the addresses of the captured call, so ids, mask and logits stand on the device, too, and
are changed in place.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime_py.interrupts import whole
from runtime_py.states import IDS, LOGITS, MASK, Buffers, on_device

OLDEST = (1, 31)  # earlier versions replay copies from memory that they have given away
_ids = itertools.count(1)  # never again: a graph belongs to the buffers it was captured with


def run_options(graph_id: int = -1) -> ort.RunOptions:
    """Options of a call that is captured or replayed under an id; by default it is neither."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


class CudaGraph:
    """Buffers of a sequence, bound for calls of one token."""

    def __init__(self, buffers: Buffers, vocab_size: int) -> None:
        """Bind them; nothing is captured yet.

        Args:
            buffers: whose states live on a CUDA device.
            vocab_size: of the model.
        """
        batch, graph_id = len(buffers.mask), next(_ids)
        self._buffers, self._options = buffers, run_options(graph_id)
        logits = np.zeros((batch, 1, vocab_size), np.float32)
        self._ids: Any = on_device(buffers.model, np.zeros((batch, 1), np.int64))
        self._mask: Any = on_device(buffers.model, buffers.mask)
        self._logits: Any = on_device(buffers.model, logits)
        self._binding = buffers.bind_states()
        self._binding.bind_ortvalue_input(IDS, self._ids)
        self._binding.bind_ortvalue_input(MASK, self._mask)
        self._binding.bind_ortvalue_output(LOGITS, self._logits)
        self._captured = threading.local()  # ONNX Runtime keeps a graph for the thread it ran in
        release = weakref.finalize(self, buffers.model.release_captured_graph, graph_id)
        release.atexit = False  # the session goes first

    def run(self, ids: np.ndarray, logits: np.ndarray) -> None:
        """Feed a token to each row. Ctrl-C waits for the end.

        Args:
            ids: [batch, 1] int64; the mask is that of the buffers.
            logits: [batch, 1, vocab] float32, written here.
        """
        with whole():
            self._ids.update_inplace(ids)
            self._mask.update_inplace(self._buffers.mask)
            if not hasattr(self._captured, "done"):
                self._capture()
            self._run()
            logits[...] = self._logits.numpy()

    def _capture(self) -> None:
        """Capture, and leave the states as they were.

        The first call runs the model several times, to warm up, and moves every state on as often.
        A cache's slot is written with the same again, and no query sees what stood in it before.
        """
        fixed: list[Any] = [
            memory
            for state, memory in zip(self._buffers.states, self._buffers.memory, strict=True)
            if not state.grows
        ]
        before = [memory.numpy() for memory in fixed]
        self._run()
        for memory, array in zip(fixed, before, strict=True):
            memory.update_inplace(array)
        self._captured.done = True

    def _run(self) -> None:
        self._buffers.model.run_with_iobinding(self._binding, self._options)
