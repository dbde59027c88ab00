"""Say what quantized products may be computed in."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.pipeline import graph_pass


@graph_pass
def set_accuracy_level(model: ir.Model, *, level: int) -> None:
    """Set the attribute of every com.microsoft.MatMulNBits.

    Args:
        level: 4 allows int8, the only fast one on a CPU; 0 allows nothing narrower than the inputs.

    Raises:
        ValueError: no such level.
    """
    if level not in range(5):
        raise ValueError(f"set_accuracy_level: level is {level}, expected 0 to 4")
    for node in model.graph:
        if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits"):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
