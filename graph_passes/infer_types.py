"""Fill in the dtypes and shapes that follow from a graph's inputs and weights."""

from __future__ import annotations

import contextlib
import logging

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass


@graph_pass
def infer_types(model: ir.Model) -> None:
    """Note on every value what ONNX can infer; what stands behind unknown operators stays open.

    Raises:
        ValueError: the graph contradicts itself.
    """
    fill_in_types(model)


def fill_in_types(model: ir.Model) -> None:
    """As the pass, in place: for passes that need the types."""
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
