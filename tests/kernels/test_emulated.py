"""The kernels for 64-bit Arm, on a machine that only plays one.

    apt-get install g++-aarch64-linux-gnu qemu-user && pytest -m emulated

They are compiled with a small program of their own: no ONNX Runtime and no Python has to run there.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from export.ops.custom_op import Sample
from tests.kernels.samples import CASES, Case
from tests.kernels.single_node import reference_outputs
from tests.kernels.test_matmul_nbits import COARSE, EXACT_TOKENS, FINE, FORMS, random_weight
from tests.kernels.test_matmul_nbits import check as check_product
from tests.kernels.test_operators import SIZES, check

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("run_samples.cc")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SETTINGS = ("-std=c++17", "-O2", "-static", "-fno-math-errno", "-Wall", "-Wextra", "-Werror")
# Instruction set -> processor to play; the first two are what the library takes by itself there.
PROCESSORS = {"neon_dot": "max", "neon": "cortex-a53", "portable": "cortex-a53"}

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    built = tmp_path_factory.mktemp("emulated") / "run_samples"
    sources = [PROGRAM, ROOT / "kernels" / "dispatch.cc", *(ROOT / "kernels").glob("isa_*.cc")]
    subprocess.run([COMPILER, *SETTINGS, *sources, "-o", built], check=True)
    return built


def packed(
    name: str, numbers: list[float], arrays: list[np.ndarray], *, in_place: bool = False
) -> bytes:
    """One sample, as run_samples.cc reads it."""
    head = struct.pack("<40s4dqq", name.encode(), *numbers, in_place, len(arrays))
    pieces = (
        struct.pack(f"<{a.ndim + 2}q", a.ndim, *a.shape, a.nbytes) + a.tobytes() for a in arrays
    )
    return head + b"".join(pieces)


def packed_sample(case: Case, sample: Sample, *, in_place: bool) -> bytes:
    names = ("num_heads", "num_kv_heads", "lambda_init", "window")
    numbers = [sample.attributes.get(name, 0) for name in names]
    arrays = [tensor.numpy() for tensor in sample.tensors]
    return packed(case.op.name, numbers, arrays, in_place=in_place)


def run(program: Path, isa: str, samples: bytes) -> bytes:
    command = [EMULATOR, "-cpu", PROCESSORS[isa], program, isa]
    done = subprocess.run(command, input=samples, capture_output=True, check=True)
    assert done.stderr.decode() == isa
    return done.stdout


@pytest.mark.parametrize("isa", ["neon_dot", "neon"])
def test_the_best_kernels_of_a_processor_are_found(program: Path, isa: str) -> None:
    command = [EMULATOR, "-cpu", PROCESSORS[isa], program]
    assert subprocess.run(command, input=b"", capture_output=True).stderr.decode() == isa


@pytest.mark.parametrize("isa", ["neon", "portable"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_computes_what_the_reference_computes(program: Path, case: Case, isa: str) -> None:
    samples = [case.sample(sizes, seed) for seed, sizes in enumerate(SIZES)]
    both = [(sample, in_place) for sample in samples for in_place in (False, True)]
    found = run(program, isa, b"".join(packed_sample(case, s, in_place=each) for s, each in both))
    for sample, _ in both:
        expected, outputs = reference_outputs(case.op, sample), []
        for wanted in (tensor.numpy() for tensor in expected):
            outputs.append(
                np.frombuffer(found[: wanted.nbytes], wanted.dtype).reshape(wanted.shape)
            )
            found = found[wanted.nbytes :]
        check(outputs, expected)
    assert found == b""


@pytest.mark.parametrize("isa", PROCESSORS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "scale"), FORMS)
def test_a_product_is_right_to_the_rounding_of_its_inputs(
    program: Path, isa: str, bits: int, size: int, scale: str
) -> None:
    products = []
    for k, n in ((32, 1), (96, 7), (544, 40), (1056, 5), (160, 67)):
        weight = random_weight(k, n, bits, seed=k, size=size, scale=scale)
        for tokens in (1, 3, 8, 9, 30):
            x = np.random.default_rng(tokens).standard_normal((tokens, k), np.float32)
            products += [(x, weight, exact) for exact in (False, True)]
    samples = [
        packed("MatMulNBits", [bits, size, exact, 0], [x, weight.packed, weight.scale])
        for x, weight, exact in products
    ]
    found = np.frombuffer(run(program, isa, b"".join(samples)), np.float32)
    for x, weight, exact in products:
        shape = len(x), len(weight.packed)
        y, found = found[: shape[0] * shape[1]].reshape(shape), found[shape[0] * shape[1] :]
        check_product(y, x, weight, FINE if exact or len(x) <= EXACT_TOKENS else COARSE)
    assert found.size == 0
