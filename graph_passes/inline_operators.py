"""Put the bodies of operators in their place, for providers that have no kernels of ours."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.infer_types import fill_in_types
from graph_passes.pipeline import graph_pass


@graph_pass
def inline_operators(model: ir.Model, *, keep: tuple[str, ...] = ()) -> None:
    """Replace every node that has a function body by that body; no other function is left.

    ``CastLike`` becomes ``Cast``, or nothing where the dtype is that already.

    Args:
        keep: operators that stay, for a part of the graph whose provider has kernels for them.

    Raises:
        ValueError: an operator of our domain has no body in the model.
    """
    common.InlinePass(lambda function: function.name not in keep)(model)
    left = {node.op_type for node in model.graph if node.domain == "ai.sambay"} - set(keep)
    if left:
        raise ValueError(f"inline_operators: {sorted(left)} have no body in the model")
    fill_in_types(model)
    for node in list(model.graph):
        if node.op_type == "CastLike" and node.domain == "":
            _resolve(node)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _resolve(node: ir.Node) -> None:
    value, like = node.inputs
    assert value is not None
    assert like is not None
    assert isinstance(node.graph, ir.Graph)
    if value.dtype is None or like.dtype is None:
        raise ValueError(
            f"inline_operators: the dtype of {value.name!r} or {like.name!r} is unknown"
        )
    output = node.outputs[0]
    if value.dtype == like.dtype and not (output.is_graph_output() and value.is_graph_output()):
        replacement = ir.node("Identity", [value])
    else:
        replacement = ir.node("Cast", [value], {"to": like.dtype})
    new = replacement.outputs[0]
    new.name, new.shape, new.type = output.name, output.shape, ir.TensorType(like.dtype)
    node.graph.insert_before(node, replacement)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
