"""Cut a graph where its sizes begin to grow, for compilers that take fixed sizes only."""

from __future__ import annotations

import json

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.pipeline import graph_pass

PARTS = ("tokens", "fixed", "growing")
_CALL = ("input_ids", "attention_mask")
_DOMAIN = "ai.sambay"
_FIRST = ("LayerNormalization", "QuantizeLinear")  # that read the embedding


@graph_pass
def keep_part(model: ir.Model, *, part: str) -> None:
    """Keep one of three graphs that, run one after the other, are the whole.

    tokens: the embedding, positions and masks; from ids and mask alone, so it follows ``total``.
    fixed: layers 0..M, keys and values of layer M+1; sizes depend on the tokens of the call only.
    growing: attention over the shared cache and all behind it; its sizes follow ``capacity``.

    What a part reads of an earlier one becomes its input, under the name it has in the whole, and
    an output of that one. What weights alone give is computed in every part that reads it.

    Args:
        part: one of PARTS. List the pass behind fix_dimension and fold_shapes where a size is to
            be fixed. "growing" may have operators of ours, the others have inlined ones.

    Raises:
        ValueError: there is no such part, or an operator's body is not in its place yet.
    """
    if part not in PARTS:
        raise ValueError(f"keep_part: part is {part!r}, expected one of {', '.join(PARTS)}")
    graph = model.graph
    places = find_parts(model)
    if part != "growing":
        ours = {n.op_type for n in graph if n.domain == _DOMAIN and places.get(n) != "growing"}
        if ours:
            raise ValueError(
                f"keep_part: part {part!r} has operators of ours ({', '.join(sorted(ours))}): "
                "list inline_operators before"
            )
    inputs, outputs = _boundary(graph, places, part)
    graph.outputs[:] = outputs
    graph.inputs[:] = [_as_input(value) for value in inputs]
    graph.remove([node for node in graph if places.get(node, part) != part], safe=True)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _as_input(value: ir.Value) -> ir.Value:
    """What an earlier part computes, to be given instead."""
    if value.producer() is None:
        return value
    given = ir.Value(name=value.name, shape=value.shape, type=value.type)
    value.name = None
    value.replace_all_uses_with(given)
    return given


def find_parts(model: ir.Model) -> dict[ir.Node, str]:
    """The part of every node, one of PARTS; none for what is computed from weights alone."""
    layers = json.loads(model.metadata_props["sambay.config"])["num_hidden_layers"]
    shared = f"past_key_values.{layers // 2 + 1}."
    places: dict[ir.Node, str] = {}
    for node in model.graph:
        sources = {_source(value, places, shared) for value in node.inputs if value is not None}
        sources.discard(None)
        if "growing" in sources:
            places[node] = "growing"
        elif "fixed" in sources or (sources and node.op_type in _FIRST):
            places[node] = "fixed"
        elif sources:
            places[node] = "tokens"
    return places


def _source(value: ir.Value, places: dict[ir.Node, str], shared: str) -> str | None:
    producer = value.producer()
    if producer is not None:
        return places.get(producer)
    if not value.is_graph_input():
        return None
    name = value.name or ""
    if name in _CALL:
        return "tokens"
    return "growing" if name.startswith(shared) else "fixed"


def _boundary(
    graph: ir.Graph, places: dict[ir.Node, str], part: str
) -> tuple[list[ir.Value], list[ir.Value]]:
    """What a part reads from outside, and what others or the caller read of it; in order."""
    inputs: dict[ir.Value, None] = {}
    outputs: dict[ir.Value, None] = {}
    for node in graph:
        here = places.get(node) == part
        for value in node.inputs if here else ():
            producer = None if value is None else value.producer()
            if value is None or value.is_initializer() or (producer and producer not in places):
                continue
            if producer is None or places[producer] != part:
                inputs[value] = None
        for value in node.outputs if here else ():
            readers = {places.get(use.node) for use in value.uses()}
            if value.is_graph_output() or readers - {part, None}:
                outputs[value] = None
    return list(inputs), list(outputs)
