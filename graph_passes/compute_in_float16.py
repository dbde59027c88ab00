"""Compute in float16 what a GPU computes fastest in it, and in float32 what would lose by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.infer_types import fill_in_types
from graph_passes.pipeline import graph_pass
from graph_passes.streamed_tensor import StreamedTensor, read_float32_rows
from graph_passes.weight_path import add_initializer

_HALF, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PRODUCTS = ("Gemm", "MatMul", "MatMulNBits")
_STATES = ("past_key_values.", "present.")
_LARGEST = float(np.finfo(np.float16).max)


@graph_pass
def compute_in_float16(model: ir.Model) -> None:
    """Turn a float32 graph, its operators not yet inlined, into one of mixed precision.

    float16: the embedding, weights of linear layers, what flows between them, convolution states.
    float32: the residual stream and its norms, scan states, everything computed from weights alone
    (lambdas, decay rates), logits; and inside their bodies scan, softmax, pair norm and gate. The
    residual stream costs nothing that counts and cannot overflow. Keys and values stay what they
    are.

    Raises:
        ValueError: a weight is not float32 yet, or (when it is written) too large for float16.
    """
    fill_in_types(model)
    graph = model.graph
    constant = _computed_from_weights(graph)
    _convert_states(graph)
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        if node in constant:
            continue
        wanted = _compute_dtype(node, constant)
        for index, value in enumerate(node.inputs):
            if value is None or not _is_float(value) or value.dtype == wanted:
                continue
            if _stays(node, index, value):
                continue
            key = (value, wanted)
            if key not in converted:
                converted[key] = _convert(graph, value, wanted)
            node.replace_input_with(index, converted[key])
        _set_output_dtypes(node, wanted)
    _widen_outputs(graph)
    common.RemoveUnusedNodesPass()(model)


def _computed_from_weights(graph: ir.Graph) -> set[ir.Node]:
    """Nodes whose result is the same in every call."""
    found: set[ir.Node] = set()
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if all(value.is_initializer() or value.producer() in found for value in sources):
            found.add(node)
    return found


def _convert_states(graph: ir.Graph) -> None:
    for value in [*graph.inputs, *graph.outputs]:
        name = value.name or ""
        if name.startswith(_STATES) and name.endswith(".conv_state") and value.dtype == _WIDE:
            value.type = ir.TensorType(_HALF)


def _compute_dtype(node: ir.Node, constant: set[ir.Node]) -> ir.DataType:
    if node.op_type == "LayerNormalization":
        return _WIDE
    if node.op_type in _PRODUCTS or node.domain == "ai.sambay" or _looks_up_weights(node):
        return _HALF
    moving = [
        value
        for value in node.inputs
        if value is not None
        and _is_float(value)
        and not value.is_initializer()
        and value.producer() not in constant
    ]
    if node.op_type == "Add" and len(moving) == 2:  # the residual stream
        return _WIDE
    return _HALF if any(value.dtype == _HALF for value in moving) else _WIDE


def _looks_up_weights(node: ir.Node) -> bool:
    """The embedding: in float16 the head that is tied to it reads the same bytes."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    return table is not None and table.is_initializer() and _is_float(table)


def _stays(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Whether an input keeps its dtype: our operators take states and their own weights as is."""
    if node.domain != "ai.sambay":
        return False
    weight = value.is_initializer() and node.op_type == "CausalConvWithState"
    return not weight and (
        value.is_initializer()
        or value.is_graph_input()
        or value.is_graph_output()
        or all(source is None or source.is_initializer() for source in _inputs(value))
        or _is_small(value)
    )


def _inputs(value: ir.Value) -> list[ir.Value | None]:
    producer = value.producer()
    return [None] if producer is None else list(producer.inputs)


def _is_small(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (_HALF, _WIDE)


def _convert(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    tensor = value.const_value
    if value.is_initializer() and tensor is not None:
        if tensor.dtype != _WIDE:
            raise ValueError(
                f"weight {value.name!r} is {tensor.dtype}, expected FLOAT: list fold_weight_casts "
                "before compute_in_float16"
            )
        return add_initializer(graph, half_tensor(tensor))
    return add_cast(graph, value, dtype)


def add_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value in another dtype, by a Cast right behind what gives it."""
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return cast.outputs[0]


def half_tensor(source: ir.TensorProtocol) -> ir.TensorProtocol:
    """A weight in float16, named ``{name}.float16``, converted while it is written."""

    def chunks() -> Iterator[np.ndarray]:
        for rows in read_float32_rows(source):
            if (largest := float(np.abs(rows).max(initial=0))) > _LARGEST:
                raise ValueError(
                    f"weight {source.name!r} holds {largest:g}, more than float16 can "
                    f"({_LARGEST:g}): export to a float32 target, such as cpu-int4"
                )
            yield rows.astype(np.float16)

    name, shape = f"{source.name}.float16", source.shape.numpy()
    if not shape:
        return ir.Tensor(source.numpy().astype(np.float16), name=name)
    return StreamedTensor(chunks, dtype=_HALF, shape=shape, name=name)


def _set_output_dtypes(node: ir.Node, wanted: ir.DataType) -> None:
    for output in node.outputs:
        if output.dtype is None and wanted == _HALF:
            output.type = ir.TensorType(_HALF)
        state = (output.name or "").startswith(_STATES)
        if _is_float(output) and output.dtype != wanted and not state and node.op_type != "Cast":
            output.type = ir.TensorType(wanted)


def _widen_outputs(graph: ir.Graph) -> None:
    """Logits and hidden states leave as float32."""
    for output in graph.outputs:
        node = output.producer()
        if node is None or output.dtype != _HALF or (output.name or "").startswith(_STATES):
            continue
        name, output.name = output.name, f"{output.name}.float16"
        cast = ir.node("Cast", [output], {"to": _WIDE})
        new = cast.outputs[0]
        new.name, new.shape, new.type = name, output.shape, ir.TensorType(_WIDE)
        graph.insert_after(node, cast)
        graph.outputs[graph.outputs.index(output)] = new
