"""Look embeddings up with standard operators, for providers without GatherBlockQuantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import add_initializer, replace_node


@graph_pass
def unpack_embedding(model: ir.Model) -> None:
    """Replace com.microsoft.GatherBlockQuantized of 8-bit rows by Gather, Cast, Sub and Mul.

    The packed rows stay as they are, so the output head still reads the same bytes: only the rows
    of this call's tokens are unpacked.

    Raises:
        ValueError: the rows are not of 8 bits, or the graph has no such node.
    """
    graph = model.graph
    found = [node for node in graph if node.op_type == "GatherBlockQuantized"]
    if not found:
        raise ValueError(
            "unpack_embedding: no GatherBlockQuantized in the graph: list quantize_embedding before"
        )
    for node in found:
        bits = node.attributes.get_int("bits", 4)
        if bits != 8:
            raise ValueError(
                f"unpack_embedding: {node.name or node.op_type} has {bits} bits, not 8"
            )
        packed, ids, scales = node.inputs[:3]
        middle = add_initializer(graph, ir.Tensor(np.float32(128), name="unpack_embedding.middle"))
        rows = ir.node("Gather", [packed, ids], {"axis": 0})  # [batch, tokens, blocks, block_size]
        numbers = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        centred = ir.node("Sub", [numbers.outputs[0], middle])
        steps = ir.node("Gather", [scales, ids], {"axis": 0})  # [batch, tokens, blocks, 1]
        product = ir.node("Mul", [centred.outputs[0], steps.outputs[0]])
        for made in (numbers, centred, steps, product):
            made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        replace_node(node, [rows, numbers, centred, steps, product])
        product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
