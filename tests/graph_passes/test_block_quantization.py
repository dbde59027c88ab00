import io
import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graph_passes.block_quantization import dequantize, quantize, quantized_tensors
from graph_passes.error_compensation import Compensation
from graph_passes.recipe import BITS, BLOCK_SIZES, QUANTIZERS, SCALE_TYPES, WeightFormat
from graph_passes.streamed_tensor import CHUNK

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 16, 48, 80, 96]))
weights = shapes.flatmap(
    lambda shape: hnp.arrays(
        np.float32, shape, elements=st.floats(-8, 8, width=32) | st.floats(0, 2**-126, width=32)
    )
)
formats = st.builds(
    WeightFormat,
    bits=st.sampled_from(BITS),
    block_size=st.sampled_from([16, 32]),
    zero_points=st.booleans(),
    quantizer=st.sampled_from(["rtn", "search"]),
    scale_type=st.sampled_from(SCALE_TYPES),
)
EVERY_STORAGE = [
    WeightFormat(bits=bits, block_size=block_size, zero_points=zero_points)
    for bits, block_size, zero_points in itertools.product(BITS, BLOCK_SIZES, [False, True])
]
EVERY_FORMAT = [
    WeightFormat(bits=bits, block_size=32, zero_points=zero_points, quantizer=quantizer)
    for bits, zero_points, quantizer in itertools.product(BITS, [False, True], QUANTIZERS)
] + [WeightFormat(bits=bits, quantizer=name, scale_type="float16") for bits, name in [
    (4, "rtn"), (8, "rtn"), (4, "search"), (8, "gptq"),
]]  # fmt: skip


def named(form: WeightFormat) -> str:
    zero = "zero points" if form.zero_points else "symmetric"
    return f"{form.quantizer}, {form.bits} bit, block {form.block_size}, {zero}, {form.scale_type}"


@dataclass(frozen=True)
class Inputs:
    """A linear layer's inputs [tokens, columns] as calibration."""

    x: np.ndarray

    def second_moments(self) -> np.ndarray:
        return self.x.T @ self.x / len(self.x)

    def mean_squares(self) -> np.ndarray:
        return np.square(self.x).mean(axis=0)


def correlated_inputs(columns: int, tokens: int = 512) -> Inputs:
    """Fewer sources than columns, of different loudness."""
    rng = np.random.default_rng(3)
    mixed = rng.standard_normal((tokens, columns // 4)) @ rng.standard_normal(
        (columns // 4, columns)
    )
    mixed += 0.3 * rng.standard_normal((tokens, columns))
    return Inputs((mixed * np.exp(rng.standard_normal(columns))).astype(np.float32))


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def snr(weight: np.ndarray, form: WeightFormat) -> float:
    noise = dequantize(quantize(weight, form)) - weight
    return 10 * np.log10(np.square(weight).sum() / np.square(noise).sum())


@settings(max_examples=60, deadline=None)
@given(weights, formats)
def test_rounding_errs_by_half_a_step_and_the_search_by_no_more_in_all(
    weight: np.ndarray, form: WeightFormat
) -> None:
    nearest = quantize(weight, WeightFormat(**{**vars(form), "quantizer": "rtn"}))
    step = np.repeat(nearest.scale, form.block_size, axis=1)[:, : weight.shape[1]]
    # The product of a value and its scale is itself rounded to float32; zero is an integer, so
    # with zero points both ends of the range are up to half a step away from where they would be.
    rounding = np.spacing(np.abs(weight).max() * 2)
    bound = step * (1.0 if form.zero_points else 0.5) + rounding
    half = np.finfo(np.float16)
    coarse = form.scale_type == "float16"
    if coarse:  # its smallest numbers have few digits
        bound += 4 * half.smallest_subnormal * form.bits
    error = np.abs(dequantize(nearest) - weight)
    assert (error <= bound).all()
    if form.quantizer == "search":
        found = np.abs(dequantize(quantize(weight, form)) - weight)
        inexact = np.abs(weight).max() * 1e-6  # a fit is a quotient of float32 sums
        if coarse:
            inexact = np.abs(weight).max() * half.eps + 4 * half.smallest_subnormal * form.bits
        assert np.linalg.norm(found) <= np.linalg.norm(error + inexact) * 1.001


@settings(max_examples=30, deadline=None)
@given(weights, st.sampled_from(BITS))
def test_rounding_what_was_rounded_changes_nothing(weight: np.ndarray, bits: int) -> None:
    form = WeightFormat(bits=bits, block_size=16, quantizer="rtn")
    once = dequantize(quantize(weight, form))
    np.testing.assert_allclose(dequantize(quantize(once, form)), once, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_of_a_block_is_exact_and_keeps_its_sign(bits: int) -> None:
    weight = np.array([[-7.0] + [1.0] * 15, [0.5] * 15 + [7.0]], np.float32)
    form = WeightFormat(bits=bits, block_size=16, quantizer="rtn")
    restored = dequantize(quantize(weight, form))
    assert restored[0, 0] == -7.0
    assert restored[1, 15] == 7.0


def test_the_first_of_two_4_bit_values_stands_in_the_low_half() -> None:
    weight = np.array([[1, -1, *[0] * 13, 7]], np.float32)
    packed = quantize(weight, WeightFormat(bits=4, block_size=16, quantizer="rtn")).packed
    assert packed.shape == (1, 1, 8)
    assert packed[0, 0, 0] == (8 + 1) | (8 - 1) << 4
    assert packed[0, 0, 7] == 8 | (8 + 7) << 4


def matmul_by_identity(weight: np.ndarray, form: WeightFormat) -> np.ndarray:
    """What ONNX Runtime reads: identity times the quantized matrix, transposed back."""
    rows, columns = weight.shape
    tensors = quantized_tensors(ir.Tensor(weight, name="w"), form)
    stored = [tensors.packed, tensors.scales]
    if tensors.zero_points is not None:
        stored.append(tensors.zero_points)
    x = ir.Value(
        name="x", shape=ir.Shape([columns, columns]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    initializers = [
        ir.Value(name=each.name, const_value=ir.Tensor(each.numpy(), name=each.name))
        for each in stored
    ]
    settings = {"K": columns, "N": rows, "bits": form.bits, "block_size": form.block_size}
    # accuracy_level 1: the runtime computes in float32
    settings["accuracy_level"] = 1
    node = ir.node("MatMulNBits", [x, *initializers], settings, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports=opsets
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(proto)
    return session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T


@pytest.mark.parametrize("columns", [256, 200])
@pytest.mark.parametrize("form", EVERY_STORAGE, ids=named)
def test_onnx_runtime_reads_what_was_packed(form: WeightFormat, columns: int) -> None:
    weight = normal(24, columns) + np.float32(0.5)
    expected = dequantize(quantize(weight, form))
    np.testing.assert_allclose(matmul_by_identity(weight, form), expected, atol=1e-5)


@pytest.mark.parametrize("form", EVERY_FORMAT, ids=named)
def test_a_block_of_zeros_stays_zero(form: WeightFormat) -> None:
    inputs = correlated_inputs(40) if form.quantizer == "gptq" else None
    quantized = quantize(np.zeros((2, 40), np.float32), form, inputs)
    assert (dequantize(quantized) == 0).all()
    assert (quantized.scale != 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = np.ones((3, 32), np.float32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize(weight, WeightFormat())
    tensors = quantized_tensors(ir.Tensor(weight, name="layer.fc1"), WeightFormat())
    with pytest.raises(ValueError, match=r"layer\.fc1"):
        tensors.packed.tofile(io.BytesIO())


@pytest.mark.parametrize("form", EVERY_FORMAT, ids=named)
@pytest.mark.parametrize("packed_first", [True, False])
def test_streamed_tensors_are_those_of_the_whole(form: WeightFormat, packed_first: bool) -> None:
    columns = 100
    weight = normal(3 * CHUNK // columns + 7, columns)
    inputs = correlated_inputs(columns)
    whole = quantize(weight, form, inputs)
    tensors = quantized_tensors(ir.Tensor(weight, name="w"), form, inputs)
    expected = {tensors.packed: whole.packed, tensors.scales: whole.scale}
    if tensors.zero_points is not None:
        expected[tensors.zero_points] = whole.zero_points
    order = list(expected) if packed_first else list(expected)[::-1]
    for tensor in order + order[1:]:  # found on the way, or computed anew
        np.testing.assert_array_equal(tensor.numpy(), expected[tensor])


def test_float16_scales_are_stored_as_they_were_computed_with() -> None:
    weight = np.concatenate([normal(4, 64), 1e-9 * normal(4, 64), 6e4 * normal(4, 64)])
    form = WeightFormat(scale_type="float16")
    tensors = quantized_tensors(ir.Tensor(weight, name="w"), form)
    quantized = quantize(weight, form)
    stored = tensors.scales.numpy()
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored.astype(np.float32), quantized.scale)
    assert (stored != 0).all()
    assert snr(weight[:4], form) > snr(weight[:4], WeightFormat()) - 0.01
    assert tensors.scales.nbytes + tensors.packed.nbytes == form.bytes_of(12, 64)


def test_a_scale_too_large_for_float16_is_refused_by_name() -> None:
    weight = ir.Tensor(np.full((2, 32), 1e7, np.float32), name="layer.fc1")
    tensors = quantized_tensors(weight, WeightFormat(scale_type="float16"))
    with pytest.raises(ValueError, match=r"'layer\.fc1': a block has the scale .* float32"):
        tensors.packed.tofile(io.BytesIO())


def test_what_is_stored_of_a_weight_costs_one_pass_over_it() -> None:
    class Counting(ir.Tensor):
        reads = 0

        def numpy(self) -> np.ndarray:
            type(self).reads += 1
            return super().numpy()

    weight = Counting(np.ones((4, 32), np.float32), name="w")
    tensors = quantized_tensors(weight, WeightFormat(zero_points=True))
    for tensor in (tensors.packed, tensors.scales, tensors.zero_points):
        tensor.tofile(io.BytesIO())
    assert Counting.reads == 1


HEAVY_TAILED = np.random.default_rng(5).standard_t(4, (64, 2048)).astype(np.float32)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("weight", [normal(64, 2048), HEAVY_TAILED], ids=["normal", "heavy tails"])
def test_the_search_gains_a_decibel_and_more(weight: np.ndarray, block_size: int) -> None:
    nearest, searched = (
        snr(weight, WeightFormat(block_size=block_size, quantizer=name))
        for name in ("rtn", "search")
    )
    assert searched >= nearest + 1.3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_the_search_is_better_at_every_number_of_bits(bits: int, zero_points: bool) -> None:
    for weight in (normal(16, 2048), HEAVY_TAILED):
        nearest, searched = (
            snr(weight, WeightFormat(bits=bits, zero_points=zero_points, quantizer=name))
            for name in ("rtn", "search")
        )
        assert searched > nearest + 0.2


def output_error(weight: np.ndarray, form: WeightFormat, inputs: Inputs) -> float:
    error = dequantize(quantize(weight, form, inputs)) - weight
    return float(np.square(inputs.x @ error.T).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("columns", [256, 200])
def test_each_quantizer_brings_outputs_nearer_than_the_one_before(
    bits: int, zero_points: bool, columns: int
) -> None:
    weight, inputs = normal(32, columns), correlated_inputs(columns)
    nearest, weighted, compensated = (
        output_error(
            weight, WeightFormat(bits=bits, zero_points=zero_points, quantizer=name), inputs
        )
        for name in QUANTIZERS
    )
    assert weighted < 0.8 * nearest
    assert compensated < 0.3 * weighted


def test_without_correlation_compensation_rounds_to_nearest() -> None:
    weight = normal(8, 64)
    form = WeightFormat(quantizer="gptq")

    class Independent:
        def second_moments(self) -> np.ndarray:
            return np.eye(64, dtype=np.float32)

        def mean_squares(self) -> np.ndarray:
            return np.ones(64, np.float32)

    np.testing.assert_array_equal(
        quantize(weight, form, Independent()).packed, quantize(weight, WeightFormat()).packed
    )


def test_inputs_nobody_has_seen_cannot_be_compensated_for() -> None:
    with pytest.raises(ValueError, match=r"'gptq' needs the inputs of 'layer\.fc1'"):
        quantized_tensors(
            ir.Tensor(np.ones((4, 32), np.float32), name="layer.fc1"),
            WeightFormat(quantizer="gptq"),
        )


@pytest.mark.parametrize(
    ("value", "message"), [(0, "all zero"), (np.nan, "not finite"), (-1, "all zero")]
)
def test_moments_that_are_none_are_refused_by_the_weight_s_name(value: float, message: str) -> None:
    class Useless:
        def second_moments(self) -> np.ndarray:
            return np.full((32, 32), value, np.float32)

        def mean_squares(self) -> np.ndarray:
            return np.full(32, 1, np.float32)

    weight = ir.Tensor(np.ones((4, 32), np.float32), name="layer.fc1")
    tensors = quantized_tensors(weight, WeightFormat(quantizer="gptq"), Useless())
    with pytest.raises(ValueError, match=rf"layer\.fc1.*{message}"):
        tensors.packed.tofile(io.BytesIO())


@pytest.mark.parametrize("columns", [1, 100, 300, 513])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    inputs = correlated_inputs(columns * 4)
    compensation = Compensation(Inputs(inputs.x[:, :columns]))
    upper, order = compensation._upper.astype(np.float64), compensation._order
    moments = inputs.x[:, :columns].T @ inputs.x[:, :columns] / len(inputs.x)
    damped = moments + 0.01 * np.diagonal(moments).mean() * np.eye(columns)
    assert (np.tril(upper, -1) == 0).all()
    product = upper.T @ upper @ damped[np.ix_(order, order)]
    np.testing.assert_allclose(product, np.eye(columns), atol=2e-3)
