"""Time llama.cpp in a process of its own; `benchmarks.peers` starts it.

    PYTHON benchmarks/peer_llama.py MODEL.gguf JOB

Needs llama-cpp-python and numpy, nothing of this project, so that PYTHON may be of a venv that has
only those. A depth costs no prefill: the saved state of a short sequence is repeated to the length
wanted and loaded. Every setting of `SETTINGS` is timed; a quantized cache of values needs flash
attention. JOB and what is printed: see `benchmarks.peers.Job`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import sys
import time

import llama_cpp as llama
import numpy as np

F16, Q8_0 = 1, 8  # ggml's types of the cache
SETTINGS = {
    "flash attention, f16 cache": (1, F16),
    "flash attention, q8_0 cache": (1, Q8_0),
    "no flash attention, f16 cache": (0, F16),
}
SEED = 64  # tokens of the sequence that is repeated


def open_model(path: str) -> object:
    """The model with its weights mapped, llama.cpp silent unless it fails."""
    llama.llama_backend_init()
    if not os.environ.get("LLAMA_VERBOSE"):
        llama.llama_log_set(_QUIET, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}: set LLAMA_VERBOSE=1 to see why")
    return model


_QUIET = llama.llama_log_callback(lambda level, text, data: None)


class Context:
    """One setting's cache with room for `room` tokens."""

    def __init__(self, model: object, flash: int, cache: int, room: int, threads: int) -> None:
        settings = llama.llama_context_default_params()
        settings.n_ctx = -(-room // 256) * 256
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = cache
        if hasattr(settings, "flash_attn_type"):
            settings.flash_attn_type = flash
        else:  # before llama-cpp-python 0.3.17
            settings.flash_attn = bool(flash)
        self.handle = llama.llama_init_from_model(model, settings)
        if not self.handle:
            raise SystemExit("llama.cpp cannot make a context: set LLAMA_VERBOSE=1 to see why")

    def clear(self) -> None:
        """Forget every token."""
        llama.llama_memory_clear(llama.llama_get_memory(self.handle), True)

    def step(self, before: int, tokens: int) -> float:
        """Seconds to read `tokens` tokens after `before` and make the last one's logits."""
        batch = llama.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i in range(tokens):
            batch.token[i], batch.pos[i] = 5 + i % 100, before + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == tokens - 1
        begin = time.perf_counter()
        code = llama.llama_decode(self.handle, batch)
        llama.llama_synchronize(self.handle)
        taken = time.perf_counter() - begin
        llama.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode returned {code} at {before} tokens")
        return taken

    def prompt(self, tokens: int) -> float:
        """Seconds to read a prompt of a new sequence."""
        self.clear()
        return sum(self.step(at, min(512, tokens - at)) for at in range(0, tokens, 512))

    def jump(self, depth: int) -> None:
        """Make the sequence `depth` tokens long."""
        self.clear()
        if depth <= SEED:
            if depth:
                self.step(0, depth)
            return
        self.step(0, SEED)
        size = llama.llama_state_seq_get_size(self.handle, 0)
        saved = np.empty(size, np.uint8)
        llama.llama_state_seq_get_data(self.handle, _bytes(saved), size, 0)
        state = repeat_state(saved.tobytes(), depth)
        self.clear()
        if not llama.llama_state_seq_set_data(self.handle, _bytes(state), state.size, 0):
            raise SystemExit("llama.cpp refused the repeated state: its format has changed")

    def free(self) -> None:
        """Give the cache back."""
        llama.llama_free(self.handle)


def _bytes(array: np.ndarray) -> object:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def repeat_state(saved: bytes, depth: int) -> np.ndarray:
    """A saved sequence of `SEED` tokens, its cache rows repeated to `depth` tokens.

    Layout: header (8 bytes), streams, cells, the cells' positions, then per layer the keys and per
    layer the values, each with its type and size of a row; values may be transposed.
    Source: llama_kv_cache::state_write of llama.cpp.

    Raises:
        SystemExit: the layout is another one.
    """
    cell = struct.Struct("<iIi")  # position, number of sequences, the sequence
    streams, cells = struct.unpack_from("<II", saved, 8)
    at = 16 + SEED * cell.size
    if (streams, cells) != (1, SEED) or cell.unpack_from(saved, 16)[:2] != (0, 1):
        raise SystemExit(f"saved state of llama.cpp has {streams} streams, {cells} cells: unknown")
    transposed, layers = struct.unpack_from("<II", saved, at)
    positions = np.zeros((depth, 3), np.int32)
    positions[:, 0], positions[:, 1] = np.arange(depth), 1
    state = bytearray(saved[:8] + struct.pack("<II", 1, depth) + positions.tobytes())
    state += saved[at : at + 8]
    at += 8
    for index in range(2 * layers):
        across = bool(transposed) and index >= layers  # [rows, tokens] instead of [tokens, row]
        if across:
            item, rows = struct.unpack_from("<II", saved, at + 4)
            sizes = (rows, SEED, item)
        else:
            sizes = (1, SEED, *struct.unpack_from("<Q", saved, at + 4))
        state += saved[at : at + 12]
        table = np.frombuffer(saved, np.uint8, math.prod(sizes), at + 12).reshape(sizes)
        state += np.concatenate([table] * -(-depth // SEED), axis=1)[:, :depth].tobytes()
        at += 12 + table.size
    if at != len(saved):
        raise SystemExit(f"saved state of llama.cpp has {len(saved) - at} unknown bytes at its end")
    return np.frombuffer(state, np.uint8)


def measure(context: Context, depth: int, seconds: float) -> list[float]:
    """Seconds of each step from a depth on, after two that are not counted."""
    context.jump(depth)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 6 or (time.perf_counter() - begin < seconds and len(taken) < 200):
        taken.append(context.step(depth + len(taken), 1))
    return taken[2:]


def main(path: str, job_text: str) -> int:
    """Run the job."""
    job = json.loads(job_text)
    model = open_model(path)
    found: dict[str, dict[str, list[float]]] = {}
    for setting, (flash, cache) in SETTINGS.items():
        seconds = found[setting] = {}
        for depth in job["depths"]:
            context = Context(model, flash, cache, depth + 256, job["threads"])
            seconds[f"depth {depth}"] = measure(context, depth, job["seconds"])
            context.free()
        for tokens in job["prompts"]:
            context = Context(model, flash, cache, tokens, job["threads"])
            context.prompt(3)
            seconds[f"prompt {tokens}"] = [context.prompt(tokens)]
            context.free()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
