"""Compute what follows from fixed sizes, for compilers that take nothing else."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from graph_passes.pipeline import graph_pass
from graph_passes.quantize_activations import PAIR

_MOST = 1 << 16  # bytes of a constant: masks and index tables, never a weight


@graph_pass
def fold_shapes(model: ir.Model) -> None:
    """Replace Shape, and the arithmetic on it, by numbers; note every size that follows.

    List it behind fix_dimension and inline_operators. What depends on a size that is still
    symbolic stays.
    """
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            _tell_product(node)
        elif node.op_type in PAIR:
            _tell_same(node)
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=_MOST, output_size_limit=_MOST
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _tell_same(node: ir.Node) -> None:
    """Nor these, in the domain that has them for 16 bits."""
    x, output = node.inputs[0], node.outputs[0]
    if x is not None and output.shape is None:
        output.shape = x.shape


def _tell_product(node: ir.Node) -> None:
    """ONNX does not know the operator, so what stands behind it would stay open."""
    x, output = node.inputs[0], node.outputs[0]
    if x is not None and x.shape is not None:
        output.shape = ir.Shape([*x.shape[:-1], node.attributes.get_int("N")])
