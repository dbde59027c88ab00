"""Answer with a package on QNN's HTP emulator and with another on the CPU, given the same tokens.

Runs in onnxruntime-qnn's own venv: the root of the project on PYTHONPATH is all it has of it.
"""

import sys
from pathlib import Path

import numpy as np

from runtime_py import Session

CPU = "CPUExecutionProvider"


def main(package: Path, reference: Path, output: Path, prompts: list[str]) -> None:
    """Write logits [calls, 2, vocab] of greedy answers: the reference's, and the package's own."""
    wanted, got = Session(reference, providers=[CPU]), Session(package)
    assert got.model.get_providers() == [CPU, "QNNExecutionProvider"]
    pairs = []
    for prompt in prompts:
        runs = wanted.start(), got.start()
        ids = wanted.tokenizer.encode(prompt)
        while ids[0] not in wanted.config.eos_token_ids:
            pairs.append([run.step(ids)[0] for run in runs])
            ids = [int(pairs[-1][1].argmax())]  # the package goes its own way
    np.save(output, np.array(pairs))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
