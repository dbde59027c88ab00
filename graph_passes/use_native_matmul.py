"""Let quantized products run on the project's own kernel where there is one."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.pipeline import graph_pass

_DOMAIN, _NAME, _CONTRIB = "ai.sambay", "MatMulNBits", "com.microsoft"
_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
_BLOCK_SIZES = (32, 64, 128, 256)  # that the kernel reads


@graph_pass
def use_native_matmul(model: ir.Model) -> None:
    """Replace com.microsoft.MatMulNBits by ai.sambay.MatMulNBits, whose body is the former.

    Inputs and attributes are the same, but that scales may be float16: a Cast before them moves
    into the body. Its kernel reads weights where the file has them, so loading costs neither time
    nor a second copy; a runtime without it runs the body, as if nothing had changed. Products with
    zero points, a bias or blocks of 16 stay.
    """
    own = [node for node in model.graph if _fits(node)]
    for node in own:
        node.domain = _DOMAIN
        cast = node.inputs[2].producer() if node.inputs[2] is not None else None
        if cast is not None and cast.op_type == "Cast":
            node.replace_input_with(2, cast.inputs[0])
            if not cast.outputs[0].uses():
                model.graph.remove(cast, safe=True)
    if own:
        model.opset_imports[_DOMAIN] = 1
        body = _body(model.opset_imports[""])
        model.functions[body.identifier()] = body


def _fits(node: ir.Node) -> bool:
    return (
        (node.domain, node.op_type, len(node.inputs)) == (_CONTRIB, _NAME, 3)
        and set(_ATTRIBUTES) <= set(node.attributes)
        and node.attributes.get_int("block_size") in _BLOCK_SIZES
    )


def _body(opset: int) -> ir.Function:
    inputs = [ir.Value(name=name) for name in ("A", "B", "scales")]
    cast = ir.node("Cast", [inputs[2]], {"to": ir.DataType.FLOAT})
    node = ir.Node(
        _CONTRIB,
        _NAME,
        [*inputs[:2], cast.outputs[0]],
        [ir.RefAttr(name, name, ir.AttributeType.INT) for name in _ATTRIBUTES],
        outputs=[ir.Value(name="Y")],
    )
    cast.outputs[0].name = "scales_float32"
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[cast, node],
        opset_imports={"": opset, _CONTRIB: 1},
        name=_NAME,
    )
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in _ATTRIBUTES]
    return ir.Function(_DOMAIN, _NAME, graph=graph, attributes=attributes)
