"""Torch model and float32 package equal the published code, and the mathematics where it errs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOLERANCE = 2e-4  # absolute, float32; noise is at most 5e-5, the smallest deliberate mistake 3e-2
few = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count)


def test_prefill_equals_the_golden(start_all, golden: Path) -> None:
    data = np.load(golden / "prefill.npz")
    run = start_all()
    close(run.step_all(data["input_ids"]), data["logits"])
    shared = run.config.shared_layer if hasattr(run.config, "shared_layer") else None
    shared = shared or max(int(name.split(".")[1]) for name in run.states)
    tokens = data["input_ids"].shape[1]
    close(run.states[f"past_key_values.{shared}.key"][:, :, :tokens], data["shared_k"])
    close(run.states[f"past_key_values.{shared}.value"][:, :, :tokens], data["shared_v"])


def test_every_layers_output_equals_the_golden(export, golden: Path) -> None:
    data = np.load(golden / "prefill.npz")
    package = export(golden, "cpu-fp32", "--all-logits")
    session = onnxruntime.InferenceSession(package / "model.onnx")
    model = ir.load(package / "model.onnx")
    sizes = {"batch": 1, "window": 8, "capacity": 128}
    feeds = {
        value.name: np.zeros([sizes.get(str(a), a) for a in value.shape], np.float32)
        for value in model.graph.inputs[2:]
    }
    ids = data["input_ids"].astype(np.int64)
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    names = [f"hidden_states.{i}" for i in range(len(data["hidden"]))]
    close(np.concatenate(session.run(names, feeds)), data["hidden"])


def test_decode_and_states_equal_the_golden(start, golden: Path) -> None:
    data = np.load(golden / "decode.npz")
    ids, prompt = data["input_ids"][0], int(data["prompt_len"])
    run = start()
    close(run.step(ids[:prompt]), data["prefill_logits"][:, -1])
    check_states(run.states, data, "after_prefill", prompt)
    for t, token in enumerate(ids[prompt:]):
        close(run.step([token]), data["decode_logits"][:, t])
    check_states(run.states, data, "after_decode", len(ids))


def check_states(states: dict[str, np.ndarray], data, moment: str, length: int) -> None:
    for name, state in states.items():
        _, layer, kind = name.split(".")
        if kind == "conv_state":
            close(state, data[f"{moment}.conv.{layer}"][..., 1:])
        elif kind == "recurrent_state":
            close(state, data[f"{moment}.ssm.{layer}"])
        elif f"{moment}.full_{kind[0]}.{layer}" in data:
            close(state[:, :, :length], data[f"{moment}.full_{kind[0]}.{layer}"])
        else:
            window = state.shape[2]
            oldest_first = np.arange(length - window, length) % window
            close(state[:, :, oldest_first], data[f"{moment}.window_{kind[0]}.{layer}"])


@pytest.mark.parametrize("prompt", [1, 3, 8, 9, 20])
def test_decode_past_the_window_does_not_slip(start, golden: Path, prompt: int) -> None:
    data = np.load(golden / "short.npz")
    ids = data["input_ids"][0]
    run = start()
    close(run.step(ids[:prompt]), data["expected"][:, prompt - 1])
    for t in range(prompt, len(ids)):
        close(run.step(ids[t : t + 1]), data["expected"][:, t])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_left_padded_rows_equal_the_golden(start, golden: Path, case: str) -> None:
    data = {k[2:]: v for k, v in np.load(golden / "batch.npz").items() if k.startswith(case)}
    run = start(2)
    close(run.step(data["input_ids"], data["attention_mask"]), data["prefill_logits"][:, -1])
    for t, ids in enumerate(np.moveaxis(data["next_ids"], 1, 0)):
        close(run.step(ids[:, None]), data["decode_logits"][:, t])


@few
@given(cuts=st.sets(st.integers(1, 35)))
def test_a_text_in_pieces_gives_the_logits_and_states_of_the_whole(start, cuts) -> None:
    ids = random_ids(36)
    whole, pieces = start(), start()
    expected = whole.step(ids)
    for piece in np.split(ids, sorted(cuts)):
        logits = pieces.step(piece)
    close(logits, expected)
    for name, state in whole.states.items():
        close(pieces.states[name], state)


@few
@given(lengths=st.lists(st.integers(1, 14), min_size=2, max_size=4), left=st.booleans())
def test_a_padded_row_equals_the_row_alone(start, lengths, left) -> None:
    width = max(lengths)
    rows = [random_ids(100 + i)[:n] for i, n in enumerate(lengths)]
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    run = start(len(rows))
    logits = run.step(ids, mask)
    follow = random_ids(len(rows))
    after = run.step(follow[:, None])
    for i, row in enumerate(rows):
        alone = start()
        close(logits[i], alone.step(row)[0])
        close(after[i], alone.step(follow[i : i + 1])[0])


def test_a_row_that_pauses_keeps_its_state(start) -> None:
    """One row gets padding only while the other goes on, as when an answer has ended."""
    run, alone = start(2), start()
    first = random_ids(6)
    run.step(np.stack([first, first]))
    alone.step(first)
    run.step(np.array([[7], [0]]), np.array([[1], [0]]))
    close(run.step(np.array([[9], [9]]))[1], alone.step([9])[0])
