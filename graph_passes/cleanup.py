"""Remove what a trace leaves behind and nobody reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass


@graph_pass
def cleanup(model: ir.Model) -> None:
    """Drop unused nodes, weights, functions and opsets; compute equal things once.

    Notes of the tracer (source files and lines) go too: they name folders of the exporting
    machine. Inputs, outputs and the model's own metadata stay.
    """
    for apply in (
        common.ClearMetadataAndDocStringPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        apply(model)
