"""Run a model in its three parts; as a program, with the fixed one on the HTP emulator.

Needs numpy and ONNX Runtime only: it runs in onnxruntime-qnn's own venv.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

PARTS = ("tokens", "fixed", "growing")
Load = Callable[[Path], ort.InferenceSession]


def on_cpu(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def on_htp(path: Path) -> ort.InferenceSession:
    """Every node on the HTP, or an error."""
    devices = [each for each in ort.get_ep_devices() if each.ep_name == "QNN"][:1]
    assert devices, "onnxruntime-qnn was not registered"
    htp = {"backend_type": "htp", "soc_model": "60", "htp_arch": "73"}
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices, htp | {"enable_htp_fp16_precision": "1"})
    return ort.InferenceSession(path, options)


class ThreeParts:
    """One sequence. Files are ``{part}{tokens}.onnx``, for calls of `most` tokens and of 1."""

    def __init__(
        self, folder: Path, most: int, load_fixed: Load = on_cpu, capacity: int = 128
    ) -> None:
        loads = (on_cpu, load_fixed, on_cpu)
        self.calls = {
            tokens: [
                load(folder / f"{part}{tokens}.onnx")
                for part, load in zip(PARTS, loads, strict=True)
            ]
            for tokens in (most, 1)
        }
        self.most, self.mask = most, []
        self.values = {
            each.name: np.zeros([capacity if n == "capacity" else n for n in each.shape], "f4")
            for session in self.calls[1]
            for each in session.get_inputs()
            if each.name.startswith("past_key_values.")
        }

    def step(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [vocab] of the last of up to `most` tokens; fewer are padded on the left."""
        tokens = 1 if len(ids) == 1 else self.most
        padding = tokens - len(ids)
        self.mask += [0] * padding + [1] * len(ids)
        values = self.values
        values["input_ids"] = np.array([[0] * padding + list(ids)])
        values["attention_mask"] = np.array([self.mask])
        for session in self.calls[tokens]:
            names = [each.name for each in session.get_outputs()]
            feed = {each.name: values[each.name] for each in session.get_inputs()}
            values.update(zip(names, session.run(names, feed), strict=True))
        for name in [each for each in values if each.startswith("present.")]:
            values[name.replace("present.", "past_key_values.")] = values.pop(name)
        return values["logits"][0, 0]


def main(folder: Path, most: int, answer: int = 12) -> None:
    """Write logits.npy [calls, 2, vocab]: float32, and the HTP given the same tokens."""
    import onnxruntime_qnn

    ort.register_execution_provider_library("QNN", onnxruntime_qnn.get_library_path())
    prompt = np.random.default_rng(3).integers(0, 256, most + 6).tolist()
    wanted, got = ThreeParts(folder, most), ThreeParts(folder, most, on_htp)
    pairs = [[run.step(prompt[:most]) for run in (wanted, got)]]
    ids = prompt[most:]  # padded on the left
    for _ in range(answer + 1):
        pairs.append([run.step(ids) for run in (wanted, got)])
        ids = [int(pairs[-1][0].argmax())]
    np.save(folder / "logits.npy", np.array(pairs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
