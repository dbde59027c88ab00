"""Whether ONNX Runtime can capture a model's calls as a CUDA graph.

It refuses a model with control flow, and one in which a tensor goes from the processor to the
device or back in mid-graph. Sizes are told on the processor, and what is computed of sizes alone
stays there: that is no hindrance as long as nodes on the device are told them as shapes only.

Source: placement as in core/framework/fallback_cpu_capability.cc, copies as in
core/optimizer/transformer_memcpy.cc, of ONNX Runtime 1.31.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # never placed on the processor for its sizes

Kernels = Mapping[str, Mapping[str, Any]]


def find_hindrances(
    nodes: Sequence[ir.Node], *, kernels: Kernels, without: Collection[ir.Node]
) -> list[str]:
    """What keeps calls from being captured; empty: nothing.

    Args:
        nodes: of the graph in their order, but those that compute from weights alone.
        kernels: of the provider by operator; ``host_inputs`` and ``host_outputs`` are the indices
            of what they take and give in the processor's memory.
        without: the nodes among them that the provider has no kernel for.

    Returns:
        One line each, which begins with a node's name.
    """
    flow = [
        f"{_name(node)}: control flow"
        for node in nodes
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _own(node))
    ]
    on_host = {*without, *_place_on_host(nodes, kernels, without)}
    taken: dict[bool, dict[ir.Value, ir.Node]] = {True: {}, False: {}}  # on the host; its reader
    given: dict[bool, list[ir.Value]] = {True: [], False: []}
    known = set(nodes)
    for node in nodes:
        host_inputs, host_outputs = _host_indices(node, kernels, node in on_host)
        for index, value in enumerate(node.inputs):
            if value is not None and (value.is_graph_input() or value.producer() in known):
                taken[index in host_inputs].setdefault(value, node)
        for index, value in enumerate(node.outputs):
            given[index in host_outputs].append(value)
    both = [value for value in taken[True] if value.is_graph_input() and value in taken[False]]
    return [
        *flow,
        *(f"{_name(taken[True][v])}: takes {v.name} on the host, others do not" for v in both),
        *(
            f"{_name(taken[not host][value])}: {value.name} is copied to the {place}"
            for host, place in ((True, "device"), (False, "host"))
            for value in given[host]
            if value in taken[not host]
        ),
    ]


def _place_on_host(
    nodes: Sequence[ir.Node], kernels: Kernels, without: Collection[ir.Node]
) -> set[ir.Node]:
    """Nodes with kernels that ONNX Runtime places on the processor, for they read its tensors."""
    order = {node: index for index, node in enumerate(nodes)}
    host: set[ir.Value] = set()
    queue: list[int] = []

    def tell(node: ir.Node, outputs: Collection[int]) -> None:
        for value in (node.outputs[index] for index in outputs):
            host.add(value)
            for reader in value.consumers():
                if reader in order:
                    heapq.heappush(queue, order[reader])

    for node in nodes:
        tell(node, _host_indices(node, kernels, node in without)[1])
    placed: set[ir.Node] = set()
    seen: set[int] = set()
    while queue:
        index = heapq.heappop(queue)
        node = nodes[index]
        if index in seen or node in without:
            continue
        seen.add(index)
        if all(_may_be_on_host(*each, host, order, kernels) for each in _inputs(node)):
            placed.add(node)
            tell(node, range(len(node.outputs)))
    return placed


def _may_be_on_host(
    node: ir.Node,
    index: int,
    value: ir.Value,
    host: set[ir.Value],
    order: Mapping[ir.Node, int],
    kernels: Kernels,
) -> bool:
    if value.dtype in _HALF:
        return False
    if value.is_graph_input() or value.producer() not in order:  # or a weight
        return True
    return value in host and index not in _host_indices(node, kernels, False)[0]


def _inputs(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    for index, value in enumerate(node.inputs):
        if value is not None:
            yield node, index, value


def _host_indices(
    node: ir.Node, kernels: Kernels, on_host: bool
) -> tuple[Collection[int], Collection[int]]:
    """Indices of the inputs and of the outputs that are in the processor's memory."""
    if on_host:
        return range(len(node.inputs)), range(len(node.outputs))
    kernel = kernels.get(f"{node.domain}.{node.op_type}" if node.domain else node.op_type, {})
    return kernel.get("host_inputs", ()), kernel.get("host_outputs", ())


def _own(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _name(node: ir.Node) -> str:
    return f"{node.name or node.outputs[0].name} ({node.op_type})"
