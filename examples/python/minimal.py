"""Greedy answers of a package through plain ONNX Runtime; nothing of this project is imported.

python minimal.py PACKAGE QUESTION; needs onnxruntime 1.24 or later, numpy and tokenizers.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def answer(package: Path, question: str, room: int = 512) -> Iterator[int]:
    """Tokens of an answer, its end token last; prompt and answer have `room` tokens together."""
    session = ort.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    facts = json.loads(metadata["sambay.config"])
    most = int(metadata.get("sambay.max_tokens", room))  # in one call
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    sizes = {"batch": 1, "window": facts["sliding_window"], "capacity": room}

    binding, keep = session.io_binding(), []  # the arrays behind the binding
    for state in session.get_inputs():
        if state.name.startswith("past_key_values."):
            shape = [sizes.get(axis, axis) for axis in state.shape]
            keep.append(np.zeros(shape, DTYPES[state.type]))
            value = ort.OrtValue.ortvalue_from_numpy(keep[-1])  # wraps, copies nothing
            binding.bind_ortvalue_input(state.name, value)
            present = state.name.replace("past_key_values.", "present.", 1)
            binding.bind_ortvalue_output(present, value)  # the same memory: written in place
    mask = np.zeros((1, room), np.int64)  # 1 for every token so far
    binding.bind_cpu_input("attention_mask", mask)
    logits = np.zeros((1, 1, facts["vocab_size"]), np.float32)
    binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))

    prompt = f"<|user|>{question}<|end|><|assistant|>"
    ids, length = tokenizer.encode(prompt, add_special_tokens=False).ids, 0
    while length + len(ids) <= room:
        for piece in (ids[i : i + most] for i in range(0, len(ids), most)):
            mask[:, length : length + len(piece)] = 1
            binding.bind_cpu_input("input_ids", np.array([piece], np.int64))
            session.run_with_iobinding(binding)
            length += len(piece)
        ids = [int(logits[0, 0].argmax())]
        yield ids[0]
        if ids[0] in facts["eos_token_ids"]:
            return


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python minimal.py PACKAGE PROMPT")
    folder = Path(sys.argv[1])
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    print(decode(list(answer(folder, sys.argv[2]))))
