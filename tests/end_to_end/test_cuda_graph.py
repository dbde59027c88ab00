"""Tokens replayed from a captured CUDA graph are those of calls that were not: needs a GPU.

    pytest -m gpu tests/end_to_end/test_cuda_graph.py

The second half needs onnxruntime-genai-cuda as well.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from runtime_py import Session
from runtime_py.native import CUDA, library_path

pytestmark = pytest.mark.gpu

TOLERANCE = 0.02  # of logits that spread by 3; a session chooses its products' kernels by timing
TARGETS = ("cuda-int4", "cuda-fp16")


@pytest.fixture(params=TARGETS)
def package(request: pytest.FixtureRequest, export: Callable[..., Path]) -> Path:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    return export(None, request.param)


@pytest.fixture(params=["native", "bodies"])
def sessions(
    package: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Session, Session]:
    """One that captures and one that does not."""
    if request.param == "native" and library_path(CUDA) is None:
        pytest.skip("not built: python setup.py build_cuda")
    monkeypatch.setenv("SAMBAY_NATIVE", str(int(request.param == "native")))
    return Session(package, cuda_graph=True), Session(package)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_states_are_those_of_calls(sessions: tuple[Session, Session], batch: int):
    """Over rings that wrap, caches that grow, and prompts in between."""
    got, wanted = (session.start(batch) for session in sessions)
    rng = np.random.default_rng(batch)
    for count in (7, *[1] * 40, 250, *[1] * 40, 3, 1, 1):
        ids = rng.integers(0, 256, (batch, count))
        logits, expected = got.step(ids), wanted.step(ids)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
        best = np.take_along_axis(expected, logits.argmax(axis=1)[:, None], axis=1)
        assert (best[:, 0] >= expected.max(axis=1) - TOLERANCE).all()
    for array, other in zip(got._buffers.arrays, wanted._buffers.arrays, strict=True):
        np.testing.assert_allclose(array, other, atol=TOLERANCE)
    forked, other = got.fork(), wanted.fork()
    for sequence, plain in ((forked, other), (got, wanted)):
        ids = rng.integers(0, 256, (batch, 1))
        np.testing.assert_allclose(sequence.step(ids), plain.step(ids), atol=TOLERANCE)


def test_genai_generates_the_same_tokens(package: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    if not og.is_cuda_available():
        pytest.skip("this ONNX Runtime GenAI has no CUDA: install onnxruntime-genai-cuda")
    tokens = {}
    for capture in ("0", "1"):
        folder = shutil.copytree(package, tmp_path / capture)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        options = config["model"]["decoder"]["session_options"]["provider_options"]
        options[0]["cuda"]["enable_cuda_graph"] = capture
        path.write_text(json.dumps(config), encoding="utf-8")
        model = og.Model(str(folder))
        tokens[capture] = [_generate(og, model, length) for length in (1, 20, 300)]
    assert tokens["0"] == tokens["1"]


def _generate(og, model, length: int) -> list[int]:
    """Two turns: a prompt and its answer, twice."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=1000)
    generator, tokens = og.Generator(model, parameters), []
    for count in (length, min(length, 100)):  # GenAI cuts the first prompt only
        generator.append_tokens(np.random.default_rng(length).integers(0, 256, count))
        for _ in range(50):
            if generator.is_done():
                break
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        generator.get_logits()  # runs the newest token
    return tokens
