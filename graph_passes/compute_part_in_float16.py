"""Compute one part of a graph in float16 throughout, for processors that have nothing wider."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.compute_in_float16 import add_cast, half_tensor
from graph_passes.infer_types import fill_in_types
from graph_passes.keep_part import find_parts
from graph_passes.pipeline import graph_pass
from graph_passes.quantize_activations import is_integer
from graph_passes.weight_path import add_initializer

_HALF, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float16).max)
_CONSTANT = 1 << 10  # bytes; a smaller tensor in memory may be a number of a body, such as -1e30


@graph_pass
def compute_part_in_float16(model: ir.Model, *, part: str) -> None:
    """Turn every float32 of a part into float16, residual stream, norms, softmax and scan too.

    Convolution states become float16. Other states and what other parts give or take keep their
    dtypes: what comes in is narrowed where it is computed, what goes out is widened here. What
    weights alone give is computed as before, then narrowed. Pairs of ``quantize_activations`` and
    what stands between them stay float32 in form: these numbers are integers.

    Args:
        part: one of ``keep_part.PARTS``. List the pass behind inline_operators.
    """
    fill_in_types(model)
    graph = model.graph
    here = [node for node, place in find_parts(model).items() if place == part]
    nodes = [node for node in here if not is_integer(node)]
    inside = set(nodes)
    for value in (*graph.inputs, *graph.outputs):
        if (value.name or "").endswith(".conv_state") and value.dtype == _WIDE:
            value.type = ir.TensorType(_HALF)
    narrowed: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, given in enumerate(node.inputs):
            if given is None or given.dtype != _WIDE or given.producer() in inside:
                continue
            if given not in narrowed:
                narrowed[given] = _narrow(graph, given)
            node.replace_input_with(index, narrowed[given])
    for node in nodes:
        if node.op_type == "Cast" and node.attributes.get_int("to") == _WIDE:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
        for output in node.outputs:
            if output.dtype == _WIDE:
                output.type = ir.TensorType(_HALF)
                _widen_outside(graph, output, inside)
    _remove_idle_casts(nodes)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _narrow(graph: ir.Graph, value: ir.Value) -> ir.Value:
    tensor = value.const_value
    if value.is_initializer() and tensor is not None:
        if isinstance(tensor, ir.Tensor) and tensor.nbytes < _CONSTANT:
            numbers = np.clip(tensor.numpy(), -_LARGEST, _LARGEST).astype(np.float16)
            return add_initializer(graph, ir.Tensor(numbers, name=f"{value.name}.float16"))
        return add_initializer(graph, half_tensor(tensor))
    narrow = add_cast(graph, value, _HALF)
    narrow.name = f"{value.name}.float16"
    return narrow


def _widen_outside(graph: ir.Graph, value: ir.Value, inside: set[ir.Node]) -> None:
    """Give other parts, and the caller, the value in float32 and under its name."""
    readers = [use for use in value.uses() if use.node not in inside]
    if not readers and not value.is_graph_output():
        return
    wide, name = add_cast(graph, value, _WIDE), value.name
    value.name = f"{name}.float16"
    wide.name = name
    for use in readers:
        use.node.replace_input_with(use.idx, wide)
    if value.is_graph_output():
        graph.outputs[graph.outputs.index(value)] = wide


def _remove_idle_casts(nodes: list[ir.Node]) -> None:
    for node in nodes:
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or source is None or source.dtype != output.dtype:
            continue
        if not output.is_graph_output():
            output.replace_all_uses_with(source)
