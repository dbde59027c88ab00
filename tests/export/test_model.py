"""The torch model is trainable and named like the checkpoint; its numbers: tests/end_to_end."""

from pathlib import Path

import pytest
import torch

from export.checkpoint import open_checkpoint
from export.model import SambaY
from export.tensors import expected_tensors
from export.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden"


def test_it_learns() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 12))
    losses = []
    model = load_weights(open_checkpoint(GOLDEN / "A8")).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        states = model.initial_states(2, capacity=12)
        logits, _, _ = model(ids, torch.ones_like(ids), states, all_logits=True)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ["A8", "C4"])
def test_parameter_names_and_shapes_are_the_checkpoints(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    with torch.device("meta"):
        model = SambaY(checkpoint.config)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert shapes == dict(expected_tensors(checkpoint.config))
