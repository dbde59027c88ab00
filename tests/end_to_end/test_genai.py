"""Stock ONNX Runtime GenAI loads a package as it is and continues texts as our runtime does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime_py import Sequence, Session
from runtime_py.native import library_path

og = pytest.importorskip(
    "onnxruntime_genai", reason="install it: .venv/bin/pip install -e '.[genai]'"
)

pytestmark = pytest.mark.genai

WINDOW = 32  # of the shipped model
TOLERANCE = 2e-4  # absolute, float32
# 4-bit weights are multiplied by activations of 8 bits: noise, such as from another order of the
# slots in GenAI's longer rings, may become a step of those.
ROUNDED = {"cpu-fp32": TOLERANCE, "cpu-int4": 0.5}
LENGTH = 300


class Package:
    """One package in both runtimes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rounded = folder, ROUNDED[folder.name]
        self.model, self.ours = og.Model(str(folder)), Session(folder)

    def generator(self, max_length: int = LENGTH, **options: object) -> "og.Generator":
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=max_length, **options)
        return og.Generator(self.model, parameters)

    def logits(self, *pieces: np.ndarray) -> np.ndarray:
        """Of the last token, by our runtime fed these pieces: [batch, 1, vocab]."""
        sequence = self.ours.start(len(np.atleast_2d(pieces[0])))
        return [sequence.step(np.atleast_2d(piece)) for piece in pieces][-1][:, None]

    def check_greedy(self, sequence: Sequence, ids: np.ndarray, tokens: list[int]) -> None:
        """Feed our sequence a text and GenAI's answer: each token must be the likeliest of ours.

        In float32 without exception; else as likely as rounding can tell, and rarely another.
        """
        others, logits = 0, sequence.step(ids)[0]
        for i, token in enumerate(tokens):
            if i:
                logits = sequence.step(tokens[i - 1 : i])[0]
            others += token != logits.argmax()
            assert logits[token] >= logits.max() - self.rounded
        assert others <= (0 if self.rounded == TOLERANCE else 1 + len(tokens) // 10)


@pytest.fixture(scope="module", params=["cpu-fp32", "cpu-int4"])
def package(request: pytest.FixtureRequest, export) -> Package:
    return Package(export(None, request.param))


def text(length: int, seed: int = 0) -> np.ndarray:
    """Ordinary tokens: none of them ends an answer."""
    return np.random.default_rng([length, seed]).integers(0, 256, length)


def run(generator: "og.Generator", most: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < most and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 17, 5 * WINDOW + 3])
def test_greedy_tokens_are_those_of_our_runtime(package: Package, length: int) -> None:
    generator = package.generator()
    generator.append_tokens(text(length))
    package.check_greedy(package.ours.start(), text(length), run(generator, 2 * WINDOW))


def test_an_answer_ends_where_our_runtime_ends_it(package: Package) -> None:
    tokenizer = og.Tokenizer(package.model)
    prompt = "<|user|>What is 12 + 30?<|end|><|assistant|>"
    ids = tokenizer.encode(prompt)
    assert list(ids) == list(package.ours.tokenizer.encode(prompt))
    generator = package.generator()
    generator.append_tokens(ids)
    tokens = run(generator, 200)
    assert generator.is_done()
    assert tokens[-1] in package.ours.config.eos_token_ids
    package.check_greedy(package.ours.start(), ids, tokens)


@pytest.mark.parametrize("cuts", [[1], [70, 71], [10, 20, 30, 149]], ids=str)
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(package: Package, cuts) -> None:
    ids = text(150)
    generator = package.generator()
    for piece in np.split(ids, cuts):
        generator.append_tokens(piece)
    logits = generator.get_logits()
    np.testing.assert_allclose(logits, package.logits(ids), atol=package.rounded)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_three_turns_continue_one_text(package: Package, most: int) -> None:
    """An answer that ends by itself loses its end token, one that is stopped its newest: see
    docs/genai.md for both remedies, which are those taken here."""
    generator, ours = package.generator(max_length=4 * LENGTH), package.ours.start()
    ending: list[int] = []
    for turn in range(3):
        question = np.array([*ending, *text(40, seed=turn)])
        generator.append_tokens(question)
        answer = run(generator, most)
        package.check_greedy(ours, question, answer)
        if generator.is_done():
            ending = answer[-1:]
        else:
            ending = []
            logits = generator.get_logits()  # runs the newest token
            np.testing.assert_allclose(logits[0], ours.step(answer[-1:]), atol=package.rounded)
    assert ours.length > 3 * WINDOW


def test_a_text_rewound_to_its_begin_leaves_no_trace(package: Package) -> None:
    generator = package.generator()
    generator.append_tokens(text(WINDOW - 4))
    run(generator, 3)
    generator.rewind_to(0)
    generator.append_tokens(text(9))
    np.testing.assert_allclose(
        generator.get_logits(), package.logits(text(9)), atol=package.rounded
    )


def test_a_new_generator_is_the_rewind_of_a_long_text(package: Package) -> None:
    generator = package.generator()
    generator.append_tokens(text(5 * WINDOW))
    with pytest.raises(RuntimeError, match="rewind"):
        generator.rewind_to(0)
    fresh = package.generator()
    fresh.append_tokens(text(9))
    np.testing.assert_allclose(fresh.get_logits(), package.logits(text(9)), atol=package.rounded)


def test_a_rewind_into_the_text_is_refused_or_right(package: Package) -> None:
    """Without a snapshot GenAI refuses; with one it restores the recurrent states."""
    ids = text(WINDOW)
    generator = package.generator()
    generator.append_tokens(ids)
    with pytest.raises(RuntimeError, match="without a snapshot"):
        generator.rewind_to(5)
    generator = package.generator()
    generator.append_tokens(ids[:20])
    generator.snapshot_state()
    generator.append_tokens(ids[20:])
    generator.rewind_to(20)
    generator.append_tokens(text(8))
    expected = package.logits(ids[:20], text(8))
    np.testing.assert_allclose(generator.get_logits(), expected, atol=package.rounded)


def test_beam_search_ends_with_an_error_and_not_with_wrong_text(package: Package) -> None:
    def answer() -> None:
        generator = package.generator(num_beams=2)
        generator.append_tokens(text(20))
        run(generator, 4)

    with pytest.raises(RuntimeError, match="past"):
        answer()


def test_rows_of_equal_length_are_each_the_row_alone(package: Package) -> None:
    rows = np.stack([text(60, seed) for seed in range(3)])
    generator = package.generator(batch_size=3)
    generator.append_tokens(rows)
    np.testing.assert_allclose(generator.get_logits(), package.logits(rows), atol=package.rounded)
    generator.generate_next_token()
    for row, token in zip(rows, generator.get_next_tokens().tolist(), strict=True):
        package.check_greedy(package.ours.start(), row, [token])


def test_rows_padded_on_the_right_are_each_the_row_alone(package: Package) -> None:
    pad = 773
    rows = [text(length) for length in (50, 7, 33)]
    ids = np.full((3, 50), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    generator = package.generator(batch_size=3)
    generator.append_tokens(ids)
    expected = np.stack([package.logits(row)[0] for row in rows])
    np.testing.assert_allclose(generator.get_logits(), expected, atol=package.rounded)
    tokens = []
    for _ in range(4):
        generator.generate_next_token()
        tokens.append(generator.get_next_tokens())
    for row, column in zip(rows, np.stack(tokens, axis=1).tolist(), strict=True):
        ends = [i for i, token in enumerate(column) if token in package.ours.config.eos_token_ids]
        answer = column[: ends[0] + 1] if ends else column  # what follows an end is padding
        package.check_greedy(package.ours.start(), row, answer)


def test_states_are_bounded_and_changed_in_place(package: Package) -> None:
    generator = package.generator()
    generator.append_tokens(text(5 * WINDOW))
    run(generator, 3)
    for layer, kind, slots in [(1, "key", WINDOW + 16), (3, "value", WINDOW + 16), (5, "key", 300)]:
        assert generator.get_input(f"past_key_values.{layer}.{kind}").shape[2] == slots
    for name in ("0.conv_state", "2.recurrent_state", "1.key", "5.value"):
        past = generator.get_input(f"past_key_values.{name}")
        # One buffer: what the last call read is gone, its result stands there.
        np.testing.assert_array_equal(past, generator.get_output(f"present.{name}"))
        assert past.any()


@pytest.mark.parametrize("target", ["cuda-int4", "directml-fp16", "openvino-int4"])
def test_packages_of_other_providers_run_on_the_cpu_with_their_prompts_cut(
    export, target: str
) -> None:
    folder = export(None, target)
    config = og.Config(str(folder))
    config.clear_providers()
    model, ours = og.Model(config), Session(folder, providers=["CPUExecutionProvider"])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=2 * LENGTH)
    generator = og.Generator(model, parameters)
    ids = text(300)
    generator.append_tokens(ids)
    logits, sequence = generator.get_logits()[0], ours.start()
    expected = sequence.step(ids)
    np.testing.assert_allclose(logits, expected, atol=0.15)
    assert logits.argmax() == expected.argmax()
    assert not list(folder.glob("sambay_ops*"))
    # Later prompts are not cut: the caller does it.
    generator.append_tokens(text(ours.chunk, 1))
    expected = sequence.step(text(ours.chunk, 1))
    np.testing.assert_allclose(generator.get_logits()[0], expected, atol=0.15)
    with pytest.raises(RuntimeError, match="broadcast"):
        generator.append_tokens(text(ours.chunk + 1, 2))


@pytest.mark.skipif(library_path() is None, reason="the native operators were not built")
def test_the_library_is_named_by_its_file_name_and_loaded(package: Package, tmp_path: Path) -> None:
    config = json.loads((package.folder / "genai_config.json").read_text())
    name = config["model"]["decoder"]["session_options"]["custom_ops_library"]
    assert (package.folder / name).is_file()
    assert "/" not in name
    copy = shutil.copytree(package.folder, tmp_path / "copy")
    (copy / name).write_bytes(b"not a library")  # as that of another system
    with pytest.raises(RuntimeError, match=name):
        og.Model(str(copy))


def test_a_portable_package_loads_without_the_library(export, tmp_path: Path) -> None:
    portable = Package(export(None, "cpu-int4", "--portable"))
    assert not list(portable.folder.glob("sambay_ops*"))
    generator = portable.generator()
    generator.append_tokens(text(50))
    tokens = run(generator, 8)
    portable.check_greedy(portable.ours.start(), text(50), tokens)


def test_a_package_of_another_system_loads_once_the_library_is_unnamed(
    package: Package, tmp_path: Path
) -> None:
    """What docs/genai.md says to do; plain ONNX Runtime and our runtime need nothing."""
    copy = shutil.copytree(package.folder, tmp_path / "copy")
    for library in copy.glob("sambay_ops*"):
        library.write_bytes(b"not a library")
    assert Session(copy).start().step([1]).shape == (1, 800)
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"].pop("custom_ops_library", None)
    path.write_text(json.dumps(config))
    parameters = og.GeneratorParams(og.Model(str(copy)))
    parameters.set_search_options(max_length=LENGTH)
    generator = og.Generator(og.Model(str(copy)), parameters)
    generator.append_tokens(text(20))
    expected = package.logits(text(20))  # by native operators, where they were built
    np.testing.assert_allclose(generator.get_logits(), expected, atol=package.rounded)
