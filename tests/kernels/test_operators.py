"""Native kernels compute what the torch references compute, on every instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.ops import OPS
from export.ops.custom_op import Sample
from tests.kernels.samples import CASES, Case, Sizes
from tests.kernels.single_node import ISAS, reference_outputs, run, run_in_place, session_of

# Of float32 sums in another order, relative to the largest of a tensor's values.
TOLERANCE = 2e-5

by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_isa = pytest.mark.parametrize("isa", ISAS)
SIZES = (
    Sizes(batch=1, tokens=1, width=64, depth=100),
    Sizes(batch=3, tokens=2, width=17, states=5, pairs=1, group=3, taps=1, depth=0),
    Sizes(batch=2, tokens=33, width=16, states=8, group=1, slots=37, depth=90),
    Sizes(batch=1, tokens=1, width=24, pairs=1, slots=1500, depth=1400),
    Sizes(batch=1, tokens=130, width=8, states=4, pairs=1, group=5, slots=700, depth=2000),
)


def check(actual: list[np.ndarray], expected: list[torch.Tensor]) -> None:
    """Equal within the tolerance; cells and scales of 8 bits and float16 but for a rounding tie."""
    for got, wanted in zip(actual, (tensor.numpy() for tensor in expected), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if got.dtype != np.float32:  # copied or rounded once, from the same values
            np.testing.assert_array_equal(got, wanted)
            continue
        finite = np.abs(wanted[np.isfinite(wanted)])
        bound = TOLERANCE * max(1.0, finite.max(initial=0.0))
        np.testing.assert_allclose(got, wanted, atol=bound, rtol=TOLERANCE)


def test_every_operator_has_a_case() -> None:
    assert {case.op.name for case in CASES} == {op.name for op in OPS}


@by_case
@by_isa
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}")
def test_a_kernel_computes_what_the_reference_computes(case: Case, isa: str, sizes: Sizes) -> None:
    sample = case.sample(sizes)
    session = session_of(case.op, sample, isa=isa)
    check(run(session, sample), reference_outputs(case.op, sample))


@by_case
@pytest.mark.parametrize("isa", [None, *ISAS])
def test_past_and_present_may_be_one_memory(case: Case, isa: str | None) -> None:
    for seed, sizes in enumerate(SIZES):
        sample = case.sample(sizes, seed)
        session = session_of(case.op, sample, isa=isa)
        check(run_in_place(session, sample, case.shared), reference_outputs(case.op, sample))


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    tokens = draw(st.integers(1, 40))
    return Sizes(
        batch=draw(st.integers(1, 4)),
        tokens=tokens,
        width=draw(st.integers(1, 70)),
        taps=draw(st.integers(1, 6)),
        states=draw(st.integers(1, 33)),
        pairs=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        slots=draw(st.integers(tokens, 200)),
        depth=draw(st.integers(0, 500)),
    )


@by_case
@settings(max_examples=12, deadline=None)
@given(sizes=any_sizes(), seed=st.integers(0, 99), shared=st.booleans())
def test_sizes_do_not_matter(case: Case, sizes: Sizes, seed: int, shared: bool) -> None:
    sample = case.sample(sizes, seed)
    session = session_of(case.op, sample, isa="")  # the best of this machine
    actual = run_in_place(session, sample, case.shared) if shared else run(session, sample)
    check(actual, reference_outputs(case.op, sample))


@by_case
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    sizes = Sizes(batch=2, tokens=20, width=24, slots=1100, depth=1000)
    sample = case.sample(sizes)
    expected = run(session_of(case.op, sample, isa=""), sample)
    for threads in range(2, 9):
        session = session_of(case.op, sample, isa="", threads=threads)
        for got, wanted in zip(run(session, sample), expected, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=f"{threads} threads")


def spoiled(sample: Sample, index: int, values: list[float]) -> Sample:
    """The sample with some values of one tensor replaced."""
    tensors = list(sample.tensors)
    tensor = tensors[index] = tensors[index].clone()
    generator = torch.Generator().manual_seed(index)
    for value in values:
        place = int(torch.randint(0, tensor.numel(), (), generator=generator))
        tensor.view(-1)[place] = value
    return Sample(tuple(tensors), sample.attributes)


@by_case
@by_isa
@pytest.mark.parametrize(
    "values", [[np.nan], [np.inf], [1e30, -1e30], [1e3, -1e3, 1e-7, 1e-38]], ids=str
)
def test_nan_infinity_and_huge_values_go_the_reference_s_way(
    case: Case, isa: str, values: list[float]
) -> None:
    """In every input. What no query sees is another matter: there the reference has 0 * NaN."""
    sizes = Sizes(batch=1, tokens=1, width=20, slots=12, depth=20, all_seen=True)
    sample = case.sample(sizes)
    session = session_of(case.op, sample, isa=isa)
    for index, tensor in enumerate(sample.tensors):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        if case.cell == torch.int8 and tensor.dtype == torch.float16:
            values = [value for value in values if not abs(value) > 65504]  # no scale is infinite
        bad = spoiled(sample, index, values)
        check(run(session, bad), reference_outputs(case.op, bad))
