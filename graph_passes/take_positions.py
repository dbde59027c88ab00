"""Take positions that nothing reads, so that a caller who counts them wrongly is found out."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.pipeline import graph_pass


@graph_pass
def take_positions(model: ir.Model, *, tokens: int) -> None:
    """Declare an input ``position_ids`` [1, tokens] int64; what it holds does not matter.

    ONNX Runtime GenAI gives its pipelines a mask for the first prompt and for single tokens. For
    a later prompt of several tokens it adds one token to the mask, which no graph can tell from
    a single token; but it gives as few positions, and their number is checked against this shape.
    """
    positions = ir.Value(
        name="position_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, tokens])
    )
    model.graph.inputs.append(positions)
