"""What a user installs: a wheel with the small model in it, which works outside a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True)
    return next(folder.glob("phi4export-*.whl"))


def test_the_wheel_holds_the_small_model_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    stored = sum(size for name, size in sizes.items() if name.startswith("export/reference/"))
    needed = ("reference/README.md", "reference/config.json", "verify/calibration.txt")
    assert {f"export/{name}" for name in needed} < set(sizes)
    assert 1_000_000 < sizes["export/reference/model.safetensors"] < 16_000_000
    assert stored < 17_000_000
    assert not [name for name in sizes if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_the_installed_wheel_exports_and_answers_in_an_empty_folder(wheel, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    found = run("-c", "import export, runtime_py; print(export.__file__, runtime_py.__file__)")
    assert found.count(str(site)) == 2
    run("-m", "export.cli", "--output", "demo")
    question = ("--prompt", "What is 347 + 589?", "--temperature", "0")
    assert r"\boxed{936}" in run("-m", "runtime_py.chat", "demo", *question)
