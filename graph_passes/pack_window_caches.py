"""Carry the keys and values of window layers behind the convolution states, as one state."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import add_initializer

_CONV = re.compile(r"past_key_values\.(\d+)\.conv_state")


@graph_pass
def pack_window_caches(model: ir.Model) -> None:
    """Make ``conv_state`` [1, E, K-1 + R] of a layer hold the rings of the window layer behind it.

    The last K-1 inputs of the convolution come first, then key and value [Hk, window, D] of layer
    i+1, R = 2 * Hk * window * D / E. The last layer with such a state has no window layer behind
    it: its R columns stay zeros. A runtime that gives every cache of keys and values the length of
    the text, and takes states of one shape (ONNX Runtime GenAI's pipeline of decoders), then keeps
    windows as short as they are. List it behind fix_dimension of "batch" and "window".

    Raises:
        ValueError: windows of different sizes, of another dtype than the convolution states, or
            that do not fill columns of E.
    """
    graph = model.graph
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    convs = {int(m.group(1)): v for name, v in inputs.items() if (m := _CONV.fullmatch(name))}
    rings = {i: _ring(inputs, i + 1) for i in convs}
    columns = {_columns(convs[i], ring) for i, ring in rings.items() if ring}
    if len(columns) != 1:
        raise ValueError(
            f"pack_window_caches: windows take {sorted(columns)} columns, not one size"
        )
    (size,) = columns
    for i, conv in convs.items():
        tail = _unpack(graph, conv, rings[i], size)
        taps = outputs[f"present.{i}.conv_state"]
        ring = [outputs[f"present.{i + 1}.{kind}"] for kind in ("key", "value") if rings[i]]
        _pack(graph, taps, ring, tail)


def _ring(inputs: dict[str, ir.Value], layer: int) -> list[ir.Value]:
    """Key and value of a window layer; none where the layer has none, or one that grows."""
    found = [inputs.get(f"past_key_values.{layer}.{kind}") for kind in ("key", "value")]
    return [value for value in found if value and value.shape and value.shape.is_static()]


def _columns(conv: ir.Value, ring: list[ir.Value]) -> int:
    numbers = sum(int(np.prod(_sizes(value))) for value in ring)
    inner = _sizes(conv)[1]
    if numbers % inner:
        raise ValueError(
            f"pack_window_caches: windows of {numbers} numbers do not fill columns of {inner} "
            "channels: choose a cpu target for this checkpoint"
        )
    if {value.dtype for value in ring} != {conv.dtype}:
        raise ValueError(
            f"pack_window_caches: {ring[0].name} is {ring[0].dtype}, {conv.name} {conv.dtype}: "
            "choose caches of float16"
        )
    return numbers // inner


def _unpack(graph: ir.Graph, conv: ir.Value, ring: list[ir.Value], size: int) -> ir.Value:
    """Exchange the inputs; the columns behind the taps."""
    batch, inner, taps = _sizes(conv)
    packed = _value(conv.name, (batch, inner, taps + size), conv)
    graph.inputs[graph.inputs.index(conv)] = packed
    lengths = _numbers(graph, [taps, size])
    split = ir.node("Split", [packed, lengths], {"axis": 2}, num_outputs=2)
    _describe(split, [(f"{conv.name}.taps", _sizes(conv)), (f"{conv.name}.rest", (1, inner, size))])
    made = [split]
    conv.replace_all_uses_with(split.outputs[0])
    if ring:
        _, *shape = _sizes(ring[0])
        both = ir.node("Reshape", [split.outputs[1], _numbers(graph, [2, *shape])])
        _describe(both, [(f"{conv.name}.rings", (2, *shape))])
        apart = ir.node("Split", [both.outputs[0]], {"axis": 0, "num_outputs": 2}, num_outputs=2)
        _describe(apart, [(f"{value.name}.ring", (1, *shape)) for value in ring])
        made += [both, apart]
        for old, new in zip(ring, apart.outputs, strict=True):
            old.replace_all_uses_with(new)
            graph.inputs.remove(old)
    for node in made:
        for output in node.outputs:
            output.type = conv.type
    graph.insert_before(graph[0], made)
    return split.outputs[1]


def _pack(graph: ir.Graph, taps: ir.Value, ring: list[ir.Value], rest: ir.Value) -> None:
    """Exchange the outputs; of a layer without rings the rest is what came in."""
    made = []
    if ring:
        _, *shape = _sizes(ring[0])
        both = ir.node("Concat", ring, {"axis": 0})
        _describe(both, [(f"{taps.name}.rings", (2, *shape))])
        flat = ir.node("Reshape", [both.outputs[0], _numbers(graph, list(_sizes(rest)))])
        _describe(flat, [(f"{taps.name}.rest", _sizes(rest))])
        made, rest = [both, flat], flat.outputs[0]
        for value in ring:
            graph.outputs.remove(value)
            value.name = f"{value.name}.ring"
    whole = ir.node("Concat", [taps, rest], {"axis": 2})
    batch, inner, kept = _sizes(taps)
    _describe(whole, [(taps.name, (batch, inner, kept + _sizes(rest)[2]))])
    graph.outputs[graph.outputs.index(taps)] = whole.outputs[0]
    taps.name = f"{taps.name}.taps"
    for node in (*made, whole):
        node.outputs[0].type = taps.type
    graph.extend([*made, whole])


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


def _value(name: str | None, shape: tuple[int, ...], like: ir.Value) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=like.type)


def _describe(node: ir.Node, outputs: list[tuple[str | None, tuple[int, ...]]]) -> None:
    for output, (name, shape) in zip(node.outputs, outputs, strict=True):
        output.name, output.shape = name, ir.Shape(shape)


def _numbers(graph: ir.Graph, values: list[int]) -> ir.Value:
    name = "pack_window_caches." + "_".join(map(str, values))
    return add_initializer(graph, ir.tensor(np.array(values, np.int64), name=name))
