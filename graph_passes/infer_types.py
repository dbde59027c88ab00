"""Fill in the dtypes and shapes that follow from a graph's inputs and weights."""

from __future__ import annotations

import contextlib
import logging

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass


@graph_pass
def infer_types(model: ir.Model) -> None:
    """Note on every value what follows; what stands behind unknown operators stays open.

    Raises:
        ValueError: the graph contradicts itself.
    """
    fill_in_types(model)


def fill_in_types(model: ir.Model) -> None:
    """As the pass, in place: for passes that need the types."""
    _infer(model)
    opened = [node for node in model.graph if node.op_type in _LIKE and _tell_like(node)]
    if opened:
        _infer(model)


# Operators that ONNX does not know, and the input whose dtype their output has.
_LIKE = {"MatMulNBits": 0, "GatherBlockQuantized": 2}


def _tell_like(node: ir.Node) -> bool:
    output, like = node.outputs[0], node.inputs[_LIKE[node.op_type]]
    if output.dtype is not None or like is None or like.dtype is None:
        return False
    output.type = ir.TensorType(like.dtype)
    return True


def _infer(model: ir.Model) -> None:
    told: list[str] = []
    with _listening(told):
        common.ShapeInferencePass()(model)
    if told:
        raise ValueError(f"the graph contradicts itself: {told[0]}")


@contextlib.contextmanager
def _listening(told: list[str]):  # type: ignore[no-untyped-def]
    """Collect what the library logs instead of raising."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            told.append(" ".join(str(cause or record.getMessage()).split()))

    logger, handler = logging.getLogger("onnx_ir"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
