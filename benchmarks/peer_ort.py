"""Time a full-attention ONNX model in a process of its own; `benchmarks.peers` starts it.

    python -m benchmarks.peer_ort MODEL JOB

The caches are bound as input and output both, so that ONNX Runtime writes new rows in place, as its
own generator does. JOB and what is printed: see `benchmarks.peers.Job`.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime as ort


class FullAttention:
    """A session, its caches for `room` tokens (noise), and the time of a call."""

    def __init__(self, session: ort.InferenceSession, room: int) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.hidden = session.get_inputs()[0].shape[2]
        self.caches: dict[str, np.ndarray] = {}  # [1, kv_heads, room, head_size]
        noise = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32) * 0.1
        for entry in session.get_inputs():
            if not entry.name.startswith("past."):
                continue
            _, heads, _, size = entry.shape
            cache = np.empty((1, heads, room, size), np.float32)
            cache.reshape(-1)[:] = np.resize(noise, cache.size)
            self.caches[entry.name] = cache
            value = ort.OrtValue.ortvalue_from_numpy(cache)  # shares its memory
            self.binding.bind_ortvalue_input(entry.name, value)
            present = entry.name.replace("past.", "present.", 1)
            self.binding.bind_ortvalue_output(present, value)
        self.binding.bind_output("logits")

    def step(self, before: int, tokens: int) -> float:
        """Seconds to read `tokens` tokens after `before`."""
        x = np.random.default_rng(before).standard_normal((1, tokens, self.hidden))
        self.binding.bind_cpu_input("hidden", x.astype(np.float32))
        self.binding.bind_cpu_input("last", np.array([before + tokens - 1], np.int32))
        self.binding.bind_cpu_input("total", np.array(before + tokens, np.int32))
        begin = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - begin


def measure(model: FullAttention, depth: int, seconds: float) -> list[float]:
    """Seconds of each step from a depth on, after two that are not counted."""
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 6 or (time.perf_counter() - begin < seconds and len(taken) < 200):
        taken.append(model.step(depth + len(taken), 1))
    return taken[2:]


def main(path: str, job_text: str) -> int:
    """Run the job."""
    job = json.loads(job_text)
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    seconds = {}
    for depth in job["depths"]:
        model = FullAttention(session, depth + 256)
        seconds[f"depth {depth}"] = measure(model, depth, job["seconds"])
        del model  # before the next: at 32K tokens the caches are 8.6 GB
    for tokens in job["prompts"]:
        model = FullAttention(session, tokens)
        model.step(0, 3)
        seconds[f"prompt {tokens}"] = [model.step(0, tokens)]
        del model
    print(json.dumps({"float32 cache": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
