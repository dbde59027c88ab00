import io

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graph_passes.block_quantization import BLOCK_SIZES, dequantize, quantize, quantized_tensors
from graph_passes.streamed_tensor import CHUNK

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 16, 48, 80, 96]))
weights = shapes.flatmap(
    lambda shape: hnp.arrays(
        np.float32, shape, elements=st.floats(-8, 8, width=32) | st.floats(0, 2**-126, width=32)
    )
)
bits = st.sampled_from([4, 8])


@settings(max_examples=60, deadline=None)
@given(weights, bits, st.sampled_from([16, 32]))
def test_error_is_at_most_half_a_step(weight: np.ndarray, bits: int, block_size: int) -> None:
    quantized = quantize(weight, bits=bits, block_size=block_size)
    step = np.repeat(quantized.scale, block_size, axis=1)[:, : weight.shape[1]]
    # The product of a value and its scale is itself rounded to float32.
    rounding = np.spacing(np.abs(weight).max())
    assert (np.abs(dequantize(quantized) - weight) <= step / 2 + rounding).all()


@settings(max_examples=30, deadline=None)
@given(weights, bits)
def test_quantizing_what_was_dequantized_changes_nothing(weight: np.ndarray, bits: int) -> None:
    once = dequantize(quantize(weight, bits=bits, block_size=16))
    again = dequantize(quantize(once, bits=bits, block_size=16))
    np.testing.assert_allclose(again, once, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_of_a_block_is_exact_and_keeps_its_sign(bits: int) -> None:
    weight = np.array([[-7.0] + [1.0] * 15, [0.5] * 15 + [7.0]], np.float32)
    restored = dequantize(quantize(weight, bits=bits, block_size=16))
    assert restored[0, 0] == -7.0
    assert restored[1, 15] == 7.0


def test_the_first_of_two_4_bit_values_stands_in_the_low_half() -> None:
    weight = np.array([[1, -1, *[0] * 13, 7]], np.float32)
    packed = quantize(weight, bits=4, block_size=16).packed
    assert packed.shape == (1, 1, 8)
    assert packed[0, 0, 0] == (8 + 1) | (8 - 1) << 4
    assert packed[0, 0, 7] == 8 | (8 + 7) << 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_of_zeros_stays_zero(bits: int) -> None:
    quantized = quantize(np.zeros((2, 40), np.float32), bits=bits, block_size=32)
    assert (dequantize(quantized) == 0).all()
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = np.ones((3, 32), np.float32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize(weight, bits=4, block_size=32)
    packed, _ = quantized_tensors(ir.Tensor(weight, name="layer.fc1"), bits=4, block_size=32)
    with pytest.raises(ValueError, match=r"layer\.fc1"):
        packed.tofile(io.BytesIO())


@pytest.mark.parametrize(("bits", "block_size"), [(3, 32), (4, 24), (16, 32), (4, 0)])
def test_settings_that_no_runtime_reads_are_refused(bits: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"bits is|block_size is"):
        quantize(np.ones((1, 32), np.float32), bits=bits, block_size=block_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales_first", [False, True])
def test_streamed_tensors_are_those_of_the_whole(bits: int, scales_first: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((300, CHUNK // 128)).astype(np.float32)
    whole = quantize(weight, bits=bits, block_size=BLOCK_SIZES[1])
    packed, scales = quantized_tensors(ir.Tensor(weight, name="w"), bits=bits, block_size=32)
    if scales_first:
        np.testing.assert_array_equal(scales.numpy(), whole.scale)
    np.testing.assert_array_equal(packed.numpy(), whole.packed)
    for _ in range(2):  # found on the way, then computed anew
        np.testing.assert_array_equal(scales.numpy(), whole.scale)


def test_packed_and_scales_cost_one_pass_over_the_weight() -> None:
    class Counting(ir.Tensor):
        reads = 0

        def numpy(self) -> np.ndarray:
            type(self).reads += 1
            return super().numpy()

    weight = Counting(np.ones((4, 32), np.float32), name="w")
    for tensor in quantized_tensors(weight, bits=4, block_size=32):
        tensor.tofile(io.BytesIO())
    assert Counting.reads == 1
