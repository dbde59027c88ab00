"""The benchmark of packages measures a real one, and goes on after a failure."""

import json
from pathlib import Path

import pytest

from benchmarks.targets import main, measure
from export.cli import REFERENCE


def test_a_package_is_exported_looked_at_run_and_removed(tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path / "made"), "--target", "webgpu-int4"]
    arguments += ["--options=--quantizer rtn"]
    assert main([str(REFERENCE), *arguments, "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["targets"]
    assert row["options"] == ["--quantizer", "rtn"]
    assert row["bytes"]["model.onnx.data"] > 10**6
    assert row["lint"]["faults"] == 0
    assert row["lint"]["nodes"] > 500
    assert row["run_on_cpu"]["step_s"] > 0
    assert min(row[stage]["peak_bytes"] for stage in ("export", "lint", "run_on_cpu")) > 10**7
    assert row["export"]["cpu_seconds"] > 1
    assert not list((tmp_path / "made").iterdir())


def test_a_checkpoint_that_is_not_there_is_told_and_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "none"), "--folder", str(tmp_path), "--target", "cpu-int4"]
    assert main(arguments) == 1
    assert "failed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "says"), [("raise ValueError('why')", "ValueError: why"), ("1 / 0", "ZeroDivision")]
)
def test_a_process_that_fails_is_told_by_its_last_line(script: str, says: str) -> None:
    assert says in measure(script)["failed"]
