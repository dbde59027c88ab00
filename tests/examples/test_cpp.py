"""The C++ program: compiles without warnings, and decodes our runtime's tokens."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime_py.native import library_path

SOURCE = Path(__file__).parents[2] / "examples/cpp"
HEADER = "onnxruntime_cxx_api.h"

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Built with the headers of ORT_INCLUDE_DIR or of the system, and the wheel's library."""
    places = [os.environ.get("ORT_INCLUDE_DIR"), "/usr/include/onnxruntime", "/usr/include"]
    headers = next((place for place in places if place and (Path(place) / HEADER).exists()), None)
    if headers is None or shutil.which("cmake") is None:
        pytest.skip(f"needs cmake, and {HEADER} in ORT_INCLUDE_DIR: see CONTRIBUTING.md")
    spec = importlib.util.find_spec("onnxruntime")
    assert spec
    assert spec.origin
    libraries = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("the installed onnxruntime has no libonnxruntime.so")
    folder = tmp_path_factory.mktemp("cpp")
    library = folder / "libonnxruntime.so.1"  # the name that a linked program asks for
    library.symlink_to(libraries[-1])
    settings = {
        "CMAKE_CXX_FLAGS": f"-Werror -Wl,-rpath,{folder}",
        "ORT_INCLUDE_DIR": headers,
        "ORT_LIBRARY": library,
    }
    given = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", SOURCE, "-B", folder / "build", *given], check=True)
    subprocess.run(["cmake", "--build", folder / "build"], check=True)
    return folder / "build/minimal"


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int4"])
@pytest.mark.parametrize("native", [False, True], ids=["portable", "native"])
def test_its_greedy_ids_are_those_of_our_runtime(program, expected, target, native) -> None:
    if native and library_path() is None:
        pytest.skip("the native operators were not built: needs a C++ compiler")
    wanted = expected(target)
    library = ["--library", str(wanted.package / "sambay_ops.so")] if native else []
    command = [program, wanted.package / "model.onnx", *library, *map(str, wanted.prompt)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert [int(line) for line in found.stdout.split()] == wanted.tokens


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage"),
        (["missing.onnx", "1"], "missing.onnx"),
        (["missing.onnx", "--room"], "--room needs a value"),
        (["missing.onnx", "1", "two"], "'two' is no number"),
        (["{package}", "800"], "token 800 is not of the vocabulary of 800"),
        (["{package}", "--room", "2", "1", "2", "3"], "the prompt has 3 tokens: give --room"),
    ],
)
def test_it_says_in_one_line_what_is_wrong(program, expected, arguments, says) -> None:
    package = expected("cpu-int4").package / "model.onnx"
    given = [argument.format(package=package) for argument in arguments]
    found = subprocess.run([program, *given], capture_output=True, text=True)
    assert found.returncode == 2
    assert says in found.stderr
    assert found.stderr.count("\n") == 1
