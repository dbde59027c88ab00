"""Keep a graph's sizes off the way between processor and device."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graph_passes.pipeline import graph_pass

Scope = ir.Graph | ir.Function
Sizes = dict[ir.Value, int]  # a size and its rank

# Inputs that say a shape: providers read them in the processor's memory.
_SHAPE_INPUTS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
_ELEMENTWISE = ("Add", "Div", "Max", "Min", "Mul", "Sub")
# Of what these make of a size; of Gather it is that of the indices.
_RANKS = {"Concat": 1, "Gather": 0, "Reshape": 1, "Slice": 1, "Squeeze": 0, "Unsqueeze": 1}


@graph_pass
def send_sizes_to_device(model: ir.Model) -> None:
    """Give nodes on a device the sizes they compute with as ``Range(size, size + 1)``.

    Sizes are told and computed on the processor. A node on the device that takes one as a number,
    as a remainder by a ring's capacity does, makes ONNX Runtime copy it over in every call, and
    with such a copy it captures no CUDA graph. Range is told its sizes by the processor and writes
    to the device.

    In the graph and in functions; list it last. Sizes are integers: what is computed of one in
    floats is computed on the device.

    Raises:
        ValueError: a node on the device takes several sizes in one tensor.
    """
    passed: dict[ir.OperatorIdentifier, set[int]] = {}  # inputs of functions that are sizes
    scopes: list[Scope] = [model.graph, *model.functions.values()]
    while True:
        sizes = {scope: _find_sizes(scope, passed) for scope in scopes}
        found = _find_passed(sizes, model)
        if found == passed:
            break
        passed = found
    for scope in scopes:
        for size, rank in sizes[scope].items():
            _send(scope, size, rank, list(_device_readers(size, sizes[scope], passed)))


def _find_sizes(scope: Scope, passed: dict[ir.OperatorIdentifier, set[int]]) -> Sizes:
    sizes: Sizes = {}
    constants: Sizes = {}  # the ranks of what is the same in every call
    if isinstance(scope, ir.Function):
        sizes.update((scope.inputs[i], 1) for i in passed.get(scope.identifier(), ()))
    else:
        told = scope.initializers.values()
        constants.update((value, len(value.shape or ())) for value in told)
    for node in scope:
        sources = [value for value in node.inputs if value is not None]
        if node.op_type in ("Shape", "Size"):
            sizes[node.outputs[0]] = 1 if node.op_type == "Shape" else 0
        elif node.op_type == "Constant":
            constants[node.outputs[0]] = _constant_rank(node)
        elif all(value in constants for value in sources):
            constants[node.outputs[0]] = _rank(node, constants)
        elif all(value in constants or value in sizes for value in sources):
            # A node that is told a size as a shape computes on the device.
            shapes = _SHAPE_INPUTS.get(node.op_type, ())
            computed = node.op_type in _RANKS or node.op_type in _ELEMENTWISE
            if computed and not any(value in sizes for value in _at(node, shapes)):
                sizes[node.outputs[0]] = _rank(node, constants | sizes)
    return sizes


def _at(node: ir.Node, indices: tuple[int, ...]) -> list[ir.Value | None]:
    return [node.inputs[index] for index in indices if index < len(node.inputs)]


def _rank(node: ir.Node, ranks: Sizes) -> int:
    sources = [ranks[value] for value in node.inputs if value is not None]
    if node.op_type == "Gather":
        return sources[1]
    return _RANKS.get(node.op_type, max(sources, default=0))


def _constant_rank(node: ir.Node) -> int:
    if "value" in node.attributes:
        return len(node.attributes["value"].as_tensor().shape)
    return 0 if node.attributes.keys() & {"value_int", "value_float"} else 1


def _find_passed(
    sizes: dict[Scope, Sizes], model: ir.Model
) -> dict[ir.OperatorIdentifier, set[int]]:
    """Inputs of functions that are a size in every call."""
    found: dict[ir.OperatorIdentifier, set[int]] = {}
    for scope, known in sizes.items():
        for node in scope:
            if (called := node.op_identifier()) in model.functions:
                told = {index for index, value in enumerate(node.inputs) if value in known}
                found[called] = found.get(called, told) & told
    return {called: told for called, told in found.items() if told}


def _device_readers(
    size: ir.Value, sizes: Sizes, passed: dict[ir.OperatorIdentifier, set[int]]
) -> Iterator[tuple[ir.Node, int]]:
    for node, index in size.uses():
        told = passed.get(node.op_identifier(), _SHAPE_INPUTS.get(node.op_type, ()))
        if index not in told and node.outputs[0] not in sizes and node.op_type != "Shape":
            yield node, index


def _send(scope: Scope, size: ir.Value, rank: int, readers: list[tuple[ir.Node, int]]) -> None:
    if not readers:
        return
    maker = size.producer()
    if maker is not None and (maker.op_type == "Concat" or _tells_several(maker)):
        raise ValueError(
            f"send_sizes_to_device: {readers[0][0].op_type} computes with {size.name!r}, which "
            "holds several sizes; take them apart before"
        )
    one = ir.node("Constant", [], {"value_int": 1})
    scalar = ir.node("Squeeze", [size])
    end = ir.node("Add", [scalar.outputs[0], one.outputs[0]])
    copy = ir.node("Range", [scalar.outputs[0], end.outputs[0], one.outputs[0]])
    made = [one, scalar, end, copy]
    if rank == 0:
        made.append(ir.node("Squeeze", [copy.outputs[0]]))
    first = min((node for node, _ in readers), key=list(scope).index)
    scope.insert_before(first, made)
    for number, node in enumerate(made):
        node.outputs[0].name = f"{size.name}.{number}.on_device"
    for node, index in readers:
        node.replace_input_with(index, made[-1].outputs[0])


def _tells_several(node: ir.Node) -> bool:
    if node.op_type != "Shape":
        return False
    begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 30)
    return end - begin != 1
