"""Every operator's portable body computes what its torch reference computes."""

import numpy as np
import pytest
import torch

from export.ops import OPS
from export.ops.custom_op import CustomOp, Sample
from tests.kernels.single_node import reference_outputs, run, session_of

# Rounding to 8 bits has no gradient.
TRAINABLE = [op for op in OPS if "quantized" not in str(op.torch_op)]


def seeded_sample(op: CustomOp, seed: int) -> Sample:
    torch.manual_seed(seed)
    return op.sample()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_portable_body_matches_the_reference(op: CustomOp, seed: int) -> None:
    sample = seeded_sample(op, seed)
    expected = reference_outputs(op, sample)
    actual = run(session_of(op, sample), sample)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == tuple(wanted.shape)
        assert got.dtype == wanted.numpy().dtype
        valid = ~np.isnan(wanted.numpy())
        np.testing.assert_allclose(got[valid], wanted.numpy()[valid], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_registration_is_sound(op: CustomOp) -> None:
    sample = seeded_sample(op, 0)
    torch.library.opcheck(op.torch_op, sample.tensors, sample.attributes)


@pytest.mark.parametrize("op", TRAINABLE, ids=lambda op: op.name)
def test_gradients_are_those_of_the_formula(op: CustomOp) -> None:
    sample = seeded_sample(op, 1)
    tensors = [t.requires_grad_(t.is_floating_point()) for t in sample.tensors]
    outputs = op.torch_op(*tensors, **sample.attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(output) for output in outputs]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    leaves = [t for t in tensors if t.requires_grad]
    gradients = torch.autograd.grad(loss, leaves)
    step = 1e-2
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn_like(leaf)
        values = []
        for sign in (1, -1):
            moved = [t + sign * step * direction if t is leaf else t for t in tensors]
            with torch.no_grad():
                results = op.torch_op(*moved, **sample.attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.append(
                sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True))
            )
        slope = float((values[0] - values[1]) / (2 * step))
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-2)
