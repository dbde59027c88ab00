import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.cli import main as phi4export
from targets import DEFAULT, TARGETS

ROOT = Path(__file__).parents[2]


def test_targets_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert phi4export(["--list-targets"]) == 0
    out, err = capsys.readouterr()
    _, *lines = out.splitlines()
    assert err == ""
    for target, line in zip(TARGETS, lines, strict=True):
        assert line.split()[0] == target.name
        assert ("(default)" in line) == (target is DEFAULT)
        assert target.provider in line
        assert line.rstrip().endswith(target.summary)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("option", ["--list-targets", "--inspect"])
def test_a_reader_that_leaves_ends_the_command_quietly(option: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "export.cli", option]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    command = [sys.executable, "-m", "export.cli", "--inspect"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"phi4export: error: cannot write to stdout: No space left on device\n"
