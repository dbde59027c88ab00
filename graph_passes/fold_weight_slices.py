"""Store parts of a weight as weights, so that no Slice of a weight is left to run.

The full attention layer reads the query rows and the key/value rows of one stored matrix in
different places of the graph.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import add_initializer


@graph_pass
def fold_weight_slices(model: ir.Model) -> None:
    """Replace ``Slice(weight)`` along the rows by a weight ``{name}.rows_{start}_{stop}``.

    No byte is read: where the weight stands in a file, its rows are a smaller piece of that file.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Slice" else None
        if (
            weight is None
            or weight.const_value is None
            or (rows := _rows(node, weight.const_value)) is None
        ):
            continue
        part = add_initializer(graph, _cut(weight.const_value, rows))
        node.outputs[0].replace_all_uses_with(part)
        graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)


def _rows(node: ir.Node, weight: ir.TensorProtocol) -> range | None:
    """The rows a Slice takes; None where it does anything else."""
    settings = []
    for value in node.inputs[1:]:
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or tensor.size != 1:
            return None
        settings.append(int(tensor.numpy().reshape(-1)[0]))
    start, stop, axis, step = settings + [0, 1][len(settings) - 2 :]  # axis and step may lack
    shape = weight.shape.numpy()
    if axis not in (0, -len(shape)) or step != 1:
        return None
    return range(*slice(start, stop).indices(shape[0]))


def _cut(source: ir.TensorProtocol, rows: range) -> ir.TensorProtocol:
    shape = source.shape.numpy()
    name = f"{source.name}.rows_{rows.start}_{rows.stop}"
    if not isinstance(source, ir.ExternalTensor):
        return ir.Tensor(source.numpy()[rows.start : rows.stop], name=name, dtype=source.dtype)
    row_bytes = source.nbytes // shape[0]
    return ir.ExternalTensor(
        source.location,
        (source.offset or 0) + rows.start * row_bytes,
        len(rows) * row_bytes,
        source.dtype,
        shape=ir.Shape([len(rows), *shape[1:]]),
        name=name,
        base_dir=source.base_dir,
    )
