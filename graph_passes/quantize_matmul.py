"""Store the weights of linear layers in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.block_quantization import QuantizedTensors, quantized_tensors
from graph_passes.error_compensation import Calibration
from graph_passes.fold_weight_transposes import transposed_tensor
from graph_passes.pipeline import graph_pass
from graph_passes.recipe import Rule, WeightFormat, choose_formats
from graph_passes.weight_path import WeightPath, add_initializer, find_weight, replace_node


@graph_pass
def quantize_matmul(
    model: ir.Model,
    *,
    bits: int,
    block_size: int,
    zero_points: bool = False,
    quantizer: str = "search",
    scale_type: str = "float32",
    accuracy_level: int = 4,
    rules: Sequence[Rule] = (),
    exact: Sequence[str] = (),
    calibration: Mapping[str, Calibration] | None = None,
) -> None:
    """Replace ``MatMul(x, weight)`` by com.microsoft.MatMulNBits.

    Args:
        bits, block_size, zero_points, quantizer, scale_type: of every weight that no rule names,
            see ``WeightFormat``.
        accuracy_level: what the runtime computes in; 4 = int8, the only fast one on a CPU.
        rules: (pattern, storage) in order, the first that matches a weight's name decides; storage
            is a ``WeightFormat``, other bits, or None, which leaves the weight as it is. Patterns
            are those of ``fnmatch``, and may hold ``{memory_layer}`` and ``{shared_layer}``, the
            numbers of these layers.
        exact: patterns of weights whose products are computed in float32 (accuracy_level 1).
        calibration: of the layers' inputs, by name of the weight; "gptq" needs it.

    Raises:
        ValueError: settings no runtime reads, a rule that matches no weight, or "gptq" for a
            weight whose inputs are not known.
    """
    default = WeightFormat(
        bits=bits,
        block_size=block_size,
        zero_points=zero_points,
        quantizer=quantizer,
        scale_type=scale_type,
    )
    layers = find_linear_layers(model)
    names = dict.fromkeys(path.weight.name or "" for _, path in layers)
    chosen = choose_formats(model, names, default, rules)
    for node, path in layers:
        name = path.weight.name or ""
        form = chosen[name]
        if form is None:
            continue
        stored = path.tensor if path.transposed else transposed_tensor(path.tensor)
        known = None if calibration is None else calibration.get(name)
        quantized = quantized_tensors(stored, form, known)
        level = 1 if any(fnmatchcase(name, pattern) for pattern in exact) else accuracy_level
        replace_node(node, matmul_nbits(model.graph, node, path, form, quantized, level))
    model.opset_imports["com.microsoft"] = 1
    common.RemoveUnusedNodesPass()(model)


def find_linear_layers(model: ir.Model) -> list[tuple[ir.Node, WeightPath]]:
    """Every MatMul by a weight, in the order of the graph."""
    found = []
    for node in model.graph:
        path = find_weight(node.inputs[1]) if node.op_type == "MatMul" else None
        if path is not None:
            found.append((node, path))
    return found


def matmul_nbits(
    graph: ir.Graph,
    node: ir.Node,
    path: WeightPath,
    form: WeightFormat,
    quantized: QuantizedTensors,
    accuracy_level: int,
) -> list[ir.Node]:
    """A MatMulNBits for a MatMul; its weights are put into the graph, once for all readers.

    Before it stands a Cast to float32 where its scales are float16.
    """
    rows, columns = _size(path)
    tensors = [quantized.packed, quantized.scales]
    if quantized.zero_points is not None:
        tensors.append(quantized.zero_points)
    settings = {
        "K": columns,
        "N": rows,
        "bits": form.bits,
        "block_size": form.block_size,
        "accuracy_level": accuracy_level,
    }
    stored = [add_initializer(graph, tensor) for tensor in tensors]
    casts = []
    if form.scale_type == "float16":
        casts.append(ir.node("Cast", [stored[1]], {"to": ir.DataType.FLOAT}))
        stored[1] = casts[0].outputs[0]
    inputs = [node.inputs[0], *stored]
    return [*casts, ir.node("MatMulNBits", inputs, settings, domain="com.microsoft")]


def _size(path: WeightPath) -> tuple[int, int]:
    """Outputs and inputs of the linear layer."""
    first, second = path.tensor.shape.numpy()
    return (first, second) if path.transposed else (second, first)
