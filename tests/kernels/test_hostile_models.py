"""A wrong model, or wrong inputs, end in an error of ONNX Runtime that names them."""

import contextlib
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as pybind

from export.ops.custom_op import Sample
from tests.kernels.samples import CASES, Case, Sizes
from tests.kernels.single_node import as_model, open_session, reference_outputs, run, session_of

SIZES = Sizes(batch=2, tokens=3, width=9, states=5, slots=8, depth=4)
EXTREMES = (-(2**63), -(2**40), -1, 0, 1, 2, 3, 7, 8, 2**31, 2**40, 2**62, 2**63 - 1)
DTYPES = (torch.float32, torch.float16, torch.int8, torch.int64)
ERRORS = tuple(
    each for each in vars(pybind).values() if isinstance(each, type) and issubclass(each, Exception)
)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def attempt(case: Case, sample: Sample) -> list[np.ndarray]:
    """Run a sample as it is, whatever it is, on the best kernels; ranks are not declared."""
    outputs = reference_outputs(case.op, case.sample(SIZES))
    model = as_model(
        case.op,
        [(tensor.dtype, None) for tensor in sample.tensors],
        [(tensor.dtype, None) for tensor in outputs],
        sample.attributes,
    )
    return run(open_session(model, isa=""), sample)


@st.composite
def resized(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with one axis more, less, longer or shorter."""
    axis = draw(st.integers(0, tensor.dim() - 1))
    change = draw(st.sampled_from(("more", "less", "longer", "shorter", "empty", "scalar")))
    if change == "more":
        return tensor.unsqueeze(axis)
    if change == "less":
        return tensor.select(axis, 0) if tensor.shape[axis] else tensor.sum(axis)
    if change == "longer":
        return torch.cat([tensor] * draw(st.integers(2, 3)), dim=axis)
    if change == "shorter":
        return tensor.narrow(axis, 0, max(0, tensor.shape[axis] - draw(st.integers(1, 3))))
    if change == "empty":
        return tensor.narrow(axis, 0, 0)
    return torch.zeros((), dtype=tensor.dtype)


@st.composite
def hostile(draw: st.DrawFn, case: Case) -> Sample:
    """A sample with one to three things wrong."""
    sample = case.sample(SIZES, seed=draw(st.integers(0, 3)))
    tensors, attributes = list(sample.tensors), dict(sample.attributes)
    for _ in range(draw(st.integers(1, 3))):
        if attributes and draw(st.integers(0, 3)) == 0:
            name = draw(st.sampled_from(sorted(attributes)))
            values = st.one_of(
                st.sampled_from(EXTREMES), st.just(float("nan")), st.just("text"), st.none()
            )
            attributes[name] = draw(values)
            if attributes[name] is None:
                del attributes[name]
            continue
        i = draw(st.integers(0, len(tensors) - 1))
        if tensors[i].dtype == torch.int64 and tensors[i].numel() and draw(st.booleans()):
            tensors[i] = tensors[i].clone()
            place = draw(st.integers(0, tensors[i].numel() - 1))
            tensors[i].view(-1)[place] = draw(st.sampled_from(EXTREMES))
        elif draw(st.integers(0, 5)) == 0:
            tensors[i] = tensors[i].to(draw(st.sampled_from(DTYPES)))
        elif tensors[i].dim():
            tensors[i] = draw(resized(tensors[i]))
    return Sample(tuple(tensor.contiguous() for tensor in tensors), attributes)


@by_case
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_wrong_the_process_goes_on(case: Case, data: st.DataObject) -> None:
    session_of(case.op, case.sample(SIZES), isa="")  # or the library could not be loaded
    sample = data.draw(hostile(case))
    with contextlib.suppress(*ERRORS):
        assert all(isinstance(output, np.ndarray) for output in attempt(case, sample))


def with_attribute(name: str, value: Any) -> Any:
    return lambda sample: Sample(sample.tensors, {**sample.attributes, name: value})


def with_tensor(index: int, value: Any) -> Any:
    def change(sample: Sample) -> Sample:
        tensors = list(sample.tensors)
        tensors[index] = value(tensors[index])
        return Sample(tuple(tensors), sample.attributes)

    return change


def filled(value: int) -> Any:
    return lambda tensor: torch.full_like(tensor, value)


WRONG = (
    ("CausalConvWithState", with_tensor(1, lambda t: t[..., :0]), "weight has no taps"),
    (
        "CausalConvWithState",
        with_tensor(4, filled(-1)),
        "lengths holds -1; expected values of 0 to",
    ),
    ("SelectiveScan", with_tensor(8, filled(4)), "lengths holds 4; expected values of 0 to 3"),
    ("SelectiveScan", with_tensor(3, lambda t: t[1:]), r"A has shape \[8, 5\]; expected"),
    ("GatedMemoryUnit", with_tensor(1, lambda t: t[:1]), "memory has shape"),
    ("DifferentialAttention", with_attribute("num_heads", 2**62), "num_heads is 46116860184"),
    ("DifferentialAttention", with_attribute("num_kv_heads", 3), "num_kv_heads 3"),
    ("DifferentialAttention", with_attribute("window", 0), "window is 0; expected 1 or more"),
    ("DifferentialAttention", with_tensor(7, filled(-1)), "past_lengths holds -1"),
    ("DifferentialCrossAttention", with_tensor(5, filled(8)), "positions holds 8; expected values"),
    ("DifferentialCrossAttention", with_tensor(1, lambda t: t[:, :, :0]), "value has shape"),
    (
        "AppendKeyValue",
        with_tensor(4, filled(6)),
        "past_lengths holds 6; expected values of 0 to 5",
    ),
    ("AppendQuantizedKeyValue", with_tensor(2, lambda t: t[:, :, 1:]), "past_key_scale has shape"),
    ("AppendQuantizedKeyValue", with_tensor(6, filled(-3)), "past_lengths holds -3"),
    ("QuantizedDifferentialAttention", with_tensor(9, filled(2**62)), "past_lengths holds 46116"),
    (
        "QuantizedDifferentialCrossAttention",
        with_tensor(4, lambda t: t[:1]),
        "value_scale has shape",
    ),
)


@pytest.mark.parametrize(
    ("name", "change", "message"), WRONG, ids=[f"{name}: {message}" for name, _, message in WRONG]
)
def test_an_error_names_the_input_and_what_was_expected(
    name: str, change: Any, message: str
) -> None:
    case = next(case for case in CASES if case.op.name == name)
    with pytest.raises(Exception, match=message):
        attempt(case, change(case.sample(SIZES)))


@by_case
def test_a_present_of_another_size_is_refused(case: Case) -> None:
    sample = case.sample(SIZES)
    model = as_model(
        case.op,
        [(tensor.dtype, None) for tensor in sample.tensors],
        [(tensor.dtype, None) for tensor in reference_outputs(case.op, sample)],
        sample.attributes,
    )
    session = open_session(model, isa="")
    arrays = [tensor.numpy() for tensor in sample.tensors]
    for output, expected in enumerate(reference_outputs(case.op, sample)):
        binding = session.io_binding()
        for i, array in enumerate(arrays):
            binding.bind_cpu_input(f"in{i}", array)
        short = np.zeros(expected.shape, expected.numpy().dtype)[..., 1:].copy()
        for j, _ in enumerate(session.get_outputs()):
            binding.bind_output(f"out{j}")
        binding.bind_ortvalue_output(f"out{output}", ort.OrtValue.ortvalue_from_numpy(short))
        with pytest.raises(Exception, match="shape"):
            session.run_with_iobinding(binding)
