"""Store the embedding, and the output head that is tied to it, once, in 4 or 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from graph_passes.block_quantization import count_blocks, quantized_tensors
from graph_passes.pipeline import graph_pass
from graph_passes.quantize_matmul import find_linear_layers, matmul_nbits
from graph_passes.recipe import WeightFormat
from graph_passes.weight_path import add_initializer, replace_node

HEAD = "lm_head.weight"  # a head of its own, where a checkpoint has one


@graph_pass
def quantize_embedding(
    model: ir.Model,
    *,
    bits: int,
    block_size: int,
    quantizer: str = "search",
    scale_type: str = "float32",
    accuracy_level: int = 4,
) -> None:
    """Quantize the embedding and the output head.

    The embedding becomes com.microsoft.GatherBlockQuantized and the head MatMulNBits; a tied head
    reads the embedding's very tensors. A width that is no multiple of block_size is filled up with
    zeros in the file and cut after the Gather.

    Args:
        bits, block_size: see ``WeightFormat``. No zero points: the two operators pack them
            differently.
        quantizer: "rtn" or "search".
        scale_type: see ``WeightFormat``.
        accuracy_level: as in ``quantize_matmul``.

    Raises:
        ValueError: settings no runtime reads, or a model without an embedding.
    """
    form = WeightFormat(
        bits=bits, block_size=block_size, quantizer=quantizer, scale_type=scale_type
    )
    if quantizer == "gptq":
        raise ValueError(
            "quantize_embedding: quantizer 'gptq' makes up for errors in a sum over inputs, and an "
            "embedding is looked up: take 'search'"
        )
    graph = model.graph
    embeddings = [node for node in graph if _is_embedding(node)]
    if not embeddings:
        raise ValueError("quantize_embedding: no Gather of rows of a weight: not a SambaY model")
    tables = {node.inputs[0].name for node in embeddings if node.inputs[0] is not None} | {HEAD}
    for node, path in find_linear_layers(model):
        if path.transposed and path.weight.name in tables:
            quantized = quantized_tensors(path.tensor, form)
            replace_node(node, matmul_nbits(graph, node, path, form, quantized, accuracy_level))
    for node in embeddings:
        _replace_gather(graph, node, form)
    model.opset_imports["com.microsoft"] = 1
    common.RemoveUnusedNodesPass()(model)


def _is_embedding(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    table = node.inputs[0]
    if table is None or table.const_value is None or len(table.const_value.shape) != 2:
        return False
    return table.const_value.dtype.is_floating_point()


def _replace_gather(graph: ir.Graph, node: ir.Node, form: WeightFormat) -> None:
    ids, table = node.inputs[1], node.inputs[0].const_value  # type: ignore[union-attr]
    assert table is not None
    quantized = quantized_tensors(table, form)
    packed = add_initializer(graph, quantized.packed)
    scales = add_initializer(graph, quantized.scales)
    width = table.shape.numpy()[1]
    filled = count_blocks(width, form.block_size) * form.block_size

    def constant(name: str, *numbers: int) -> ir.Value:
        tensor = ir.Tensor(np.array(numbers, np.int64), name=f"{table.name}.{name}")
        return add_initializer(graph, tensor)

    # The Gather wants its scales in the shape of its blocks, and in the type of what it gives; the
    # head wants them flat. A runtime folds this Cast and this Unsqueeze while loading.
    casts = []
    if form.scale_type == "float16":
        casts.append(ir.node("Cast", [scales], {"to": ir.DataType.FLOAT}))
        scales = casts[0].outputs[0]
    aligned = ir.node("Unsqueeze", [scales, constant("last_axis", 2)])
    gathered = ir.node(  # [batch, tokens, blocks, block_size]
        "GatherBlockQuantized",
        [packed, ids, aligned.outputs[0]],
        {
            "gather_axis": 0,
            "quantize_axis": 2,
            "block_size": form.block_size,
            "bits": form.bits,
        },
        domain="com.microsoft",
    )
    rows = ir.node("Reshape", [gathered.outputs[0], constant("row_shape", 0, 0, filled)])
    nodes = [*casts, aligned, gathered, rows]
    if filled != width:
        limits = [constant("row_start", 0), constant("row_stop", width), constant("last_axis", 2)]
        nodes.append(ir.node("Slice", [rows.outputs[0], *limits]))
    replace_node(node, nodes)
    embedded = nodes[-1].outputs[0]
    embedded.type = ir.TensorType(ir.DataType.FLOAT)
    for cast, _ in list(embedded.uses()):  # from the dtype the checkpoint stored
        if cast.op_type == "Cast" and cast.attributes.get_int("to") == ir.DataType.FLOAT:
            cast.outputs[0].replace_all_uses_with(embedded, replace_graph_outputs=True)
            graph.remove(cast, safe=True)
