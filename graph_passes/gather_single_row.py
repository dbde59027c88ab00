"""Gather without batch dimensions, for providers whose GatherND has none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import add_initializer


@graph_pass
def gather_single_row(model: ir.Model) -> None:
    """Turn ``GatherND(x [1, S, ...], index [1, K, 1], batch_dims=1)`` into ``Gather`` on axis 1.

    List it behind fix_dimension(name="batch", size=1) and inline_operators.

    Raises:
        ValueError: a GatherND with a batch dimension has more rows than one, or other indices.
    """
    graph = model.graph
    columns: dict[ir.Value, ir.Value] = {}  # one for all readers of an index
    for node in list(graph):
        if node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) == 0:
            continue
        x, index = node.inputs
        assert x is not None
        assert index is not None
        for value, rank, axis in ((x, None, 0), (index, 3, 0), (index, 3, 2)):
            shape = value.shape
            if shape is None or len(shape) != (rank or len(shape)) or shape[axis] != 1:
                raise ValueError(
                    f"gather_single_row: {value.name!r} of {node.name or 'a GatherND'} is {shape}, "
                    "expected one row and indices [1, K, 1]: list fix_dimension before"
                )
        if index not in columns:
            columns[index] = _column(graph, node, index)
        gather = ir.node("Gather", [x, columns[index]], {"axis": 1})
        graph.insert_before(node, gather)
        _take_over(node.outputs[0], gather.outputs[0])
        graph.remove(node, safe=True)


def _column(graph: ir.Graph, reader: ir.Node, index: ir.Value) -> ir.Value:
    """An index [1, K, 1] as [K], computed before its first reader."""
    flat = ir.tensor(np.array([-1], np.int64), name="gather_single_row.flat")
    node = ir.node("Reshape", [index, add_initializer(graph, flat)])
    column = node.outputs[0]
    column.name, column.type = f"{index.name}.column", index.type
    column.shape = ir.Shape([index.shape[1]])  # type: ignore[index]
    graph.insert_before(reader, node)
    return column


def _take_over(old: ir.Value, new: ir.Value) -> None:
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
