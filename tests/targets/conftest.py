"""A small model with what every recipe expects: embedding, layers 0 to 3, a tied head."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_ids": [2, 1],
    "pad_token_id": None,
    "context_length": 4096,
}
WEIGHTS = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.attn.x_proj.weight": (64, 64),
    "model.layers.0.attn.D": (64,),
    "model.layers.1.attn.dt_proj.weight": (64, 64),
    "model.layers.1.mlp.fc1.weight": (96, 64),
    "model.layers.2.attn.in_proj.weight": (96, 96),
    "model.layers.3.attn.Wqkv.weight": (64, 96),
}


@pytest.fixture
def traced(tmp_path: Path) -> Callable[..., ir.Model]:
    """Make a model as traced, weights in bfloat16 in ``tmp_path / "checkpoint"``."""

    def make() -> ir.Model:
        rng, path, offset = np.random.default_rng(7), tmp_path / "checkpoint", 0
        path.write_bytes(b"")
        ids = value("input_ids", ir.DataType.INT64, ("batch", "tokens"))
        graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 20}, name="sambay")
        wide: dict[str, ir.Value] = {}
        for name, shape in WEIGHTS.items():
            array = (rng.standard_normal(shape) / 8).astype(ml_dtypes.bfloat16)
            with path.open("ab") as file:
                length = file.write(array.tobytes())
            weight = value(name, ir.DataType.BFLOAT16, shape)
            weight.const_value = ir.ExternalTensor(
                path, offset, length, ir.DataType.BFLOAT16, shape=ir.Shape(shape), name=name
            )
            graph.register_initializer(weight)
            offset += length
            wide[name] = weight
        add = node_adder(graph)
        hidden = add("Cast", add("Gather", wide["model.embed_tokens.weight"], ids), to=1)
        for name in list(WEIGHTS)[1:]:
            converted = add("Cast", wide[name], to=1)
            if len(WEIGHTS[name]) == 1:
                hidden = add("Add", hidden, converted)
            else:
                hidden = add("MatMul", hidden, add("Transpose", converted, perm=[1, 0]))
        table = add("Cast", wide["model.embed_tokens.weight"], to=1)
        logits = add("MatMul", hidden, add("Transpose", table, perm=[1, 0]))
        logits.name, logits.shape = "logits", ir.Shape(["batch", "tokens", 40])
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(logits)
        for node in graph:
            node.metadata_props["pkg.torch.onnx.stack_trace"] = str(tmp_path / "model.py")
        metadata = {"sambay.version": "1", "sambay.config": json.dumps(CONFIG)}
        return ir.Model(graph, ir_version=10, metadata_props=metadata)

    return make


def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def node_adder(graph: ir.Graph) -> Callable[..., ir.Value]:
    def add(op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        graph.append(node)
        return node.outputs[0]

    return add
