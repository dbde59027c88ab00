"""The torch model equals the published code where that is right, and the mathematics where it is not."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from export.model import SambaY
from export.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 2e-4  # absolute, float32; noise is at most 5e-5, the smallest deliberate mistake 3e-2
NAMES = ("A8", "C4")


def load_model(name: str) -> SambaY:
    return load_weights(open_checkpoint(GOLDEN / name)).eval()


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> tuple[SambaY, Path]:
    return load_model(request.param), GOLDEN / request.param


class Run:
    """A sequence of calls on the torch model."""

    def __init__(self, model: SambaY, batch: int = 1, capacity: int = 128) -> None:
        self.model, self.states = model, model.initial_states(batch, capacity=capacity)
        self.mask = torch.zeros(batch, 0, dtype=torch.int64)

    @torch.no_grad()
    def step(self, ids: np.ndarray, mask: np.ndarray | None = None, **options) -> np.ndarray:
        ids = torch.as_tensor(np.atleast_2d(ids)).long()
        new = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).long()
        self.mask = torch.cat([self.mask, new], dim=1)
        logits, self.states, self.hidden = self.model(ids, self.mask, self.states, **options)
        return logits.numpy()


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def test_prefill_equals_the_golden_in_every_layer(golden: tuple[SambaY, Path]) -> None:
    model, folder = golden
    data = np.load(folder / "prefill.npz")
    run = Run(model)
    close(run.step(data["input_ids"], all_logits=True), data["logits"])
    close(torch.cat(run.hidden).numpy(), data["hidden"])
    tokens = data["input_ids"].shape[1]
    key, value = run.states[-1]
    close(key[:, :, :tokens].numpy(), data["shared_k"])
    close(value[:, :, :tokens].numpy(), data["shared_v"])


def test_decode_and_states_equal_the_golden(golden: tuple[SambaY, Path]) -> None:
    model, folder = golden
    data = np.load(folder / "decode.npz")
    ids, prompt = data["input_ids"][0], int(data["prompt_len"])
    run = Run(model)
    close(run.step(ids[:prompt])[:, 0], data["prefill_logits"][:, -1])
    check_states(model, run.states, data, "after_prefill", prompt)
    for t, token in enumerate(ids[prompt:]):
        close(run.step(token)[:, 0], data["decode_logits"][:, t])
    check_states(model, run.states, data, "after_decode", len(ids))


def check_states(model: SambaY, states, data, moment: str, length: int) -> None:
    for i, (first, second) in enumerate(states):
        if model.config.layer_kind(i) == "mamba":
            close(first.numpy(), data[f"{moment}.conv.{i}"][..., 1:])
            close(second.numpy(), data[f"{moment}.ssm.{i}"])
        elif model.config.layer_kind(i) == "full_attention":
            close(first[:, :, :length].numpy(), data[f"{moment}.full_k.{i}"])
            close(second[:, :, :length].numpy(), data[f"{moment}.full_v.{i}"])
        else:
            window = model.config.sliding_window
            order = np.arange(length - window, length) % window  # oldest first
            close(first.numpy()[:, :, order], data[f"{moment}.window_k.{i}"])
            close(second.numpy()[:, :, order], data[f"{moment}.window_v.{i}"])


@pytest.mark.parametrize("prompt", [1, 3, 8, 9, 20])
def test_decode_past_the_window_does_not_slip(golden: tuple[SambaY, Path], prompt: int) -> None:
    model, folder = golden
    data = np.load(folder / "short.npz")
    ids = data["input_ids"][0]
    run = Run(model)
    close(run.step(ids[:prompt], all_logits=True), data["expected"][:, :prompt])
    for t in range(prompt, len(ids)):
        close(run.step(ids[t])[:, 0], data["expected"][:, t])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_left_padded_rows_equal_the_golden(golden: tuple[SambaY, Path], case: str) -> None:
    model, folder = golden
    data = {k[2:]: v for k, v in np.load(folder / "batch.npz").items() if k.startswith(case)}
    run = Run(model, batch=2)
    last = run.step(data["input_ids"], data["attention_mask"])
    close(last[:, 0], data["prefill_logits"][:, -1])
    for t, ids in enumerate(np.moveaxis(data["next_ids"], 1, 0)):
        close(run.step(ids[:, None])[:, 0], data["decode_logits"][:, t])


@pytest.fixture(scope="module")
def small() -> SambaY:
    return load_model("A8")


def split(ids: np.ndarray, cuts: set[int]) -> Iterator[np.ndarray]:
    yield from np.split(ids, sorted(cuts))


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 35)))
def test_a_text_in_pieces_gives_the_logits_and_states_of_the_whole(small, cuts) -> None:
    ids = np.random.default_rng(len(cuts)).integers(0, 256, 36)
    whole, run = Run(small), Run(small)
    expected = whole.step(ids)
    for piece in split(ids, cuts):
        logits = run.step(piece)
    close(logits, expected)
    for mine, other in zip(run.states, whole.states, strict=True):
        for a, b in zip(mine, other, strict=True):
            close(a.numpy(), b.numpy())


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=2, max_size=4), left=st.booleans())
def test_a_padded_row_equals_the_row_alone(small, lengths, left) -> None:
    rng, width = np.random.default_rng(sum(lengths)), max(lengths)
    rows = [rng.integers(0, 256, n) for n in lengths]
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    run = Run(small, batch=len(rows))
    logits = run.step(ids, mask)
    follow = rng.integers(0, 256, len(rows))
    after = run.step(follow[:, None])
    for i, row in enumerate(rows):
        alone = Run(small)
        close(logits[i], alone.step(row)[0])
        close(after[i], alone.step(follow[i])[0])


def test_it_learns(small) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 12))
    losses = []
    model = load_model("A8").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        states = model.initial_states(2, capacity=12)
        logits, _, _ = model(ids, torch.ones_like(ids), states, all_logits=True)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] - 0.5


def test_parameter_names_are_the_checkpoints() -> None:
    from export.tensors import expected_tensors

    for name in NAMES:
        checkpoint = open_checkpoint(GOLDEN / name)
        with torch.device("meta"):
            model = SambaY(checkpoint.config)
        shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
        assert shapes == dict(expected_tensors(checkpoint.config))
        assert json.loads(checkpoint.config.to_json())["hidden_size"] == 64
