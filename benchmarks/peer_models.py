"""Random 4-bit models of Phi-4-mini's shape, for the peers that a package is measured against.

Speed depends on shapes and bytes, not on what the weights say. Weights are written one at a time,
so a model of 2.4 GB takes little memory. Shape: config.json of microsoft/Phi-4-mini-instruct.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

BLOCK = 32  # weights that share a scale, in both formats
ALIGN = 64  # bytes


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention in every layer and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's matrix products."""
        queries = self.heads * self.head_size
        return {
            "qkv": (queries + 2 * self.kv_heads * self.head_size, self.hidden),
            "out": (self.hidden, queries),
            "up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }


PHI_4_MINI = Shape(
    layers=32, hidden=3072, heads=24, kv_heads=8, head_size=128, mlp=8192, vocab=200_064
)
CONTEXT = 1 << 17  # positions the rotary tables cover
ROTARY = 0.75  # share of a head that is rotated


class _Graph:
    """Nodes of one ONNX model; its weights go to the file beside it as they are made."""

    def __init__(self, path: Path) -> None:
        self.data = path.with_suffix(".onnx.data").open("wb")
        self.nodes: list[Any] = []
        self.weights: list[TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(
        self, op: str, inputs: list[str], output: str, domain: str = "", **settings: Any
    ) -> str:
        outputs = [output] if op != "Split" else [f"{output}.0", f"{output}.1"]
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **settings))
        return output

    def weight(self, name: str, array: np.ndarray) -> str:
        self.data.write(b"\0" * (-self.data.tell() % ALIGN))
        tensor = TensorProto(name=name, dims=array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(self.data.name).name, "offset": self.data.tell()}
        for key, value in (place | {"length": array.nbytes}).items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(array.tobytes())
        self.weights.append(tensor)
        return name

    def product(self, x: str, name: str, outputs: int, inputs: int) -> str:
        blocks = inputs // BLOCK
        packed = np.frombuffer(self.rng.bytes(outputs * inputs // 2), np.uint8)
        scales = self.rng.random((outputs, blocks), np.float32) * 0.003 + 0.002
        names = [
            x,
            self.weight(f"{name}.weight", packed.reshape(outputs, blocks, BLOCK // 2)),
            self.weight(f"{name}.scales", scales),
        ]
        sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.add("MatMulNBits", names, name, "com.microsoft", **sizes)

    def norm(self, x: str, name: str, size: int) -> str:
        gain = self.weight(f"{name}.gain", np.ones(size, np.float32))
        return self.add("SimplifiedLayerNormalization", [x, gain], name, axis=-1, epsilon=1e-5)


def write_onnx(path: Path, shape: Shape) -> None:
    """Write the graph ONNX Runtime's own exporter makes: packed products, GroupQueryAttention.

    Inputs: `hidden` float32 [1, tokens, hidden] (embedded tokens; the lookup of a row costs
    nothing), `last` int32 [1] (tokens before this call's last), `total` int32 scalar, and
    `past.N.key`, `past.N.value` float32 [1, kv_heads, room, head_size], which `present.N.*` may
    share. Output: `logits` float32 [1, 1, vocab] of the last token.
    """
    graph = _Graph(path)
    angles = np.outer(
        np.arange(CONTEXT), 1e4 ** -np.linspace(0, 1, _rotated(shape) // 2, endpoint=False)
    )
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        graph.weight(name, table.astype(np.float32))
    graph.weight("final", np.array([-1], np.int64))
    x = "hidden"
    for layer in range(shape.layers):
        x = _layer(graph, x, layer, shape)
    graph.add("Gather", [x, "final"], "x.final", axis=1)
    normed = graph.norm("x.final", "norm", shape.hidden)
    graph.product(normed, "logits", shape.vocab, shape.hidden)
    graph.data.close()
    path.write_bytes(_model(graph, shape).SerializeToString())


def _layer(graph: _Graph, x: str, layer: int, shape: Shape) -> str:
    at, sizes = f"layer{layer}", shape.products
    qkv = graph.product(graph.norm(x, f"{at}.norm1", shape.hidden), f"{at}.qkv", *sizes["qkv"])
    past, present = ([f"{way}.{layer}.{part}" for part in ("key", "value")] for way in WAYS)
    names = [qkv, "", "", *past, "last", "total", "cos", "sin"]
    heads: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            names,
            [f"{at}.attention", *present],
            domain="com.microsoft",
            do_rotary=1,
            **heads,
        )
    )
    out = graph.product(f"{at}.attention", f"{at}.out", *sizes["out"])
    x = graph.add("Add", [x, out], f"{at}.x1")
    up = graph.product(graph.norm(x, f"{at}.norm2", shape.hidden), f"{at}.up", *sizes["up"])
    graph.add("Split", [up], f"{at}.half", axis=-1, num_outputs=2)
    graph.add("Sigmoid", [f"{at}.half.0"], f"{at}.sigmoid")
    graph.add("Mul", [f"{at}.half.0", f"{at}.sigmoid"], f"{at}.silu")
    graph.add("Mul", [f"{at}.silu", f"{at}.half.1"], f"{at}.mlp")
    down = graph.product(f"{at}.mlp", f"{at}.down", *sizes["down"])
    return graph.add("Add", [x, down], f"{at}.x2")


WAYS = ("past", "present")


def _rotated(shape: Shape) -> int:
    return int(shape.head_size * ROTARY)


def _model(graph: _Graph, shape: Shape) -> ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value("hidden", TensorProto.FLOAT, [1, "tokens", shape.hidden])]
    inputs += [value("last", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
    outputs = [value("logits", TensorProto.FLOAT, [1, 1, shape.vocab])]
    for way, values in zip(WAYS, (inputs, outputs), strict=True):
        for layer in range(shape.layers):
            sizes: list[Any] = [1, shape.kv_heads, f"{way}_room", shape.head_size]
            names = [f"{way}.{layer}.{part}" for part in ("key", "value")]
            values.extend(value(name, TensorProto.FLOAT, sizes) for name in names)
    body = helper.make_graph(graph.nodes, "full_attention", inputs, outputs, graph.weights)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=imports, ir_version=10)


F32, Q4_0 = 0, 2  # ggml's types of a tensor
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # GGUF's types of a value


def write_gguf(path: Path, shape: Shape) -> None:
    """Write llama.cpp's form of the same shape: architecture phi3, Q4_0, tied embedding.

    Source: docs/gguf.md of ggml, version 3 of the format.
    """
    rng = np.random.default_rng(0)
    tensors, settings = list(_gguf_tensors(shape)), _gguf_settings(shape)
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings)))
        for key, (kind, value) in settings.items():
            file.write(_text(key) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name, sizes, kind in tensors:
            dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *reversed(sizes))
            file.write(_text(name) + dims + struct.pack("<IQ", kind, offset))
            offset += -(-_nbytes(sizes, kind) // ALIGN) * ALIGN
        for _, sizes, kind in tensors:
            file.write(b"\0" * (-file.tell() % ALIGN))
            file.write(_random(rng, sizes, kind))
        file.write(b"\0" * (-file.tell() % ALIGN))


def _gguf_settings(shape: Shape) -> dict[str, tuple[int, Any]]:
    numbers = {
        "context_length": CONTEXT,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.mlp,
        "block_count": shape.layers,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "rope.dimension_count": _rotated(shape),
        "rope.scaling.original_context_length": CONTEXT,
        "attention.sliding_window": 0,
    }
    return {
        "general.architecture": (STRING, "phi3"),
        "general.alignment": (UINT32, ALIGN),
        "general.file_type": (UINT32, 2),  # mostly Q4_0
        **{f"phi3.{name}": (UINT32, number) for name, number in numbers.items()},
        "phi3.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "phi3.rope.freq_base": (FLOAT32, 1e4),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-4o"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [f"t{i}" for i in range(shape.vocab)])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, [1] * shape.vocab)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["t 1"])),
        "tokenizer.ggml.bos_token_id": (UINT32, 0),
        "tokenizer.ggml.eos_token_id": (UINT32, 1),
    }


def _gguf_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], int]]:
    yield "token_embd.weight", (shape.vocab, shape.hidden), Q4_0
    yield "output_norm.weight", (shape.hidden,), F32
    names = {"qkv": "attn_qkv", "out": "attn_output", "up": "ffn_up", "down": "ffn_down"}
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (shape.hidden,), F32
        for part, sizes in shape.products.items():
            yield f"blk.{layer}.{names[part]}.weight", sizes, Q4_0


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, i) for i in items)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def _nbytes(sizes: tuple[int, ...], kind: int) -> int:
    count = int(np.prod(sizes))
    return 4 * count if kind == F32 else count // BLOCK * (2 + BLOCK // 2)


def _random(rng: np.random.Generator, sizes: tuple[int, ...], kind: int) -> bytes:
    if kind == F32:
        return np.ones(sizes, np.float32).tobytes()
    blocks = np.frombuffer(rng.bytes(_nbytes(sizes, kind)), np.uint8).reshape(-1, 18).copy()
    scales = (rng.random(len(blocks), np.float32) * 0.003 + 0.002).astype(np.float16)
    blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    return bytes(blocks.tobytes())
