import json
import os
import shlex
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


@pytest.mark.parametrize(
    ("command", "module"),
    [
        *(("export.cli", m) for m in ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")),
        ("export.verify", "torch"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(
    tmp_path: Path, command: str, module: str
) -> None:
    """In a process of its own: here all is imported already."""
    hide = f"import runpy, sys; sys.modules[{module!r}] = None; "
    start = f"runpy.run_module({command!r}, run_name='__main__', alter_sys=True)"
    given = ["--target", "directml-int4", "-o"] if command == "export.cli" else []
    line = [sys.executable, "-c", hide + start, *given, str(tmp_path / "package")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{module} is not installed" in done.stderr
    assert "pip install 'phi4export[export]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_auto_exports_for_the_provider_that_is_installed_and_tells_how_to_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["DmlExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: there)
    package = tmp_path / "mon modèle [π]"
    assert phi4export(["--target", "auto", "-o", str(package)]) == 0
    manifest = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["target"] == "directml-int4"
    told = capsys.readouterr().err.partition("talk with it: ")[2]
    if os.name != "nt":
        assert shlex.split(told) == ["python", "-m", "runtime_py.chat", str(package)]
