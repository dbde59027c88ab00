"""The operators' tests, run on kernels that were built with sanitizers.

    pytest -m sanitize

An access outside of a tensor, undefined arithmetic or a misaligned load ends the process that runs
the tests, with the place in the kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# A compiler does not run beside a preloaded sanitizer.
MARKS = "not sanitize and not slow and not nvcc and not emulated"
SETTINGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-fno-math-errno", "-fvisibility=hidden")

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer as Linux does"),
]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs g++ or clang++")
    return found


@pytest.fixture(scope="module")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, built for this test alone."""
    path = tmp_path_factory.mktemp("sanitized") / "sambay_ops.so"
    sources = [KERNELS / "dispatch.cc", KERNELS / "ort_operators.cc", *KERNELS.glob("isa_*.cc")]
    objects = [path.with_name(f"{source.stem}.o") for source in sources]
    for source, built in zip(sources, objects, strict=True):
        subprocess.run([compiler, *CHECKS, *SETTINGS, "-c", source, "-o", built], check=True)
    subprocess.run([compiler, *CHECKS, "-shared", *objects, "-o", path], check=True)
    return path


def preloaded(compiler: str) -> str:
    """Libraries that must be in the process before Python allocates anything.

    The sanitizer, and what it looks for when something throws an exception of C++.
    """

    def find(*names: str) -> str:
        for name in names:
            command = [compiler, f"-print-file-name={name}"]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            if Path(found.strip()).is_absolute():
                return found.strip()
        pytest.skip(f"{compiler} has no {' and no '.join(names)}")

    sanitizer = ("libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan-aarch64.so")
    return f"{find(*sanitizer)} {find('libstdc++.so.6')}"


def run_python(compiler: str, library: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "LD_PRELOAD": preloaded(compiler),
        "SAMBAY_TEST_LIBRARY": str(library),
        # Python frees little at its end, and tests ask for sizes that no machine has.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_operators_tests_run_clean(compiler: str, library: Path) -> None:
    # -s: a report must not end in the capture of a process that is no more
    options = ("-m", MARKS, "-q", "-x", "-s", "-p", "no:cacheprovider")
    done = run_python(compiler, library, "-m", "pytest", *options, str(Path(__file__).parent))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_an_overrun_in_the_kernels_would_be_seen(compiler: str, tmp_path: Path) -> None:
    """The same build and settings, on code that reads one value beyond an array of numpy."""
    source = tmp_path / "overrun.cc"
    source.write_text(
        'extern "C" float beyond(const float* p, long n) { return p[n]; }', encoding="utf-8"
    )
    library = tmp_path / "overrun.so"
    subprocess.run([compiler, *CHECKS, "-g", "-fPIC", "-shared", source, "-o", library], check=True)
    program = (
        "import ctypes, numpy as np; array = np.zeros(4096, np.float32);"
        f"ctypes.CDLL({str(library)!r}).beyond(array.ctypes.data_as(ctypes.c_void_p), 4096)"
    )
    done = run_python(compiler, library, "-c", program)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
