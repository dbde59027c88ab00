"""The graphs that a package holds: one, or what a target cuts its model into."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.pipeline import Pass
from targets.target import Graph, Target

MODEL = "model.onnx"
# What the caller gives, with the states.
_CALL = ("input_ids", "attention_mask", "position_ids")
_PAST = "past_key_values."


def make_graphs(model: ir.Model, target: Target) -> dict[str, ir.Model]:
    """The graphs of a package by the names of their files, in the order they are run.

    Args:
        model: after ``target.passes``; unchanged.
        target: whose passes ran.

    Raises:
        ValueError: a graph reads what no graph before it gives.
    """
    if not target.graphs:
        return {MODEL: model}
    done: dict[tuple[Pass, ...], ir.Model] = {(): model}
    made = {}
    for graph in target.graphs:
        for end, apply in enumerate(graph.passes, start=1):
            if graph.passes[:end] not in done:  # else shared, weights too
                done[graph.passes[:end]] = apply(done[graph.passes[: end - 1]])
        made[file_of(graph)] = done[graph.passes]
    for tokens in {graph.tokens for graph in target.graphs} - {None}:
        _check_call(made, [g for g in target.graphs if g.tokens in (None, tokens)])
    return made


def file_of(graph: Graph) -> str:
    """The name of a graph's file."""
    return f"{graph.name}.onnx"


def _check_call(made: dict[str, ir.Model], graphs: list[Graph]) -> None:
    """What is run in one call must fit together."""
    given: dict[str | None, ir.Value] = {}
    for graph in graphs:
        model = made[file_of(graph)].graph
        for value in model.inputs:
            name = value.name or ""
            if name in _CALL or name.startswith(_PAST):
                continue
            if name not in given or given[name].dtype != value.dtype:
                raise ValueError(
                    f"graph {graph.name!r} reads {name!r} ({value.dtype}), which no graph before "
                    "it gives so: cut it from the graph that the others are cut from"
                )
        given |= {value.name: value for value in model.outputs}
