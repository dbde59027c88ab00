"""Passes that make a graph fit a provider: same numbers, other operators."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from export.ops import append_key_value, differential_attention, selective_scan
from export.ops.custom_op import CustomOp
from graph_passes.cleanup import cleanup
from graph_passes.compute_in_float16 import compute_in_float16, half_tensor
from graph_passes.fix_dimension import fix_dimension
from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.fold_weight_transposes import fold_weight_transposes
from graph_passes.infer_types import infer_types
from graph_passes.inline_operators import inline_operators
from graph_passes.lower_opset import lower_opset
from graph_passes.narrow_mod import narrow_mod
from graph_passes.pack_window_caches import pack_window_caches
from graph_passes.pipeline import Pass, describe_pass, run_passes
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.read_tied_head_in_place import read_tied_head_in_place
from graph_passes.replace_integer_clip import replace_integer_clip
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.replace_scatter import replace_scatter
from graph_passes.send_sizes_to_device import send_sizes_to_device
from graph_passes.unpack_embedding import unpack_embedding

DTYPES = {torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64}


def model_of(op: CustomOp, tensors: tuple[torch.Tensor, ...], attributes: dict) -> ir.Model:
    """A model of one node of an operator and its body; sizes are not told, as in a trace."""
    inputs = [
        ir.Value(
            name=f"in_{i}",
            type=ir.TensorType(DTYPES[tensor.dtype]),
            shape=ir.Shape([f"d{i}_{axis}" for axis in range(tensor.ndim)]),
        )
        for i, tensor in enumerate(tensors)
    ]
    count = len(op.body.function_ir.outputs)
    node = ir.node(op.name, inputs, attributes, domain="ai.sambay", num_outputs=count)
    for i, output in enumerate(node.outputs):
        output.name, output.type = f"out_{i}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], opset_imports={"": 20, "ai.sambay": 1}, name="one"
    )
    return ir.Model(graph, ir_version=10, functions=tuple(op.functions()))


def outputs_of(model: ir.Model, tensors: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {f"in_{i}": tensor.numpy() for i, tensor in enumerate(tensors)})


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize(
    ("op", "apply"),
    [
        (selective_scan.OP, partial(replace_scan_loop, max_tokens=16)),
        (selective_scan.OP, partial(replace_scan_loop, max_tokens=16, softplus="polynomial")),
        (differential_attention.OP, partial(inline_operators, keep=("DifferentialAttention",))),
        (append_key_value.OP, replace_scatter),
        (differential_attention.OP, replace_scatter),
        (differential_attention.OP, partial(run_passes, passes=(inline_operators, narrow_mod))),
        (differential_attention.OP, partial(lower_opset, version=18)),
        (differential_attention.OP, send_sizes_to_device),
        (append_key_value.OP, send_sizes_to_device),
    ],
    ids=lambda value: getattr(value, "name", None) or describe_pass(value),
)
def test_a_body_computes_what_the_one_before_it_computed(op: CustomOp, apply: Pass) -> None:
    torch.manual_seed(3)
    sample = op.sample()
    model = model_of(op, sample.tensors, sample.attributes)
    expected = outputs_of(model, sample.tensors)
    result = apply(model)
    for changed in (result, inline_operators(result)):
        for actual, wanted in zip(outputs_of(changed, sample.tensors), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 60.0])
def test_the_scan_without_a_loop_is_right_for_slow_and_for_fast_decays(
    tokens: int, scale: float
) -> None:
    rng = torch.Generator().manual_seed(tokens)
    batch, channels, states = 2, 5, 4

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    tensors = (
        *(random(batch, tokens, channels), random(batch, tokens, channels) * scale),
        *(random(channels), -torch.rand((channels, states), generator=rng) * 16),
        *(random(batch, tokens, states), random(batch, tokens, states)),
        *(random(channels), random(batch, channels, states)),
        torch.tensor([tokens, tokens // 2]),
    )
    model = model_of(selective_scan.OP, tensors, {})
    for softplus in ("operator", "polynomial"):
        flat = replace_scan_loop(model, max_tokens=16, softplus=softplus)
        assert flat.metadata_props["sambay.max_tokens"] == "16"
        for actual, wanted in zip(
            outputs_of(flat, tensors), outputs_of(model, tensors), strict=True
        ):
            np.testing.assert_allclose(actual, wanted, atol=3e-6 * max(1, scale), rtol=1e-5)


@pytest.mark.parametrize("changes", [{"max_tokens": 12}, {"max_tokens": 0}, {"softplus": "log"}])
def test_settings_of_the_scan_are_checked(changes: dict) -> None:
    sample = selective_scan.OP.sample()
    model = model_of(selective_scan.OP, sample.tensors, {})
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        replace_scan_loop(model, **({"max_tokens": 8} | changes))


def test_no_scatter_no_scan_no_function_and_no_wide_mod_are_left() -> None:
    sample = differential_attention.OP.sample()
    model = model_of(differential_attention.OP, sample.tensors, sample.attributes)
    flat = narrow_mod(inline_operators(replace_scatter(model)))
    assert not operators(flat) & {"ScatterND", "CastLike", "DifferentialAttention"}
    assert not flat.functions
    mods = [node for node in infer_types(flat).graph if node.op_type == "Mod"]
    assert mods
    assert {node.outputs[0].dtype for node in mods} == {ir.DataType.INT32}


def test_an_operator_without_a_body_cannot_be_inlined() -> None:
    sample = append_key_value.OP.sample()
    model = model_of(append_key_value.OP, sample.tensors, {})
    model.functions.clear()
    with pytest.raises(ValueError, match="AppendKeyValue"):
        inline_operators(model)


def test_an_operator_that_is_younger_than_the_opset_is_refused() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Gelu", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    with pytest.raises(ValueError, match="Gelu of version 20"):
        lower_opset(ir.Model(graph, ir_version=10), version=18)


def test_a_dimension_is_fixed_everywhere_or_refused(traced: Callable[..., ir.Model]) -> None:
    fixed = fix_dimension(traced(), name="batch", size=1)
    for value in (*fixed.graph.inputs, *fixed.graph.outputs):
        assert value.shape is not None
        assert value.shape[0] == 1
    with pytest.raises(ValueError, match="no input has a dimension 'rows'"):
        fix_dimension(traced(), name="rows", size=1)
    with pytest.raises(ValueError, match="'batch' cannot be 0"):
        fix_dimension(traced(), name="batch", size=0)


def test_an_unpacked_embedding_is_the_same_and_stands_once(
    traced: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    packed = quantize_embedding(traced(hidden=72), bits=8, block_size=32)
    unpacked = unpack_embedding(packed)
    assert "GatherBlockQuantized" not in operators(unpacked)
    table = unpacked.graph.initializers["model.embed_tokens.weight.packed"]
    assert {node.op_type for node, _ in table.uses()} == {"Gather", "MatMulNBits"}
    for name, value in run_model(packed).items():
        np.testing.assert_allclose(run_model(unpacked)[name], value, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="no GatherBlockQuantized"):
        unpack_embedding(unpacked)


def test_float16_is_near_and_leaves_logits_and_scan_states_alone(
    traced: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    wide = fold_weight_casts(traced())
    half = compute_in_float16(wide)
    for name, value in run_model(wide).items():
        actual = run_model(half)[name]
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, value, atol=0.02, err_msg=name)
    weights = {value.dtype for value in half.graph.initializers.values()}
    assert ir.DataType.FLOAT16 in weights
    assert compute_in_float16(half).graph.num_nodes() == half.graph.num_nodes()


def test_an_embedding_and_the_head_tied_to_it_are_one_table_of_float16(
    traced: Callable[..., ir.Model],
) -> None:
    wide = run_passes(traced(), (cleanup, fold_weight_casts, read_tied_head_in_place))
    half = compute_in_float16(wide)
    tables = [name for name in half.graph.initializers if "embed_tokens" in name]
    assert tables == ["model.embed_tokens.weight.float16"]
    readers = {node.op_type for node, _ in half.graph.initializers[tables[0]].uses()}
    assert readers == {"Gather", "Gemm"}


@pytest.mark.parametrize("bounds", [(2, None), (None, 3), (2, 3), (None, None)])
def test_integers_are_bounded_without_clip(bounds: tuple[int | None, int | None]) -> None:
    x = ir.Value(name="in_0", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([6]))
    limits = [
        None if b is None else ir.Value(name=f"b{b}", const_value=ir.Tensor(np.int64(b)))
        for b in bounds
    ]
    node = ir.node("Clip", [x, *limits])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    for limit in limits:
        if limit is not None:
            graph.register_initializer(limit)
    model = ir.Model(graph, ir_version=10)
    result = replace_integer_clip(model)
    assert bounds == (None, None) or "Clip" not in operators(result)
    values = (torch.arange(6),)
    np.testing.assert_array_equal(outputs_of(result, values)[0], outputs_of(model, values)[0])


def test_a_weight_beyond_float16_is_named() -> None:
    weight = ir.Tensor(np.array([[1.0, -70000.0]], np.float32), name="model.huge")
    with pytest.raises(ValueError, match="huge' holds 70000"):
        half_tensor(weight).numpy()


def test_a_weight_that_is_not_float32_yet_is_named(traced: Callable[..., ir.Model]) -> None:
    model = run_passes(traced(ir.DataType.FLOAT), (cleanup, fold_weight_transposes))
    weight = model.graph.initializers["model.layers.1.attn.x_proj.weight.transposed"]
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(np.float16), name=weight.name)
    with pytest.raises(ValueError, match="fold_weight_casts"):
        compute_in_float16(model)


def states_doubled(inner: int, dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """Layers 0 and 2 with a convolution, 1 with a window, 3 with a growing cache."""
    half, kv = ir.DataType.FLOAT16, ("key", "value")
    shapes = {f"{i}.conv_state": ((1, inner, 3), half) for i in (0, 2)}
    shapes |= {f"1.{kind}": ((1, 2, 4, 4), dtype) for kind in kv}
    shapes |= {f"3.{kind}": ((1, 2, "capacity", 4), half) for kind in kv}
    inputs = [
        ir.Value(name=f"past_key_values.{name}", shape=ir.Shape(shape), type=ir.TensorType(kind))
        for name, (shape, kind) in shapes.items()
    ]
    nodes = [ir.node("Add", [value, value]) for value in inputs]
    for node, value in zip(nodes, inputs, strict=True):
        output = node.outputs[0]
        output.name = value.name.replace("past_key_values", "present")
        output.shape, output.type = value.shape, value.type
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20}, name="states")
    return ir.Model(graph, ir_version=10)


def test_windows_travel_behind_the_convolution_before_them() -> None:
    packed = pack_window_caches(states_doubled(inner=16))
    session = onnxruntime.InferenceSession(ir.to_proto(packed).SerializeToString())
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["past_key_values.0.conv_state"] == [1, 16, 3 + 2 * 2 * 4 * 4 // 16]
    assert not {name for name in shapes if ".1." in name}
    random = np.random.default_rng(0)
    feeds = {
        name: random.standard_normal([5 if n == "capacity" else n for n in shape]).astype("f2")
        for name, shape in shapes.items()
    }
    names = [value.name for value in session.get_outputs()]
    for name, doubled in zip(names, session.run(names, feeds), strict=True):
        expected = 2 * feeds[name.replace("present", "past_key_values")]
        if name == "present.2.conv_state":  # no window behind it: the rest stays
            expected[..., 3:] /= 2
        np.testing.assert_array_equal(doubled, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (states_doubled(inner=12), "64 numbers do not fill columns of 12"),
        (states_doubled(inner=16, dtype=ir.DataType.FLOAT), "choose caches of float16"),
    ],
)
def test_windows_that_cannot_travel_so_are_named(model: ir.Model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_window_caches(model)


SIZES = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n,m] x, int64[n] i) => (float[n,m] y, int64[n] r, float[n,m] c, int64[k] o)
{
    one = Constant <value_ints = [1]> ()
    both = Shape (x)
    columns = Gather (both, one)
    wide = Cast <to = 1> (columns)
    scale = Sqrt (wide)
    y = Div (x, scale)
    rows_1 = Shape <start = 0, end = 1> (x)
    rows = Squeeze (rows_1)
    less = Sub (rows, rows)
    r = Mod (i, rows)
    flat = Concat <axis = 0> (rows_1, columns)
    z = Expand (x, flat)
    low = Cast <to = 1> (less)
    c = Clip (z, low)
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    o = Range (first, rows, step)
}
"""


def test_sizes_reach_the_device_by_range_and_shapes_stay_on_the_host() -> None:
    model = ir.from_onnx_text(SIZES)
    result = send_sizes_to_device(model)
    made = {node.outputs[0].name: node for node in result.graph}
    for name, operator in {"wide": "Range", "r": "Squeeze", "low": "Squeeze"}.items():
        assert made[name].inputs[-1].producer().op_type == operator
    assert made["flat"].inputs[0].name == "rows_1"
    assert made["o"].inputs[1].name == "rows"
    x, i = np.random.default_rng(0).standard_normal((3, 5), np.float32), np.arange(3) + 7
    expected, actual = (
        onnxruntime.InferenceSession(ir.to_proto(each).SerializeToString()).run(
            None, {"x": x, "i": i}
        )
        for each in (model, result)
    )
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_several_sizes_in_one_tensor_are_not_sent() -> None:
    text = SIZES.replace("wide = Cast <to = 1> (columns)", "wide = Cast <to = 1> (both)")
    with pytest.raises(ValueError, match="Cast computes with 'both', which holds several"):
        send_sizes_to_device(ir.from_onnx_text(text))
