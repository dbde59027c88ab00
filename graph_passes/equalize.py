"""Even out the inputs of linear layers, exactly.

Where a few of a layer's inputs x are far louder than the rest, what is lost by rounding its weights
W is lost in their few columns, which share scales with all others. With an integer e_j for each,

    W x = (W 2^e) (2^-e x)

the loud columns' weights are larger, and so rounded more finely. 2^-e x takes no work: what makes
x, a norm's scale and shift or the rows of a projection, is multiplied by 2^-e once. Powers of two
change no digit: the model in floats computes bit for bit what it computed before.

Source: after AWQ (arXiv 2306.00978), whose factors are any numbers. Those move all columns a
little, which gains nothing and loses what exactness is worth; powers of two move the loud ones.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.block_quantization import dequantize, quantize
from graph_passes.error_compensation import Calibration
from graph_passes.fold_weight_casts import fold_casts_of
from graph_passes.pipeline import graph_pass
from graph_passes.recipe import WeightFormat
from graph_passes.streamed_tensor import StreamedTensor, read_float32_rows

EQUALIZED = "sambay.equalized"  # metadata: exponents by name, int8, packed by zlib, in base64

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the loudness that are taken out on trial
_WORTH = 0.9  # what the error must fall to: less than that is chance
_QUIETEST = 0.01  # mean square of an input, as a share of all inputs'


@dataclass(frozen=True)
class Scaling:
    """Exponents of a tensor: its numbers are multiplied by 2^(rows_i + columns_j).

    Attributes:
        rows, columns: int8, one for each index of the first and of the second axis; None is zeros.
    """

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


class Scalings(dict[str, Scaling]):
    """Of tensors by name."""

    def __repr__(self) -> str:
        """Short: it is printed into manifests."""
        digest = hashlib.sha256(to_json(self).encode()).hexdigest()[:12]
        return f"Scalings(tensors={len(self)}, digest={digest!r})"


@dataclass(frozen=True)
class EqualizedInputs:
    """What a linear layer is fed, its inputs multiplied by 2^-e."""

    inputs: Calibration
    exponents: np.ndarray

    def second_moments(self) -> np.ndarray:
        """See ``Calibration``."""
        moments = np.ldexp(self.inputs.second_moments(), -self.exponents)
        return np.ldexp(moments, -self.exponents[:, None], out=moments)

    def mean_squares(self) -> np.ndarray:
        """See ``Calibration``."""
        squares = np.ldexp(self.inputs.mean_squares(), -self.exponents)
        return np.ldexp(squares, -self.exponents, out=squares)


class EqualizedCalibration(Mapping[str, Calibration]):
    """What the layers of the equalized model are fed, by name of the weight."""

    def __init__(self, calibration: Mapping[str, Calibration], scalings: Scalings) -> None:
        self._calibration, self._scalings = calibration, scalings

    def __getitem__(self, name: str) -> Calibration:
        """Of a weight, or of some rows of one."""
        inputs = self._calibration[name]
        scaling = self._scalings.get(name.partition(".rows_")[0])
        if scaling is None or scaling.columns is None:
            return inputs
        return EqualizedInputs(inputs, scaling.columns)

    def __iter__(self) -> Iterator[str]:
        """Names of whole weights."""
        return iter(self._calibration)

    def __len__(self) -> int:
        """Count of whole weights."""
        return len(self._calibration)

    def __repr__(self) -> str:
        """As the calibration: it is printed into manifests."""
        return repr(self._calibration)


@graph_pass
def equalize(model: ir.Model, *, scalings: Mapping[str, Scaling]) -> None:
    """Multiply weights by powers of two; they are float32 then.

    Whoever gives the exponents sees to it that the model computes the same. What was done is told
    in the metadata, as EQUALIZED, so that weights can be compared with their source.

    Args:
        scalings: by name; some rows of a weight are meant by its name, too.

    Raises:
        ValueError: a tensor that the model lacks, one of another shape, or one that something reads
            in another type than float32.
    """
    left = set(scalings)
    for name, value in list(model.graph.initializers.items()):
        stem, _, rows = name.partition(".rows_")
        if stem not in scalings:
            continue
        left.discard(stem)
        fold_casts_of(model.graph, value)
        tensor, scaling = value.const_value, scalings[stem]
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            raise ValueError(
                f"equalize: {name!r} is read as {value.dtype}, expected float32 or casts to it"
            )
        first = int(rows.partition("_")[0]) if rows else 0
        value.const_value = _scaled(tensor, scaling, first)
    if left:
        raise ValueError(f"equalize: the model has no weight {min(left)!r}: trace it anew")
    model.metadata_props[EQUALIZED] = to_json(scalings)


def choose_exponents(rows: np.ndarray, inputs: Calibration, form: WeightFormat) -> np.ndarray:
    """The exponents e of a layer's inputs with which its outputs suffer least from rounding.

    Args:
        rows: [any, columns] float32, some of its weight's.
        inputs: what it is fed.
        form: how the weight will be stored; for "gptq" the errors are those of "search".

    Returns:
        int8 [columns]; zeros where nothing gains a tenth.
    """
    if form.quantizer == "gptq":  # which compensates either way, and takes minutes to try
        form = dataclasses.replace(form, quantizer="search")
    moments, squares = inputs.second_moments(), inputs.mean_squares()
    loudness = np.log2(squares + _QUIETEST * squares.mean() + np.finfo(np.float32).tiny) / 2
    loudness -= loudness.mean()
    best = np.zeros(rows.shape[1], np.int8)
    least = _WORTH * _output_error(rows, inputs, moments, form, best)
    for share in _SHARES:
        exponents = np.rint(share * loudness).astype(np.int8)
        error = _output_error(rows, inputs, moments, form, exponents)
        if error < least:
            best, least = exponents, error
    return best


def to_json(scalings: Mapping[str, Scaling]) -> str:
    """Text of exponents, as the metadata hold it."""

    def packed(exponents: np.ndarray) -> str:
        data = zlib.compress(exponents.astype(np.int8).tobytes(), 9)
        return base64.b64encode(data).decode("ascii")

    told = {
        name: {axis: packed(each) for axis, each in vars(scaling).items() if each is not None}
        for name, scaling in scalings.items()
    }
    return json.dumps(told)


def _output_error(
    rows: np.ndarray,
    inputs: Calibration,
    moments: np.ndarray,
    form: WeightFormat,
    exponents: np.ndarray,
) -> float:
    """Mean square of what rounding does to the layer's outputs."""
    stored = quantize(np.ldexp(rows, exponents), form, EqualizedInputs(inputs, exponents))
    lost = np.ldexp(dequantize(stored), -exponents) - rows
    return float(np.einsum("ij,ij->", lost @ moments, lost))


def _scaled(tensor: ir.TensorProtocol, scaling: Scaling, first: int) -> StreamedTensor:
    """A float32 tensor times powers of two; its first row is the ``first`` of the whole weight."""
    shape = tensor.shape.numpy()
    rows, columns = scaling.rows, scaling.columns
    fits = (rows is None or len(rows) >= first + shape[0]) and (
        columns is None or (len(shape) == 2 and len(columns) == shape[1])
    )
    if not fits:
        raise ValueError(
            f"equalize: {tensor.name!r} is {list(shape)}, and its exponents are of another shape"
        )

    def chunks() -> Iterator[np.ndarray]:
        at = first
        for chunk in read_float32_rows(tensor):
            if columns is not None:
                chunk = np.ldexp(chunk, columns)
            if rows is not None:
                here = rows[at : at + len(chunk)]
                chunk = np.ldexp(chunk, here.reshape(-1, *[1] * (chunk.ndim - 1)))
            at += len(chunk)
            yield chunk

    return StreamedTensor(chunks, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name or "")
