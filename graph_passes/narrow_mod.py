"""Compute remainders in 32 bits, for providers whose Mod takes no 64-bit integers."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.infer_types import fill_in_types
from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import replace_node


@graph_pass
def narrow_mod(model: ir.Model) -> None:
    """Put ``Mod`` of int64 between Casts to int32 and back; list it after inline_operators.

    Exact: what is divided are positions and slots, far below 2^31.
    """
    fill_in_types(model)
    for node in list(model.graph):
        if node.op_type != "Mod" or node.outputs[0].dtype != ir.DataType.INT64:
            continue
        casts = [ir.node("Cast", [value], {"to": ir.DataType.INT32}) for value in node.inputs]
        remainder = ir.node("Mod", [cast.outputs[0] for cast in casts])
        back = ir.node("Cast", [remainder.outputs[0]], {"to": ir.DataType.INT64})
        for made in (*casts, remainder):
            made.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        replace_node(node, [*casts, remainder, back])
