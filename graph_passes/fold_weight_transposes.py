"""Store weights the way MatMul reads them, so that no Transpose is left to run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass
from graph_passes.streamed_tensor import StreamedTensor, release, rows_per_chunk
from graph_passes.weight_path import add_initializer

# Fewest columns read at once: 64 bytes, what memory hands out, hold up to 32 neighbours of a row.
_COLUMNS = 64


@graph_pass
def fold_weight_transposes(model: ir.Model) -> None:
    """Replace ``Transpose(weight)`` of a matrix by a weight that is stored transposed.

    A weight with a second reader keeps its Transpose. The tied embedding is one: folding it
    would store it twice, 2.0 GB more in float32.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or len(weight.uses()) > 1:
            continue
        if len(weight.const_value.shape) != 2:
            continue
        folded = add_initializer(graph, transposed_tensor(weight.const_value))
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)


def transposed_tensor(source: ir.TensorProtocol) -> StreamedTensor:
    """The transpose of a matrix, named ``{name}.transposed``, read when it is written."""
    rows, columns = source.shape.numpy()

    def chunks() -> Iterator[np.ndarray]:
        matrix = source.numpy()
        step = max(_COLUMNS, rows_per_chunk((columns, rows)))
        try:
            for start in range(0, columns, step):
                yield matrix[:, start : start + step].T.copy()
        finally:
            del matrix
            release(source)

    return StreamedTensor(
        chunks, dtype=source.dtype, shape=(columns, rows), name=f"{source.name}.transposed"
    )
