"""Bound integers by Max and Min, for runtimes whose Clip of integers is wrong."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.infer_types import fill_in_types
from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import replace_node


@graph_pass
def replace_integer_clip(model: ir.Model) -> None:
    """Replace ``Clip`` of int64 by ``Max``, ``Min`` or both.

    OpenVINO 2025.4 takes a bound that is not given for a number of its own, and returns that.
    """
    fill_in_types(model)
    for node in list(model.graph):
        if node.op_type != "Clip" or node.outputs[0].dtype != ir.DataType.INT64:
            continue
        value, *bounds = node.inputs
        nodes: list[ir.Node] = []
        for op_type, bound in zip(("Max", "Min"), bounds, strict=False):
            if bound is not None:
                nodes.append(ir.node(op_type, [value, bound]))
                value = nodes[-1].outputs[0]
                value.type = ir.TensorType(ir.DataType.INT64)
        if nodes:
            replace_node(node, nodes)
