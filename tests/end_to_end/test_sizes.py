"""Sizes other than the goldens': model and package equal the mathematics, however tokens are fed.

The oracle recomputes every text from its first token in float64 (naive_sambay.py) and is itself
held to the published code's numbers here.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from tests.conftest import RUNNERS, runner
from tests.end_to_end.conftest import Written
from tests.end_to_end.naive_sambay import Naive, naive_sambay
from tests.end_to_end.random_weights import write_checkpoint
from tests.end_to_end.sizes import COMMON, SIZES

TOLERANCE = 2e-4  # absolute, float32; logits are of order 2
few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Counts = tuple[int, ...]  # tokens of each row in one call


def close(actual: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0, err_msg=what)


def texts(vocabulary: int, lengths: Sequence[int]) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, vocabulary, n) for n in lengths]


class GraphRun:
    """The model file alone in ONNX Runtime: portable operators, padding and mask as they are."""

    def __init__(self, package: Path, config: dict[str, Any], batch: int) -> None:
        self.session = onnxruntime.InferenceSession(package / "model.onnx")
        self.mask = np.zeros((batch, 0), np.int64)
        sizes = {"batch": batch, "window": 9, "capacity": 128}  # more slots than any window
        self.states = {
            value.name: np.zeros([sizes.get(axis, axis) for axis in value.shape], np.float32)
            for value in self.session.get_inputs()[2:]
        }

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.mask = np.concatenate([self.mask, mask], axis=1)
        unused = np.zeros((len(ids), 5), np.int64)  # a mask may be a buffer with room to grow
        feeds = {"input_ids": ids, "attention_mask": np.concatenate([self.mask, unused], axis=1)}
        logits, *present = self.session.run(None, feeds | self.states)
        self.states = dict(zip(self.states, present, strict=True))
        return logits[:, 0]


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest, written: Callable[[str], Written]) -> Written:
    return written(request.param)


@pytest.fixture(scope="module", params=[*RUNNERS, "graph"])
def start(request: pytest.FixtureRequest, size: Written, package) -> Callable[[int], Any]:
    """start(batch) -> a fresh run."""
    if request.param == "graph":
        made = package(size.folder, "cpu-fp32")
        return lambda batch: GraphRun(made, size.config, batch)
    return runner(request.param, size.folder, package)


@pytest.fixture(scope="module")
def rows(size: Written) -> list[tuple[np.ndarray, Naive]]:
    """Three texts and all there is to know about them."""
    return known(size, [31, 36, 40])


def known(size: Written, lengths: Sequence[int]) -> list[tuple[np.ndarray, Naive]]:
    made = texts(size.config["vocab_size"], lengths)
    return [(ids, naive_sambay(size.config, size.weights, ids)) for ids in made]


def check_calls(run, rows, calls: Sequence[Counts], *, left: bool) -> None:
    """Feed rows in calls, padded on one side; logits and states must be the oracle's after each."""
    done = np.zeros(len(rows), int)
    for counts in calls:
        ids = np.zeros((len(rows), max(counts)), np.int64)
        mask = np.zeros_like(ids)
        for row, ((text, _), count) in enumerate(zip(rows, counts, strict=True)):
            part = slice(max(counts) - count, None) if left else slice(count)
            ids[row, part], mask[row, part] = text[done[row] : done[row] + count], 1
        logits = run.step(ids, mask)
        done += counts
        for row, (_, naive) in enumerate(rows):
            if counts[row]:
                close(logits[row], naive.logits[done[row] - 1], f"logits of row {row}")
            check_states(run.states, row, naive, int(done[row]))


def check_states(states: dict[str, np.ndarray], row: int, naive: Naive, length: int) -> None:
    """States of a row after `length` tokens."""
    assert len(states) == len(naive.carried)
    for name, every in states.items():
        _, layer, kind = name.split(".")
        state, carried = every[row], naive.carried[kind, int(layer)]
        if kind == "recurrent_state":
            close(state, carried[length - 1], name)
            continue
        if kind == "conv_state":
            taps = state.shape[1]
            before = np.concatenate([np.zeros((taps, len(state))), carried])
            close(state, before[length : length + taps].T, name)
        else:
            tokens = np.arange(max(0, length - state.shape[1]), length)
            close(state[:, tokens % state.shape[1]].swapaxes(0, 1), carried[tokens], name)


@pytest.mark.parametrize("name", ["A8", "C4"])
def test_the_oracle_equals_the_golden(name: str) -> None:
    golden = Path(__file__).parents[1] / "golden" / name
    stored = open_checkpoint(golden).tensors
    weights = {key: tensor.to_ir().numpy() for key, tensor in stored.items()}
    data = np.load(golden / "prefill.npz")
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    naive = naive_sambay(config, weights, data["input_ids"][0])
    np.testing.assert_allclose(naive.logits, data["logits_f64"][0], atol=5e-6)
    np.testing.assert_allclose(naive.hidden, data["hidden"][:, -len(naive.logits) :], atol=5e-5)


def test_prefill_and_decode_equal_the_oracle(start, rows) -> None:
    text, _ = rows[-1]
    check_calls(start(1), rows[-1:], [(19,)] + [(1,)] * (len(text) - 19), left=True)


@few
@given(
    first=st.tuples(*[st.integers(1, 13)] * 3),
    later=st.lists(st.tuples(*[st.integers(0, 6)] * 3).filter(any), max_size=3),
    left=st.booleans(),
)
def test_any_split_and_padding_equals_the_oracle(start, rows, first, later, left) -> None:
    check_calls(start(3), rows, [first, *later], left=left)


@st.composite
def any_sizes(draw) -> tuple[str, dict[str, Any]]:
    pairs, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 7), (2, 1), (2, 3), (3, 2)]))
    layers = draw(st.sampled_from([4, 8, 12]))
    window: Any = draw(st.integers(1, 11))
    if draw(st.booleans()):
        window = [window if i % 2 and i < layers // 2 else None for i in range(layers)]
    heads = 2 * pairs * group
    return draw(st.sampled_from(["F32", "F16", "BF16"])), {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2 * pairs,
        "hidden_size": heads * draw(st.integers(2, 7)),
        "intermediate_size": draw(st.integers(1, 40)),
        "sliding_window": window,
        "mamba_d_state": draw(st.integers(1, 17)),
        "mamba_d_conv": draw(st.integers(2, 7)),
        "mamba_expand": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@settings(max_examples=12, deadline=None)
@given(any_sizes())
def test_the_torch_model_equals_the_oracle_at_any_size(tmp_path_factory, drawn) -> None:
    dtype, sizes = drawn
    folder, config = tmp_path_factory.mktemp("checkpoint"), COMMON | sizes
    size = Written(folder, config, write_checkpoint(folder, config, dtype))
    ((text, naive),) = known(size, [17])
    run = runner("torch", folder, None)(1)
    close(run.step_all(text)[0], naive.logits)
    close(np.concatenate(run.hidden), np.stack(naive.hidden))
    check_states(run.states, 0, naive, len(text))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNNERS)
def test_the_real_widths_equal_the_oracle(kind: str, real_widths: Written, real_rows, package):
    """Past window and chunk, in pieces, a long row beside a short one."""
    start = runner(kind, real_widths.folder, package, capacity=600)
    check_calls(start(2), real_rows, [(515, 21), (9, 2), (1, 1), (3, 0), (1, 1)], left=True)


@pytest.fixture(scope="module")
def real_rows(real_widths: Written) -> list[tuple[np.ndarray, Naive]]:
    return known(real_widths, [529, 25])
