"""Every target's package computes what the float32 graph of the same weights computes.

They run here on the CPU provider, float16 graphs too; ``targets.lint`` says whether the target's
own provider has kernels for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE, main
from export.tokenizer import write_tokenizer
from export.trace import trace
from export.verify.command import main as verify
from graph_passes.cleanup import cleanup
from graph_passes.pipeline import run_passes
from runtime_py import InputError, Session
from targets import TARGETS, find_target
from targets.package import write_package
from targets.target import CPU, Target
from targets.weights import INT4, UNQUANTIZED
from tests.runtime_py.devices import Capturing, make_value

# Packages of several graphs have a file of tests of their own, test_qnn.py.
OTHERS = [target for target in TARGETS if target.provider != CPU and not target.graphs]
EXACT = Target(name="exact", summary="", provider=CPU, passes=(cleanup, *UNQUANTIZED))
EXACT4 = Target(name="exact-int4", summary="", provider=CPU, passes=(cleanup, *INT4))
# Largest difference of a logit, whose spread is about 3: rounding of float16, then of float32.
TOLERANCE = {"float16": 0.15, "float32": 5e-4}
PROMPTS = (
    "<|user|>What is 12 + 30?<|end|><|assistant|>",
    "<|user|>What is 7 * 8?<|end|><|assistant|>",
    "<|user|>Hello<|end|><|assistant|>",
)
by_target = pytest.mark.parametrize("target", OTHERS, ids=lambda target: target.name)


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return trace(open_checkpoint(REFERENCE))


Open = Callable[[Target], Session]


@pytest.fixture(scope="module")
def open_on_cpu(traced: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Open:
    made: dict[str, Session] = {}

    def run(target: Target) -> Session:
        if target.name not in made:
            package = write_package(
                run_passes(traced, target.passes),
                tmp_path_factory.mktemp("packages") / target.name,
                target=target,
                facts={},
                extra_files=lambda folder: write_tokenizer(REFERENCE, folder) and None,
            )
            made[target.name] = Session(package, providers=[CPU], threads=1)
        return made[target.name]

    return run


def exact(target: Target) -> Target:
    """The float32 recipe of the same weights."""
    return EXACT4 if "int4" in target.name else EXACT


def answers(session: Session, prompt: str, most: int = 60) -> Iterator[tuple[list[int], list]]:
    """Pieces of a text, as its prompt and single tokens of the answer: (pieces, logits)."""
    sequence = session.start()
    piece = session.tokenizer.encode(prompt)
    for _ in range(most):
        logits = sequence.step(piece)[0]
        yield piece, logits
        piece = [int(logits.argmax())]
        if piece[0] in session.config.eos_token_ids:
            return


@by_target
def test_logits_are_those_of_float32(open_on_cpu: Open, target: Target) -> None:
    """Token by token over answers of the float32 graph; near ties are counted."""
    session, reference = open_on_cpu(target), open_on_cpu(exact(target))
    steps = ties = 0
    for prompt in PROMPTS:
        sequence = session.start()
        for piece, expected in answers(reference, prompt):
            logits = sequence.step(piece)[0]
            np.testing.assert_allclose(logits, expected, atol=TOLERANCE[target.cache], rtol=0)
            steps, ties = steps + 1, ties + int(logits.argmax() != expected.argmax())
    assert steps > 40
    assert ties <= (1 if target.cache == "float16" else 0)


@by_target
def test_a_package_is_held_against_its_checkpoint(
    open_on_cpu: Open, target: Target, tmp_path: Path
) -> None:
    package, report = open_on_cpu(target).path.parent, tmp_path / "report.json"
    arguments = ["--checkpoint", str(REFERENCE), "--tokens", "40", "--json", str(report)]
    assert verify([str(package), *arguments]) == 0
    tokens = json.loads(report.read_text(encoding="utf-8"))["next_tokens"]
    assert [each["tokens"] for each in tokens] == [128, 40]  # at random, and of the text


@by_target
def test_long_prompts_pass_the_windows_in_calls_of_the_size_it_takes(
    open_on_cpu: Open, target: Target
) -> None:
    session, reference = open_on_cpu(target), open_on_cpu(exact(target))
    ids = np.random.default_rng(5).integers(0, 256, 3 * session.chunk + 7)
    tolerance = 3 * TOLERANCE[target.cache]  # ids that mean nothing: larger numbers
    expected = reference.start().step(ids)
    np.testing.assert_allclose(session.start().step(ids), expected, atol=tolerance, rtol=0)
    pieces = session.start()
    for piece in np.split(ids, [1, 2, 50, 51]):
        logits = pieces.step(piece)
    np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)


@by_target
def test_a_call_longer_than_the_body_takes_fails_loudly(open_on_cpu: Open, target: Target) -> None:
    session = open_on_cpu(target)
    assert session.chunk == int(
        session.model.get_modelmeta().custom_metadata_map["sambay.max_tokens"]
    )
    feeds = {
        state.past: state.zeros({"batch": 1, "window": 32, "capacity": 256})
        for state in session.states
    }
    ids = np.ones((1, session.chunk + 1), np.int64)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="broadcast"):
        session.model.run(["logits"], feeds | {"input_ids": ids, "attention_mask": ids})


@by_target
def test_a_package_says_what_it_was_made_for(open_on_cpu: Open, target: Target) -> None:
    if target.provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {target.provider}")
    package = open_on_cpu(target).path.parent
    with pytest.raises(InputError, match=f"made for {target.provider} .target {target.name}"):
        Session(package)


def test_a_package_for_one_row_refuses_more(open_on_cpu: Open) -> None:
    with pytest.raises(InputError, match="batch is 2; this package was made for 1"):
        open_on_cpu(find_target("directml-int4")).start(2)


@by_target
def test_states_may_be_changed_in_place(open_on_cpu: Open, target: Target) -> None:
    """Past and present as one buffer or as two: the same."""
    session = open_on_cpu(target)
    rng = np.random.default_rng(1)
    sequence = session.start()
    states = {
        state.past: array.copy()
        for state, array in zip(session.states, sequence._buffers.arrays, strict=True)
    }
    total = 0
    for count in (1, 40, 1, 1, 33):
        ids = rng.integers(0, 256, (1, count))
        total += count
        logits = sequence.step(ids)
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64)}
        names = ["logits", *(state.present for state in session.states)]
        apart, *present = session.model.run(names, feeds | states)
        states = dict(zip(states, present, strict=True))
        np.testing.assert_allclose(logits, apart[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cuda-fp16", "cuda-int4"])
def test_what_a_device_captures_while_it_warms_up_leaves_no_trace(
    open_on_cpu: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A token's call is run again and again, with all states put back but the growing cache."""
    plain = open_on_cpu(find_target(name))
    capturing = Session(plain.path, providers=[CPU], threads=1)
    capturing.model, capturing.cuda_graph = Capturing(capturing.model), True
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", make_value)
    got, wanted, rng = capturing.start(), plain.start(), np.random.default_rng(2)
    for count in (30, 1, 1, 1, 1, 230, 1, 1):  # the ring wraps, the cache grows
        ids = rng.integers(0, 256, count)
        np.testing.assert_array_equal(got.step(ids), wanted.step(ids))
    assert len(capturing.model.graphs) == 2


def test_the_command_line_exports_to_every_target_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", "directml-int4", "-o", str(tmp_path / "package")]) == 0
    assert not list((tmp_path / "package").glob("sambay_ops*"))
    assert "directml-int4" in capsys.readouterr().err
