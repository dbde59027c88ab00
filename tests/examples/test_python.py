"""The program for plain ONNX Runtime: short, free of our packages, and right."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "examples/python/minimal.py"


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int4"])
def test_it_answers_as_our_runtime_does(expected, tmp_path, target: str) -> None:
    wanted = expected(target)
    command = [sys.executable, str(PROGRAM), str(wanted.package), wanted.question]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout == wanted.text + "\n"  # run elsewhere: it imports nothing of ours


def test_without_a_prompt_it_says_how_it_is_called() -> None:
    found = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (1, "usage: python minimal.py PACKAGE PROMPT\n")


def test_it_fits_on_a_page() -> None:
    assert len(PROGRAM.read_text(encoding="utf-8").splitlines()) <= 60
