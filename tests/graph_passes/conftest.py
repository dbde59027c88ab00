"""A small model in the shape of a traced one, with its weights in a file."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
VOCABULARY, INNER, LAYERS = 40, 96, 4

GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "ai.sambay" : 1]>
traced (int64[batch,tokens] input_ids,
        float[batch,{inner}] "past_key_values.0.recurrent_state"{weights})
    => (float[batch,1,{vocabulary}] logits, float[batch,{inner}] "present.0.recurrent_state")
{{
    axis = Constant <value_ints = [1]> ()
    again = Constant <value_ints = [1]> ()
    unread = Relu ("past_key_values.0.recurrent_state")
    rows = Gather ("model.embed_tokens.weight", input_ids)
    embedded = {cast} (rows)
    fc1_wide = {cast} ("model.layers.0.mlp.fc1.weight")
    fc1 = Transpose <perm = [1, 0]> (fc1_wide)
    inside = MatMul (embedded, fc1)
    bias = {cast} ("model.layers.0.attn.D")
    biased = Add (inside, bias)
    gated = ai.sambay.GatedMemoryUnit (biased, inside)
    x_wide = {cast} ("model.layers.1.attn.x_proj.weight")
    x_proj = Transpose <perm = [1, 0]> (x_wide)
    mixed = MatMul (gated, x_proj)
    upper_wide = {cast} ("model.layers.3.attn.Wqkv.weight.rows_0_32")
    upper = Transpose <perm = [1, 0]> (upper_wide)
    lower_wide = {cast} ("model.layers.3.attn.Wqkv.weight.rows_32_96")
    lower = Transpose <perm = [1, 0]> (lower_wide)
    queries = MatMul (mixed, upper)
    keys = MatMul (mixed, lower)
    both = Concat <axis = -1> (queries, keys)
    out_wide = {cast} ("model.layers.2.attn.out_proj.weight")
    out = Transpose <perm = [1, 0]> (out_wide)
    hidden = MatMul (both, out)
    pooled = ReduceMean <keepdims = 1> (hidden, axis)
    summed = ReduceMean <keepdims = 0> (both, again)
    "present.0.recurrent_state" = Add ("past_key_values.0.recurrent_state", summed)
    head_wide = {cast} ("{head}")
    head = Transpose <perm = [1, 0]> (head_wide)
    logits = MatMul (pooled, head)
}}
<domain: "ai.sambay", opset_import: ["" : 20]>
GatedMemoryUnit (gate, memory) => (output)
{{
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    output = Mul (silu, memory)
}}
<domain: "ai.sambay", opset_import: ["" : 20]>
Unused (x) => (y)
{{
    y = Identity (x)
}}
"""


@pytest.fixture
def traced(tmp_path: Path) -> Callable[..., ir.Model]:
    """Make a model as traced: ``traced(dtype, tied=True, hidden=64)``."""

    def make(
        dtype: ir.DataType = ir.DataType.BFLOAT16, *, tied: bool = True, hidden: int = 64
    ) -> ir.Model:
        shapes = {
            "model.embed_tokens.weight": (VOCABULARY, hidden),
            "model.layers.0.mlp.fc1.weight": (INNER, hidden),
            "model.layers.0.attn.D": (INNER,),
            "model.layers.1.attn.x_proj.weight": (hidden, INNER),
            "model.layers.3.attn.Wqkv.weight.rows_0_32": (32, hidden),
            "model.layers.3.attn.Wqkv.weight.rows_32_96": (INNER - 32, hidden),
            "model.layers.2.attn.out_proj.weight": (hidden, INNER),
        } | ({} if tied else {"lm_head.weight": (VOCABULARY, hidden)})
        rng, path, offset = np.random.default_rng(7), tmp_path / "weights", 0
        tensors = []
        with path.open("wb") as file:
            for name, shape in shapes.items():
                weight = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(DTYPES[dtype])
                length = file.write(weight.tobytes())
                tensors.append(
                    ir.ExternalTensor(path, offset, length, dtype, shape=ir.Shape(shape), name=name)
                )
                offset += length
        text = GRAPH.format(
            cast="Identity" if dtype == ir.DataType.FLOAT else "Cast <to = 1>",
            head="model.embed_tokens.weight" if tied else "lm_head.weight",
            inner=INNER,
            vocabulary=VOCABULARY,
            weights="".join(
                f', {dtype.name.lower()}[{",".join(map(str, shape))}] "{name}"'
                for name, shape in shapes.items()
            ),
        )
        model = ir.from_onnx_text(text)
        for tensor in tensors:
            weight = next(value for value in model.graph.inputs if value.name == tensor.name)
            model.graph.inputs.remove(weight)
            weight.const_value = tensor
            model.graph.register_initializer(weight)
        model.metadata_props["sambay.config"] = json.dumps({"num_hidden_layers": LAYERS})
        model.metadata_props["sambay.version"] = "1"
        for node in model.graph:
            node.metadata_props["pkg.torch.onnx.stack_trace"] = str(tmp_path)
        return model

    return make


def run(model: ir.Model, seed: int = 0, *, as_written: bool = False) -> dict[str, np.ndarray]:
    """Outputs by name of one call in ONNX Runtime, on inputs that depend on the seed.

    Args:
        as_written: no optimizations: they may compute a dequantized MatMul in int8.
    """
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(with_weights_inside(model)).SerializeToString(), options
    )
    rng = np.random.default_rng(seed)
    inputs = {
        "input_ids": rng.integers(0, VOCABULARY, (2, 5)),
        "past_key_values.0.recurrent_state": rng.standard_normal((2, INNER), np.float32),
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def with_weights_inside(model: ir.Model) -> ir.Model:
    model = model.clone()
    for value in model.graph.initializers.values():
        value.const_value = ir.Tensor(
            np.array(value.const_value.numpy()), dtype=value.dtype, name=value.name
        )
    return model


@pytest.fixture
def serialize() -> Callable[[ir.Model], bytes]:
    return lambda model: ir.to_proto(with_weights_inside(model)).SerializeToString()


@pytest.fixture
def run_model() -> Callable[..., dict[str, np.ndarray]]:
    return run
