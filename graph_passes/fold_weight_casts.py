"""Store weights in float32, so that no Cast of a weight is left to run."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.pipeline import graph_pass
from graph_passes.streamed_tensor import StreamedTensor, read_float32_rows

# They move numbers and compute none, so converting before them or after them is the same.
_MOVES = ("Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


@graph_pass
def fold_weight_casts(model: ir.Model) -> None:
    """Replace a float16 or bfloat16 weight that is only read through Casts to float32.

    The embedding's Cast stands behind its Gather: it is folded, too. A weight that anything reads
    in its stored dtype stays as it is.
    """
    for weight in list(model.graph.initializers.values()):
        fold_casts_of(model.graph, weight)


def fold_casts_of(graph: ir.Graph, weight: ir.Value) -> None:
    """The same for one weight."""
    source = weight.const_value
    if source is None or source.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return
    moved: list[ir.Value] = [weight]
    casts = _find_casts(weight, moved)
    if not casts:
        return
    weight.const_value = _in_float32(source)
    for value in moved:  # a clone shares its types, so changing one would show through
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for cast in casts:
        converted = cast.inputs[0]
        assert converted is not None
        cast.outputs[0].replace_all_uses_with(converted)
        graph.remove(cast, safe=True)


def _find_casts(value: ir.Value, moved: list[ir.Value]) -> list[ir.Node] | None:
    """Casts to float32 that all reading ends in; None where some of it does not."""
    if value.is_graph_output():
        return None
    casts: list[ir.Node] = []
    for node, index in value.uses():
        if node.op_type == "Cast" and not node.outputs[0].is_graph_output():
            if node.attributes.get_int("to") != ir.DataType.FLOAT:
                return None
            casts.append(node)
        elif node.op_type in _MOVES and node.domain == "" and index == 0:
            moved.append(node.outputs[0])
            if (further := _find_casts(node.outputs[0], moved)) is None:
                return None
            casts += further
        else:
            return None
    return casts


def _in_float32(source: ir.TensorProtocol) -> ir.TensorProtocol:
    return StreamedTensor(
        lambda: read_float32_rows(source),
        dtype=ir.DataType.FLOAT,
        shape=source.shape.numpy(),
        name=source.name or "",
    )
