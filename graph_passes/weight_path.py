"""Where the second factor of a MatMul comes from: a weight, and what is done to it on the way."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class WeightPath:
    """A linear layer's weight.

    Attributes:
        weight: the initializer.
        tensor: its data, two-dimensional, as stored.
        transposed: a Transpose stands between, so the weight is stored [out, in].
    """

    weight: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool


def find_weight(factor: ir.Value | None) -> WeightPath | None:
    """Follow Cast and Transpose back from a factor of a MatMul.

    Returns:
        None where the factor is computed, or its weight is not a matrix.
    """
    transposed = False
    while factor is not None and (node := factor.producer()) is not None:
        if node.op_type == "Transpose":
            transposed = not transposed
        elif node.op_type != "Cast":
            return None
        factor = node.inputs[0]
    if factor is None or factor.const_value is None or len(factor.const_value.shape) != 2:
        return None
    return WeightPath(weight=factor, tensor=factor.const_value, transposed=transposed)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Put a tensor into the graph under its own name; one that is there already is shared."""
    name = tensor.name
    if not name:
        raise ValueError(f"a tensor of shape {tensor.shape} has no name to be stored under")
    if name not in graph.initializers:
        graph.register_initializer(
            ir.Value(
                name=name,
                shape=tensor.shape,  # type: ignore[arg-type]
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    return graph.initializers[name]


def replace_node(node: ir.Node, replacement: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's only output takes over name and readers."""
    old, new, graph = node.outputs[0], replacement[-1].outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(node, replacement)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
