"""Keep keys and values in float16: half the memory, and half of what attention reads."""

from __future__ import annotations

import re

import onnx_ir as ir

from graph_passes.pipeline import graph_pass

_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


@graph_pass
def store_caches_in_float16(model: ir.Model) -> None:
    """Declare keys and values float16, those of the shared cache and those of the window rings.

    Their operators take them in any type: they compute in float32 and round what they write. A
    magnitude above 65504 becomes infinite.

    Raises:
        ValueError: something else than an operator of domain ai.sambay reads or writes a cache.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _CACHE.fullmatch(value.name or "") is None or value.dtype != ir.DataType.FLOAT:
            continue
        producer = value.producer()
        for node in (*([] if producer is None else [producer]), *value.consumers()):
            if node.domain != "ai.sambay":
                raise ValueError(
                    f"{node.op_type} has the cache {value.name!r} for input or output, expected "
                    "operators of domain ai.sambay: give the model as traced"
                )
        value.type = ir.TensorType(ir.DataType.FLOAT16)  # a new one: a clone shares its types
