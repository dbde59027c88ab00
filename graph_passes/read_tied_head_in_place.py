"""Let the output head read the embedding as it is stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import WeightPath, add_initializer, find_weight, replace_node


@graph_pass
def read_tied_head_in_place(model: ir.Model) -> None:
    """Turn ``MatMul(x, Transpose(weight))`` of a weight with other readers into Gemm(transB=1).

    A runtime would compute the Transpose once, while loading, and keep a second copy: 2.0 GB for
    the published embedding in float32. Gemm reads rows as columns without one. It takes matrices
    only, so x [..., in] is flattened to [rows, in] before it and given its shape back after it.
    """
    graph = model.graph
    for node in list(graph):
        path = find_weight(node.inputs[1]) if node.op_type == "MatMul" else None
        if path is None or not path.transposed or len(path.weight.uses()) < 2:
            continue
        if path.tensor.dtype != ir.DataType.FLOAT:
            raise ValueError(
                f"weight {path.weight.name!r} is {path.tensor.dtype}, expected FLOAT: "
                "list fold_weight_casts before read_tied_head_in_place"
            )
        replace_node(node, _gemm(graph, node.inputs[0], path, node.outputs[0].name))
    common.RemoveUnusedNodesPass()(model)


def _gemm(graph: ir.Graph, x: ir.Value | None, path: WeightPath, name: str | None) -> list[ir.Node]:
    rows, columns = path.tensor.shape.numpy()
    as_rows = add_initializer(graph, ir.Tensor(np.array([-1, columns]), name=f"{name}.as_rows"))
    width = add_initializer(graph, ir.Tensor(np.array([rows]), name=f"{name}.width"))
    flat = ir.node("Reshape", [x, as_rows])
    product = ir.node("Gemm", [flat.outputs[0], path.weight], {"transB": 1})
    leading = ir.node("Shape", [x], {"end": -1})
    shape = ir.node("Concat", [leading.outputs[0], width], {"axis": 0})
    return [
        flat,
        product,
        leading,
        shape,
        ir.node("Reshape", [product.outputs[0], shape.outputs[0]]),
    ]
