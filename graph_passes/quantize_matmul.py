"""Store the weights of linear layers in 4 or 8 bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.block_quantization import check_settings, quantized_tensors
from graph_passes.fold_weight_transposes import transposed_tensor
from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import WeightPath, add_initializer, find_weight, replace_node

Rule = tuple[str, int | None]


@graph_pass
def quantize_matmul(
    model: ir.Model,
    *,
    bits: int,
    block_size: int,
    accuracy_level: int = 4,
    rules: Sequence[Rule] = (),
) -> None:
    """Replace ``MatMul(x, weight)`` by com.microsoft.MatMulNBits.

    Args:
        bits: 4 or 8, for every weight that no rule names.
        block_size: neighbours in a row that share a scale.
        accuracy_level: what the runtime computes in; 4 = int8, the only fast one on a CPU.
        rules: (pattern, bits) in order, the first that matches a weight's name decides; bits None
            leaves the weight as it is. Patterns are those of ``fnmatch``, and may hold
            ``{memory_layer}`` and ``{shared_layer}``, the numbers of these layers.

    Raises:
        ValueError: settings no runtime reads, or a rule that matches no weight.
    """
    check_settings(bits, block_size)
    named = _fill_in_layers(model, rules)
    unmatched = {pattern for pattern, _ in named}
    for node in list(model.graph):
        path = find_weight(node.inputs[1]) if node.op_type == "MatMul" else None
        if path is None:
            continue
        matching = [rule for rule in named if fnmatchcase(path.weight.name or "", rule[0])]
        unmatched.difference_update(pattern for pattern, _ in matching)
        chosen = matching[0][1] if matching else bits
        if chosen is not None:
            rows, columns = _size(path)
            packed, scales = _quantized(model.graph, path, chosen, block_size)
            quantized = matmul_nbits(
                node.inputs[0],
                packed,
                scales,
                rows=rows,
                columns=columns,
                bits=chosen,
                block_size=block_size,
                accuracy_level=accuracy_level,
            )
            replace_node(node, [quantized])
    if unmatched:
        raise ValueError(
            f"quantize_matmul: no weight of a linear layer matches {sorted(unmatched)}: "
            "correct the rule or remove it"
        )
    model.opset_imports["com.microsoft"] = 1
    common.RemoveUnusedNodesPass()(model)


def matmul_nbits(
    x: ir.Value | None,
    packed: ir.Value,
    scales: ir.Value,
    *,
    rows: int,
    columns: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> ir.Node:
    """A MatMulNBits node: x [..., columns] times a quantized [rows, columns], transposed."""
    settings = {
        "K": columns,
        "N": rows,
        "bits": bits,
        "block_size": block_size,
        "accuracy_level": accuracy_level,
    }
    return ir.node("MatMulNBits", [x, packed, scales], settings, domain="com.microsoft")


def _fill_in_layers(model: ir.Model, rules: Sequence[Rule]) -> list[Rule]:
    if not any("{" in pattern for pattern, _ in rules):
        return list(rules)
    if "sambay.config" not in model.metadata_props:
        raise ValueError(
            "quantize_matmul: a rule names a layer by its role, but the model has no metadata "
            "'sambay.config' that says which layer that is"
        )
    memory = json.loads(model.metadata_props["sambay.config"])["num_hidden_layers"] // 2
    layers = {"memory_layer": memory, "shared_layer": memory + 1}
    return [(pattern.format(**layers), bits) for pattern, bits in rules]


def _quantized(
    graph: ir.Graph, path: WeightPath, bits: int, block_size: int
) -> tuple[ir.Value, ir.Value]:
    stored = path.tensor if path.transposed else transposed_tensor(path.tensor)
    packed, scales = quantized_tensors(stored, bits=bits, block_size=block_size)
    return add_initializer(graph, packed), add_initializer(graph, scales)


def _size(path: WeightPath) -> tuple[int, int]:
    """Outputs and inputs of the linear layer."""
    first, second = path.tensor.shape.numpy()
    return (first, second) if path.transposed else (second, first)
