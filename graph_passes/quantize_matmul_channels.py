"""Store the weights of linear layers in int8, one scale for each output: the form of QDQ graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.fold_weight_transposes import transposed_tensor
from graph_passes.pipeline import graph_pass
from graph_passes.quantize_matmul import find_linear_layers
from graph_passes.recipe import Rule, WeightFormat, choose_formats
from graph_passes.scale_search import round_to_nearest, search_scales
from graph_passes.streamed_tensor import StreamedTensor, read_float32_rows
from graph_passes.weight_path import WeightPath, add_initializer

_LARGEST = np.float32(127)  # of int8, on both sides: some runtimes take no -128 in a weight


@graph_pass
def quantize_matmul_channels(
    model: ir.Model, *, quantizer: str = "search", rules: Sequence[Rule] = ()
) -> None:
    """Replace ``MatMul(x, weight)`` by ``MatMul(x, DequantizeLinear(int8, scales))``.

    The weight is stored [in, out], as MatMul reads it; scales are float32 [out], there are no zero
    points, and values lie between -127 and 127.

    Args:
        quantizer: "rtn" or "search".
        rules: as in ``quantize_matmul``; None leaves a weight as it is, 8 names the default.

    Raises:
        ValueError: a quantizer that is not offered, other bits, or a rule that matches no weight.
    """
    default = WeightFormat(bits=8, quantizer=quantizer)
    if quantizer == "gptq":
        raise ValueError("quantize_matmul_channels: quantizer is 'gptq', expected rtn or search")
    layers = find_linear_layers(model)
    names = dict.fromkeys(path.weight.name or "" for _, path in layers)
    chosen = choose_formats(model, names, default, rules)
    if other := [name for name, form in chosen.items() if form not in (None, default)]:
        raise ValueError(
            f"quantize_matmul_channels: {other[0]!r} is to be stored as {chosen[other[0]]}, "
            "expected 8 bits or None: a channel has one scale"
        )
    for node, path in layers:
        if chosen[path.weight.name or ""] is not None:
            values, scales = (
                add_initializer(model.graph, tensor)
                for tensor in channel_tensors(path, quantizer=quantizer)
            )
            dequantized = ir.node("DequantizeLinear", [values, scales], {"axis": 1})
            model.graph.insert_before(node, dequantized)
            node.replace_input_with(1, dequantized.outputs[0])
    common.RemoveUnusedNodesPass()(model)


def channel_tensors(path: WeightPath, *, quantizer: str) -> tuple[StreamedTensor, StreamedTensor]:
    """Int8 [in, out] and float32 scales [out], quantized when written, in two passes.

    Raises:
        ValueError: when read: NaN or infinity, naming the weight.
    """
    by_output = path.tensor if path.transposed else transposed_tensor(path.tensor)
    by_input = transposed_tensor(path.tensor) if path.transposed else path.tensor
    outputs, inputs = by_output.shape.numpy()
    name, known = path.tensor.name, list[np.ndarray]()

    def scales() -> Iterator[np.ndarray]:
        if not known:
            found = [_scales(rows, quantizer, name) for rows in read_float32_rows(by_output)]
            known.append(np.concatenate(found))
        yield known[0].copy()

    def values() -> Iterator[np.ndarray]:
        (scale,) = scales()
        for rows in read_float32_rows(by_input):
            yield np.clip(np.rint(rows / scale), -_LARGEST, _LARGEST).astype(np.int8)

    return (
        StreamedTensor(
            values, dtype=ir.DataType.INT8, shape=(inputs, outputs), name=f"{name}.int8"
        ),
        StreamedTensor(
            scales, dtype=ir.DataType.FLOAT, shape=(outputs,), name=f"{name}.channel_scales"
        ),
    )


def _scales(rows: np.ndarray, quantizer: str, name: str | None) -> np.ndarray:
    """One scale for each of some rows [rows, in], positive."""
    if not np.isfinite(np.abs(rows).max(initial=0)):
        raise ValueError(
            f"cannot quantize weight {name!r}: it holds a NaN or an infinity: the checkpoint is "
            "damaged"
        )
    blocks = np.ascontiguousarray(rows)[:, None, :]
    find = round_to_nearest if quantizer == "rtn" else search_scales
    scale, _ = find(blocks, bits=8, zero_points=False)
    return np.abs(scale[:, 0])
