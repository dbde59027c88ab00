"""Keep keys and values in 8 bits: a quarter of the memory, and of what attention reads."""

from __future__ import annotations

import re
from collections.abc import MutableSequence

import onnx_ir as ir

from graph_passes.pipeline import graph_pass

_DOMAIN = "ai.sambay"
_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")

# Operators over caches: what takes their place, and where the key stands among inputs and outputs.
# The value follows it, and there the scales of both.
_QUANTIZED: dict[str, tuple[str, int, int | None]] = {
    "AppendKeyValue": ("AppendQuantizedKeyValue", 0, 0),
    "DifferentialAttention": ("QuantizedDifferentialAttention", 3, 1),
    "DifferentialCrossAttention": ("QuantizedDifferentialCrossAttention", 1, None),
}


@graph_pass
def quantize_caches(model: ir.Model) -> None:
    """Make keys and values int8 with a float16 scale for every head and position.

    Every cache gets a further state, such as ``past_key_values.17.key_scale``, shaped like the
    cache without its last axis. Operators over caches are exchanged for those of 8 bits, whose
    bodies must be in the model still: it is as traced.

    Raises:
        ValueError: an operator's body is missing, or a cache is none of the graph's states.
    """
    graph = model.graph
    scales: dict[ir.Value, ir.Value] = {}  # of caches, past and present
    for past in list(graph.inputs):
        if _CACHE.fullmatch(past.name or ""):
            scales[past] = _make_scale(past, ir.Value())
            past.type = ir.TensorType(ir.DataType.INT8)  # a new one: a clone shares its types
    for node in list(graph):
        if node.domain == _DOMAIN and node.op_type in _QUANTIZED:
            if (_DOMAIN, _QUANTIZED[node.op_type][0], "") not in model.functions:
                raise ValueError(
                    f"the model has {node.op_type} and no body of {_QUANTIZED[node.op_type][0]}: "
                    "run quantize_caches first, on the model as traced"
                )
            _exchange(node, scales)
    for values in (graph.inputs, graph.outputs):
        _insert_scales(values, scales)


def _exchange(node: ir.Node, scales: dict[ir.Value, ir.Value]) -> None:
    """Put the operator of 8 bits in a node's place."""
    name, first_input, first_output = _QUANTIZED[node.op_type]
    inputs, outputs, graph = list(node.inputs), list(node.outputs), node.graph
    assert isinstance(graph, ir.Graph)
    caches = inputs[first_input : first_input + 2]
    for cache in caches:
        if cache not in scales:
            raise ValueError(
                f"{node.op_type} reads the cache {cache.name if cache else None!r}, which is no "
                "state of the graph and no present of one: give the model as traced"
            )
    at = first_input + 2
    inputs[at:at] = [scales[cache] for cache in caches if cache is not None]
    written = 0 if first_output is None else 2
    new = ir.node(
        name,
        inputs,
        dict(node.attributes),
        domain=_DOMAIN,
        num_outputs=len(outputs) + written,
    )
    graph.insert_before(node, new)
    for old, replacement in zip(outputs, new.outputs, strict=False):
        replacement.name, replacement.shape, replacement.type = old.name, old.shape, old.type
        old.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for present, scale in zip(
        new.outputs[len(outputs) - written : len(outputs)], new.outputs[len(outputs) :], strict=True
    ):
        scales[present] = _make_scale(present, scale)
        present.type = ir.TensorType(ir.DataType.INT8)


def _make_scale(cache: ir.Value, scale: ir.Value) -> ir.Value:
    scale.name = f"{cache.name}_scale"
    scale.shape = None if cache.shape is None else ir.Shape(list(cache.shape)[:-1])
    scale.type = ir.TensorType(ir.DataType.FLOAT16)
    return scale


def _insert_scales(values: MutableSequence[ir.Value], scales: dict[ir.Value, ir.Value]) -> None:
    """Put the scales of a layer's key and value behind these."""
    for index in reversed(range(len(values))):
        if values[index] in scales and (values[index].name or "").endswith(".value"):
            pair = values[index - 1], values[index]
            values[index + 1 : index + 1] = [scales[cache] for cache in pair]
