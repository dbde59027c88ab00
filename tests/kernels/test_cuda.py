"""The kernels for CUDA devices: on a GPU, and on a processor that plays one.

    pytest -m gpu tests/kernels/test_cuda.py     needs a GPU and onnxruntime-gpu
    pytest -m nvcc tests/kernels/test_cuda.py    needs CUDA's compiler

Without a GPU the same sources are compiled with tests/kernels/cuda_on_host, which runs every thread
of every block on the processor, and the same tests run on that library.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.ops import OPS
from export.ops.custom_op import Sample
from runtime_py.native import CUDA, library_path
from tests.kernels.samples import CASES, Case, Sizes, as_activations
from tests.kernels.single_node import (
    as_model,
    kinds_of,
    reference_outputs,
    run,
    run_in_place,
)

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
HOST = Path(__file__).with_name("cuda_on_host")
SETTINGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DSAMBAY_CUDA_PROVIDER=nullptr")

# Relative to the largest of a tensor's values: sums of float32 in another order; one rounding more.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 1e-3, np.dtype(np.int8): 0}

SIZES = (
    Sizes(batch=1, tokens=1, width=64, depth=100, slots=300),
    Sizes(batch=3, tokens=2, width=17, states=5, pairs=1, group=3, taps=1, depth=0),
    Sizes(batch=2, tokens=33, width=16, states=20, group=1, slots=37, depth=90),
    Sizes(batch=1, tokens=1, width=24, pairs=1, slots=1500, depth=1400),
    Sizes(batch=1, tokens=50, width=8, pairs=1, group=5, taps=20, slots=400, depth=2000),
)
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_activation = pytest.mark.parametrize("activation", [torch.float32, torch.float16], ids=str)
Open = Callable[[Case, Sample], ort.InferenceSession]


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux: threads of a block are contexts of its C library")
    folder = tmp_path_factory.mktemp("cuda_on_host")

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.stem}.o"
        command = [compiler, "-x", "c++", *SETTINGS, "-I", HOST, "-c", source, "-o", built]
        subprocess.run(command, check=True)
        return built

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / "sambay_ops_cuda.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return library


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def open_case(request: pytest.FixtureRequest) -> Open:
    """Opens a session on an operator's kernel, for a sample's dtypes."""
    providers, library = ["CPUExecutionProvider"], None
    if request.param == "gpu":
        if CUDA not in ort.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA provider")
        library = library_path(CUDA)
        if library is None:
            pytest.skip("not built: python setup.py build_cuda")
        # A node that the device does not take must fail, not run elsewhere.
        providers = [CUDA]
    else:
        library = request.getfixturevalue("host_library")

    def open_one(case: Case, sample: Sample) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if request.param == "gpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.enable_cpu_mem_arena = False
        options.register_custom_ops_library(str(library))
        outputs = reference_outputs(case.op, sample)
        model = as_model(case.op, kinds_of(sample.tensors), kinds_of(outputs), sample.attributes)
        return ort.InferenceSession(model, options, providers=providers)

    return open_one


def expected_of(case: Case, sample: Sample) -> list[torch.Tensor]:
    """What the reference computes from these values in float32, rounded once at the end."""
    told = reference_outputs(case.op, sample)
    if case.cell:
        return told  # the reference itself is wide inside
    tensors = tuple(t.float() if t.is_floating_point() else t for t in sample.tensors)
    exact = reference_outputs(case.op, Sample(tensors, sample.attributes))
    return [each.to(like.dtype) for each, like in zip(exact, told, strict=True)]


def check(actual: list[np.ndarray], expected: list[torch.Tensor]) -> None:
    for got, wanted in zip(actual, (tensor.numpy() for tensor in expected), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        relative = TOLERANCE[got.dtype]
        finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float32))
        bound = relative * max(1.0, finite.max(initial=0.0))
        np.testing.assert_allclose(got, wanted, atol=bound, rtol=relative)


@by_activation
@by_case
def test_a_kernel_computes_what_the_reference_computes(
    open_case: Open, case: Case, activation: torch.dtype
) -> None:
    for seed, sizes in enumerate(SIZES):
        sample = as_activations(case, case.sample(sizes, seed), activation)
        session, expected = open_case(case, sample), expected_of(case, sample)
        check(run(session, sample), expected)
        check(run_in_place(session, sample, case.shared), expected)


@by_case
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [6e4, -6e4]], ids=str)
def test_nan_infinity_and_huge_values_go_the_reference_s_way(
    open_case: Open, case: Case, values: list[float]
) -> None:
    sizes = Sizes(batch=1, tokens=1, width=20, slots=12, depth=20, all_seen=True)
    sample = case.sample(sizes)
    session = open_case(case, sample)
    for index, tensor in enumerate(sample.tensors):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        if case.cell == torch.int8 and tensor.dtype == torch.float16 and np.inf in values:
            continue  # no scale is infinite
        spoiled = tensor.clone()
        for place, value in enumerate(values):
            spoiled.view(-1)[(7 * index + 5 * place) % tensor.numel()] = value
        tensors = [spoiled if i == index else t for i, t in enumerate(sample.tensors)]
        bad = Sample(tuple(tensors), sample.attributes)
        with np.errstate(all="ignore"):
            check(run(session, bad), reference_outputs(case.op, bad))


@by_case
@pytest.mark.parametrize("value", [-(2**63), -1, 2**31, 2**62, 2**63 - 1])
def test_lengths_out_of_range_touch_nothing_outside(
    open_case: Open, case: Case, value: int
) -> None:
    """They stand on the device, where nobody checks them; the run ends, and so do later ones."""
    sample = case.sample(Sizes(batch=2, tokens=3, width=9, states=5, slots=8, depth=4))
    session = open_case(case, sample)
    expected = run(session, sample)
    for index, tensor in enumerate(sample.tensors):
        if tensor.dtype != torch.int64:
            continue
        tensors = list(sample.tensors)
        tensors[index] = torch.full_like(tensor, value)
        run(session, Sample(tuple(tensors), sample.attributes))
    for got, wanted in zip(run(session, sample), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@by_case
def test_wrong_shapes_end_in_an_error_that_names_the_input(open_case: Open, case: Case) -> None:
    sample = case.sample(Sizes(batch=2, tokens=3, width=9, states=5, slots=8, depth=4))
    session = open_case(case, sample)
    for index, tensor in enumerate(sample.tensors):
        tensors = list(sample.tensors)
        tensors[index] = torch.cat([tensor, tensor], dim=-1)
        with pytest.raises(Exception, match=f"{case.op.name}: input .* expected"):
            run(session, Sample(tuple(tensors), sample.attributes))


@pytest.mark.nvcc
def test_nvcc_compiles_every_kernel_without_a_warning(tmp_path: Path) -> None:
    """For every architecture; the library then loads anywhere, and takes nodes on a GPU alone."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    command = [sys.executable, "setup.py", "-q", "build_cuda", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    library = next(tmp_path.glob("_sambay_ops_cuda.*"))
    contents = library.read_bytes()
    assert not [op.name for op in OPS if op.name.encode() + b"\0" not in contents]
    case = CASES[0]
    sample = case.sample(SIZES[0])
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    outputs = reference_outputs(case.op, sample)
    model = as_model(case.op, kinds_of(sample.tensors), kinds_of(outputs), sample.attributes)
    with pytest.raises(Exception, match=f"an implementation for {case.op.name}"):
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
