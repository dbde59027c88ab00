"""Declare an older operator set, for providers without kernels of the newest versions."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graph_passes.pipeline import graph_pass

# Newer versions of these only admit further types or modes, none of which we use.
_WIDENED = (
    *("Cast", "CastLike", "Constant", "ConstantOfShape", "Equal", "Identity", "Pad"),
    *("ReduceMax", "ReduceMin", "Reshape", "ScatterND", "Shape"),
)


@graph_pass
def lower_opset(model: ir.Model, *, version: int) -> None:
    """Declare an operator set that means the same for every node, in graph and functions.

    ONNX Runtime matches a kernel whose registration is open-ended only by the exact version in
    which an operator last changed. A provider that has ReduceMax of version 18 runs no ReduceMax
    of version 20, though they are the same for numbers.

    Args:
        version: of the domain of ONNX itself.

    Raises:
        ValueError: an operator does not exist in that version, or means something else.
    """
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in ir.traversal.RecursiveGraphIterator(scope):
            if node.domain == "":
                _check(node, scope.opset_imports[""], version)
        scope.opset_imports[""] = version


def _check(node: ir.Node, declared: int, version: int) -> None:
    new = onnx.defs.get_schema(node.op_type, declared, "")
    try:
        old = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        old = None
    same = old is not None and old.since_version == new.since_version
    widened = (
        old is not None
        and node.op_type in _WIDENED
        and set(node.attributes) <= set(old.attributes)
        and old.min_input <= len(node.inputs) <= old.max_input
    )
    if not same and not widened:
        raise ValueError(
            f"lower_opset: {node.op_type} of version {new.since_version} does not exist in "
            f"opset {version} as it is used in {node.name or 'the graph'}"
        )
