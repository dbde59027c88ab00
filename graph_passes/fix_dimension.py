"""Give a symbolic dimension its size."""

from __future__ import annotations

import json

import onnx_ir as ir

from graph_passes.pipeline import graph_pass


@graph_pass
def fix_dimension(model: ir.Model, *, name: str, size: int | str) -> None:
    """Replace a dimension's name by a number wherever it stands in a shape.

    Args:
        name: such as "batch".
        size: what a runtime must then give; a name is that of a size in metadata
            ``sambay.config``, such as "sliding_window".

    Raises:
        ValueError: no input has a dimension of that name, or size is below 1.
    """
    if isinstance(size, str):
        size = int(json.loads(model.metadata_props["sambay.config"])[size])
    if size < 1:
        raise ValueError(f"fix_dimension: {name!r} cannot be {size}, expected 1 or more")
    graph = model.graph
    if not any(name in _names(value) for value in graph.inputs):
        raise ValueError(f"fix_dimension: no input has a dimension {name!r}")
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if name in _names(value):
            assert value.shape is not None
            value.shape = ir.Shape(
                [
                    size if isinstance(d, ir.SymbolicDim) and d.value == name else d
                    for d in value.shape
                ]
            )


def _names(value: ir.Value) -> set[str | None]:
    if value.shape is None:
        return set()
    return {size.value for size in value.shape if isinstance(size, ir.SymbolicDim)}
