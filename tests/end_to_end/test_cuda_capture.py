"""ONNX Runtime's CUDA provider captures our packages, seen without a device.

The provider of a wheel of onnxruntime-gpu runs on a stand-in for CUDA's libraries, on which kernels
do nothing. So this shows where nodes are placed, what is called while a stream is captured, and
what is replayed; it shows nothing of what kernels compute.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.capture
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("CUDA_PYTHON")
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
SOURCE = Path(__file__).with_name("cuda_stand_in") / "cuda_stand_in.cpp"
LIBRARIES = (
    *("libcuda.so.1", "libcudart.so.13", "libcudnn.so.9", "libcufft.so.12"),
    *("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"),
)
CALLED = re.compile(rb"\0((?:__)?cu(?:da|blas|dnn|rand|fft|TensorMap)\w+)(?=\0)")

# Two prompts, the second beyond the capacity there is, each with tokens behind it.
OURS = """
import sys
from runtime_py import Session
sequence = Session(sys.argv[1], cuda_graph=True).start()
for count in (5, 1, 1, 300, 1, 1):
    sequence.step([7] * count)
del sequence
"""
GENAI = """
import json, pathlib, sys
import onnxruntime_genai as og
path = pathlib.Path(sys.argv[1], "genai_config.json")
config = json.loads(path.read_text())
options = config["model"]["decoder"]["session_options"]
options["provider_options"][0]["cuda"]["enable_cuda_graph"] = "1"
options.pop("custom_ops_library", None)
path.write_text(json.dumps(config))
parameters = og.GeneratorParams(model := og.Model(sys.argv[1]))
parameters.set_search_options(do_sample=False, max_length=600)
generator = og.Generator(model, parameters)
for count in (5, 100):
    generator.append_tokens([7] * count)
    generator.generate_next_token()
    generator.get_logits()
    generator.generate_next_token()
    generator.get_logits()
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's libraries, all of them the stand-in."""
    if PYTHON is None:
        pytest.skip("set CUDA_PYTHON as CONTRIBUTING.md says")
    if not (HEADERS / "cuda_runtime.h").exists() or shutil.which("g++") is None:
        pytest.skip("needs g++, and CUDA's headers under CUDA_HOME")
    folder = tmp_path_factory.mktemp("cuda")
    code = "import onnxruntime; print(onnxruntime.__path__[0])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    site = Path(found.stdout.strip()).parent
    names: set[bytes] = set()
    for library in (*site.glob("*/capi/*cuda.so"), *site.glob("*/libonnxruntime-genai-cuda.so")):
        names.update(CALLED.findall(library.read_bytes()))
    others = folder / "others.c"
    others.write_text(
        "".join(f"__attribute__((weak)) int {name.decode()}() {{ return 0; }}\n" for name in names)
    )
    built = folder / LIBRARIES[0]
    subprocess.run(["gcc", "-w", "-fPIC", "-c", others, "-o", folder / "others.o"], check=True)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", HEADERS, SOURCE, folder / "others.o"]
    subprocess.run([*command, "-o", built], check=True)
    for name in LIBRARIES[1:]:
        (folder / name).symlink_to(built)
    return folder


Log = Callable[[str, str], list[str]]


@pytest.fixture(params=["cuda-int4", "cuda-fp16"])
def log_of(
    stand_in: Path, export: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[str], list[str]]:
    """Run a program on a package; what the stand-in wrote down."""
    package = shutil.copytree(export(None, request.param), tmp_path / "package")

    def run(program: str) -> list[str]:
        log = tmp_path / "log"
        told = {"LD_LIBRARY_PATH": stand_in, "CUDA_STAND_IN_LOG": log, "PYTHONPATH": ROOT}
        environment = {**os.environ, **{name: str(path) for name, path in told.items()}}
        environment["SAMBAY_NATIVE"] = "0"  # that library holds its own CUDA runtime
        subprocess.run([str(PYTHON), "-c", program, package], env=environment, check=True)
        return log.read_text(encoding="utf-8").splitlines()

    return run


def check(log: list[str], replays: list[int]) -> None:
    """Nothing that capturing forbids was called, and each graph was replayed so often."""
    assert not [line for line in log if line.startswith("forbidden")]
    captured = [int(line.split()[1]) for line in log if line.startswith("captured")]
    assert len(captured) == len(replays)
    assert min(captured) > 500  # launches
    graphs = [line for line in log if line.startswith("replay")]
    assert [len(list(group)) for _, group in itertools.groupby(graphs)] == replays


def test_our_runtime_captures_replays_and_releases(log_of: Callable[[str], list[str]]) -> None:
    """After the capture once by ONNX Runtime, once with the states put back; then a token."""
    log = log_of(OURS)
    check(log, [3, 3])
    assert len([line for line in log if line.startswith("release")]) == 2


def test_genai_captures_once_for_both_prompts(log_of: Callable[[str], list[str]]) -> None:
    code = "import onnxruntime_genai as og; assert og.is_cuda_available()"
    if subprocess.run([str(PYTHON), "-c", code], capture_output=True).returncode:
        pytest.skip("install onnxruntime-genai-cuda beside it")
    check(log_of(GENAI), [1 + 1 + 3])
