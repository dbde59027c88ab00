"""Packages of several graphs: on the CPU provider, and on QNN's emulator of the processor.

The graphs for the NPU compute in float16, or in integers between islands of it. What that may cost
is bounded by what storing weights in 8 bits may: see ``LOSS``.
"""

from __future__ import annotations

import _thread
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE, main
from export.tokenizer import write_tokenizer
from export.trace import trace
from graph_passes.cleanup import cleanup
from graph_passes.gather_single_row import gather_single_row
from graph_passes.keep_part import keep_part
from graph_passes.pipeline import run_passes
from graph_passes.set_accuracy_level import set_accuracy_level
from runtime_py import InputError, PackageError, Session
from runtime_py.chat import main as chat
from runtime_py.compile import main as compile_command
from targets import TARGETS
from targets.graphs import make_graphs
from targets.lint import main as lint
from targets.package import package_size, write_package
from targets.target import CPU, Target

PYTHON = os.environ.get("QNN_PYTHON")
NPU = [target for target in TARGETS if target.graphs]
PROMPTS = (
    "<|user|>What is 12 + 30?<|end|><|assistant|>",
    "<|user|>What is 7 * 8?<|end|><|assistant|>",
    "<|user|>Hello<|end|><|assistant|>",
)
# The class of 8-bit weights: mean KL divergence, and next tokens that stay.
LOSS, KEPT = 0.002, 0.99

ON_HTP = Path(__file__).with_name("on_htp.py")

by_target = pytest.mark.parametrize("target", NPU, ids=lambda target: target.name)
Make = Callable[[Target], Path]


def on_emulator(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(PYTHON is None, reason="set QNN_PYTHON as CONTRIBUTING.md says")
    return pytest.mark.qnn(skipped(test))


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return trace(open_checkpoint(REFERENCE))


@pytest.fixture(scope="module")
def package(traced: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def make(target: Target) -> Path:
        if target.name not in made:
            made[target.name] = write_package(
                run_passes(traced, target.passes),
                tmp_path_factory.mktemp("packages") / target.name,
                target=target,
                facts={},
                extra_files=lambda folder: write_tokenizer(REFERENCE, folder) and None,
            )
        return made[target.name]

    return make


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Packages with integer activations, as the command line makes them."""
    made: dict[str, Path] = {}

    def make(target: Target) -> Path:
        if target.name not in made:
            folder = tmp_path_factory.mktemp("integers") / target.name
            told = ["--target", target.name, "--activations", "uint16", "-o", str(folder)]
            assert main(told) == 0
            made[target.name] = folder
        return made[target.name]

    return make


def wide(target: Target) -> Target:
    """The same weights, computed in float32 in one graph."""
    ours = ("cleanup", "store_caches_in_float16", "replace_scatter")
    weights = [each for each in target.passes if getattr(each, "__name__", "") not in ours[:2]]
    weights = [each for each in weights if getattr(each, "func", each).__name__ != ours[2]]
    return Target(name=f"{target.name}-wide", summary="", provider=CPU, passes=(cleanup, *weights))


def on_cpu(folder: Path) -> Session:
    return Session(folder, providers=[CPU], threads=1)


def run_there(*arguments: object) -> None:
    """Run Python where onnxruntime-qnn is."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([str(PYTHON), *map(str, arguments)], check=True, env=environment)


def check_loss(pairs: np.ndarray, least: int = 30) -> None:
    """Logits [calls, 2, vocab], expected and found."""
    shifted = pairs.astype(np.float64) - pairs.max(axis=2, keepdims=True)
    wanted, got = np.moveaxis(shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True)), 1, 0)
    assert len(pairs) >= least
    assert (np.exp(wanted) * (wanted - got)).sum(axis=1).mean() <= LOSS
    assert (wanted.argmax(1) == got.argmax(1)).mean() >= KEPT


def answers(wanted: Session, got: Session) -> np.ndarray:
    """Logits [calls, 2, vocab] of greedy answers."""
    pairs = []
    for prompt in PROMPTS:
        runs, ids = (wanted.start(), got.start()), wanted.tokenizer.encode(prompt)
        while ids[0] not in wanted.config.eos_token_ids and len(pairs) < 100:
            pairs.append([run.step(ids)[0] for run in runs])
            ids = [int(pairs[-1][0].argmax())]
    return np.array(pairs)


@by_target
def test_next_tokens_are_those_of_float32(package: Make, target: Target) -> None:
    check_loss(answers(on_cpu(package(wide(target))), on_cpu(package(target))))


def test_integer_activations_lose_as_little_also_far_into_a_text(
    package: Make, integers: Make
) -> None:
    wanted, got = on_cpu(package(wide(NPU[0]))), on_cpu(integers(NPU[0]))
    check_loss(answers(wanted, got))
    text = (REFERENCE / "calibration.txt").read_text(encoding="utf-8")
    runs, ids = (wanted.start(), got.start()), wanted.tokenizer.encode(text)
    pairs = [[run.step([token])[0] for run in runs] for token in ids]
    check_loss(np.array(pairs), least=1300)


def test_integer_activations_leave_states_and_files_as_they_are(
    package: Make, integers: Make
) -> None:
    folders = package(NPU[0]), integers(NPU[0])
    for graph in NPU[0].graphs:
        plain, integer = (ir.load(folder / f"{graph.name}.onnx").graph for folder in folders)
        for values in ("inputs", "outputs"):
            edges = [
                [(v.name, v.dtype, str(v.shape)) for v in getattr(each, values) if "." in v.name]
                for each in (plain, integer)
            ]
            assert edges[0] == edges[1]
        pairs = sum(node.op_type == "QuantizeLinear" for node in integer)
        assert pairs > 40 if graph.name in ("prefill", "decode") else pairs == 0
    manifest = json.loads((folders[1] / "manifest.json").read_text(encoding="utf-8"))
    for graph in manifest["graphs"]:
        assert "ActivationRanges(values=54, clip='mse', tokens=4096" in " ".join(graph["passes"])
    assert lint([str(folders[1])]) == 0


@by_target
def test_any_split_gives_what_the_whole_gives(package: Make, target: Target) -> None:
    """In calls of 1, of 64 and padded ones, past several windows; a fork goes its own way."""
    session = on_cpu(package(target))
    assert session.chunk == 64
    ids = np.random.default_rng(5).integers(0, 256, 200)
    whole = session.start()
    whole.step(ids)
    pieces = session.start()
    for piece in np.split(ids, [1, 2, 50, 51, 115]):
        forked = pieces.fork()
        pieces.step(piece)
        forked.step(piece[::-1])
    assert pieces.length == whole.length == 200
    # float16 rounds to 11 bits, and sums differ by the length of a call
    scale = np.abs(whole.logits).max()
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=0.05 * scale, rtol=0)
    assert np.abs(forked.logits - whole.logits).max() > 0.05 * scale


def test_the_graphs_of_a_package_share_its_weights(package: Make, traced: ir.Model) -> None:
    target = NPU[0]
    folder = package(target)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert [(g["file"], g["provider"], g["tokens"]) for g in manifest["graphs"]] == [
        (f"{graph.name}.onnx", graph.provider, graph.tokens) for graph in target.graphs
    ]
    places = {}
    for graph in manifest["graphs"]:
        for name, value in ir.load(folder / graph["file"]).graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                places.setdefault(name, set()).add(value.const_value.offset)
    assert {len(offsets) for offsets in places.values()} == {1}
    size = (folder / "model.onnx.data").stat().st_size
    assert size < 1.1 * package_size(run_passes(traced, target.passes))


def test_every_graph_has_kernels_where_it_runs(
    package: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lint([str(package(NPU[0]))]) == 0
    assert lint([str(package(NPU[0])), "--provider", "qnn"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5 + 2
    assert lint([str(package(NPU[0])), "--provider", "directml"]) == 1


def test_a_saved_sequence_goes_on_and_is_refused_by_another_package(
    package: Make, tmp_path: Path
) -> None:
    session, ids = on_cpu(package(NPU[0])), list(range(70))
    sequence = session.start()
    sequence.step(ids)
    sequence.save(tmp_path / "saved")
    resumed = session.load(tmp_path / "saved")
    np.testing.assert_array_equal(resumed.step([3]), sequence.step([3]))
    with pytest.raises(ValueError, match="another model"):
        on_cpu(package(NPU[1])).load(tmp_path / "saved")


def test_the_chat_runs_it_on_the_provider_that_is_named(
    package: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(package(NPU[0])), "--prompt", "What is 12 + 30?", "--temperature", "0"]
    assert chat([*arguments, "--provider", CPU]) == 0
    assert "42" in capsys.readouterr().out
    assert chat(arguments) == 2
    assert "made for QNNExecutionProvider" in capsys.readouterr().err


def test_an_interruption_comes_when_all_graphs_of_a_call_are_through(package: Make) -> None:
    session = on_cpu(package(NPU[0]))
    ids = list(range(100))
    expected = session.start().step([*ids[:64], 7])
    sequence = session.start()
    last = session.model._stages[-1][1]

    class Pressed:
        """The last graph, with Ctrl-C pressed before its first run."""

        def __getattr__(self, name: str):
            if name == "run_with_iobinding":
                _thread.interrupt_main()
            return getattr(last, name)

    stages = session.model._stages
    session.model._stages = [*stages[:-1], (stages[-1][0], Pressed())]
    with pytest.raises(KeyboardInterrupt):
        sequence.step(ids)
    session.model._stages = stages
    assert sequence.length == 64
    np.testing.assert_array_equal(sequence.step([7]), expected)


def test_what_does_not_fit_is_named(package: Make, traced: ir.Model, tmp_path: Path) -> None:
    target = NPU[0]
    with pytest.raises(InputError, match="batch is 2; this package was made for 1"):
        on_cpu(package(target)).start(2)
    session = on_cpu(package(target))
    binding = session.model.io_binding()
    binding.bind_cpu_input("input_ids", np.ones((1, 65), np.int64))
    with pytest.raises(ValueError, match="65 tokens, this package takes 64"):
        session.model.run_with_iobinding(binding)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text('{"graphs": [{"file": "x.onnx"}]}', encoding="utf-8")
    with pytest.raises(PackageError, match="'graphs' is not as expected"):
        Session(broken)
    alone = Target(
        name="alone", summary="", provider=CPU, passes=target.passes, graphs=target.graphs[3:]
    )
    with pytest.raises(ValueError, match=r"'decode' reads .*which no graph before it gives"):
        make_graphs(run_passes(traced, target.passes), alone)


def test_the_command_line_tells_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", NPU[0].name, "-o", str(tmp_path / "package")]) == 0
    names = {path.name for path in (tmp_path / "package").iterdir()}
    assert names >= {f"{graph.name}.onnx" for graph in NPU[0].graphs} | {"model.onnx.data"}
    assert not {"model.onnx", "sambay_ops.so"} & names
    for option in ("--verify", "--all-logits"):
        again = ["--target", NPU[0].name, option, "-o", str(tmp_path / "other")]
        assert main(again) == 2
        assert f"{option} needs a package of one graph" in capsys.readouterr().err


def test_there_is_nothing_to_compile_without_the_provider(
    package: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_command([str(package(NPU[0]))]) == 2
    assert "pip install onnxruntime-qnn" in capsys.readouterr().err
    assert compile_command([str(package(wide(NPU[0])))]) == 2
    assert "nothing to compile" in capsys.readouterr().err


@on_emulator
def test_graphs_compiled_ahead_load_and_give_the_same(package: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(package(NPU[0]), tmp_path / "compiled")
    run_there("-m", "runtime_py.compile", folder)
    assert {path.name for path in folder.glob("*.compiled.onnx")} == {
        "prefill.compiled.onnx",
        "decode.compiled.onnx",
    }
    for graph in ("prefill", "decode"):  # so that nothing else can be what runs
        (folder / f"{graph}.onnx").write_bytes(b"x" * (folder / f"{graph}.onnx").stat().st_size)
    run_there(ON_HTP, folder, package(wide(NPU[0])), tmp_path / "logits.npy", PROMPTS[1])
    check_loss(np.load(tmp_path / "logits.npy"), least=15)


@on_emulator
@by_target
def test_answers_on_the_emulator_are_those_of_float32(
    package: Make, target: Target, tmp_path: Path
) -> None:
    """Layers 0..M on the NPU alone, no node of them on the CPU, free-running."""
    run_there(ON_HTP, package(target), package(wide(target)), tmp_path / "logits.npy", *PROMPTS[:2])
    check_loss(np.load(tmp_path / "logits.npy"))


@on_emulator
@by_target
def test_integer_activations_on_the_emulator_give_the_answers_of_float32(
    package: Make, integers: Make, target: Target, tmp_path: Path
) -> None:
    """uint16 between islands of float16, weights in blocks: one graph, no node on the CPU."""
    folders = integers(target), package(wide(target))
    run_there(ON_HTP, *folders, tmp_path / "logits.npy", *PROMPTS[:2])
    check_loss(np.load(tmp_path / "logits.npy"))


def test_what_the_passes_cannot_do_is_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[{rows},5,3] x, int64[{rows},4,1] index) => (float[{rows},4,3] y)
    {{ y = GatherND <batch_dims = 1> (x, index) }}"""
    one = gather_single_row(ir.from_onnx_text(text.format(rows=1)))
    assert [node.op_type for node in one.graph] == ["Reshape", "Gather"]
    with pytest.raises(ValueError, match="one row"):
        gather_single_row(ir.from_onnx_text(text.format(rows=2)))
    with pytest.raises(ValueError, match="'heads'"):
        keep_part(one, part="heads")
    with pytest.raises(ValueError, match="level is 9"):
        set_accuracy_level(one, level=9)
