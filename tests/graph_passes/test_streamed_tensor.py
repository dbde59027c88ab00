import io
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.fold_weight_transposes import transposed_tensor
from graph_passes.streamed_tensor import CHUNK, StreamedTensor, read_float32_rows

DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
SHAPES = [(7,), (3, 5), (CHUNK // 8 + 1, 16), (2, 1, 4), (0, 4), (2, CHUNK + 1)]


def in_file(path: Path, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
    path.write_bytes(b"before" + array.tobytes())
    shape = ir.Shape(array.shape)
    return ir.ExternalTensor(path, 6, array.nbytes, dtype, shape=shape, name="weight")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_read_in_pieces_are_the_weight_in_float32(
    tmp_path: Path, dtype: ir.DataType, shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    tensor = in_file(tmp_path / "file", array, dtype)
    pieces = list(read_float32_rows(tensor))
    expected = array.astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([expected[:0], *pieces]), expected)
    assert all(piece.size <= max(CHUNK, array[0].size) for piece in pieces)
    assert tensor.raw is None, "the memory map is given back"


def test_reading_can_stop_early_and_start_again(tmp_path: Path) -> None:
    array = np.arange(4 * CHUNK, dtype=np.float32).reshape(4, CHUNK)
    tensor = in_file(tmp_path / "file", array, ir.DataType.FLOAT)
    rows = read_float32_rows(tensor)
    next(rows)
    rows.close()
    assert tensor.raw is None
    np.testing.assert_array_equal(np.concatenate(list(read_float32_rows(tensor))), array)


def test_special_bfloat16_values_survive() -> None:
    bits = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x3F80], np.uint16)
    array = bits.view(ml_dtypes.bfloat16)
    (piece,) = read_float32_rows(ir.Tensor(array, name="w"))
    np.testing.assert_array_equal(piece, array.astype(np.float32))
    assert np.signbit(piece[1])


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'ids' is INT64"):
        list(read_float32_rows(ir.Tensor(np.zeros(3, np.int64), name="ids")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_and_an_array_get_the_same_bytes(dtype: ir.DataType) -> None:
    array = np.random.default_rng(0).standard_normal((70, 130)).astype(DTYPES[dtype])
    tensor = transposed_tensor(ir.Tensor(array, name="w", dtype=dtype))
    file = io.BytesIO()
    tensor.tofile(file)
    np.testing.assert_array_equal(tensor.numpy(), array.T)
    assert tensor.shape == ir.Shape([130, 70])
    assert file.getvalue() == tensor.tobytes() == array.T.tobytes()
    assert tensor.nbytes == len(file.getvalue())


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def fail() -> list[np.ndarray]:
        raise AssertionError("read")

    tensor = StreamedTensor(fail, dtype=ir.DataType.FLOAT, shape=(2, 3), name="w")
    assert tensor.nbytes == 24
    with pytest.raises(AssertionError, match="read"):
        tensor.numpy()
