"""Laws of every pass, on a small model in the shape of a traced one."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graph_passes.block_quantization import dequantize, quantize
from graph_passes.cleanup import cleanup
from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.fold_weight_transposes import fold_weight_transposes
from graph_passes.pipeline import Pass, describe_pass, run_passes
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.quantize_matmul_channels import quantize_matmul_channels
from graph_passes.read_tied_head_in_place import read_tied_head_in_place
from graph_passes.recipe import WeightFormat
from graph_passes.use_native_matmul import use_native_matmul

EXACT: tuple[Pass, ...] = (
    cleanup,
    fold_weight_casts,
    read_tied_head_in_place,
    fold_weight_transposes,
)
LOSSY: tuple[Pass, ...] = (
    partial(quantize_embedding, bits=8, block_size=32),
    partial(quantize_matmul, bits=4, block_size=32),
    partial(quantize_matmul, bits=8, block_size=16, rules=(("*.x_proj.*", None),)),
    partial(quantize_matmul, bits=4, block_size=128, zero_points=True, quantizer="rtn"),
    quantize_matmul_channels,
)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Make = Callable[..., ir.Model]
Run = Callable[..., dict[str, np.ndarray]]


def interface(model: ir.Model) -> tuple[object, ...]:
    values = [*model.graph.inputs, *model.graph.outputs]
    described = [(value.name, str(value.type), str(value.shape)) for value in values]
    return described, dict(model.metadata_props)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def ready(apply: Pass) -> tuple[Pass, ...]:
    """What a pass must come after."""
    return (cleanup, fold_weight_casts) if apply is read_tied_head_in_place else ()


@pytest.mark.parametrize("apply", EXACT + LOSSY, ids=describe_pass)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pass_keeps_names_types_and_metadata_and_its_argument(
    traced: Make, apply: Pass, tied: bool
) -> None:
    model = run_passes(traced(tied=tied), ready(apply))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = apply(model)
    assert interface(result) == interface(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("apply", EXACT, ids=describe_pass)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_exact_pass_keeps_outputs(
    traced: Make, run_model: Run, apply: Pass, dtype: ir.DataType, tied: bool
) -> None:
    model = run_passes(traced(dtype, tied=tied), ready(apply))
    expected, actual = run_model(model), run_model(apply(model))
    assert list(actual) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-6, err_msg=name)


def test_the_exact_passes_leave_no_work_on_weights(traced: Make) -> None:
    result = run_passes(traced(), EXACT)
    assert not operators(result).keys() & {"Cast", "Transpose"}
    assert operators(result)["Constant"] == 1, "equal constants stand once"
    tables = [name for name in result.graph.initializers if "embed_tokens" in name]
    assert tables == ["model.embed_tokens.weight"], "the tied embedding stands once"
    assert [function[1] for function in result.functions] == ["GatedMemoryUnit"]


def test_cleanup_forgets_the_tracer_s_notes(traced: Make) -> None:
    assert all(not node.metadata_props for node in cleanup(traced()).graph)


def test_an_optimizing_runtime_keeps_one_tied_table(
    traced: Make, serialize: Callable[[ir.Model], bytes], tmp_path: Path
) -> None:
    model = run_passes(traced(ir.DataType.FLOAT), EXACT)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(serialize(model), options)
    optimized = ir.load(tmp_path / "optimized.onnx")
    table = model.graph.initializers["model.embed_tokens.weight"]
    tables = [
        value
        for value in optimized.graph.initializers.values()
        if value.const_value is not None and value.const_value.size == table.const_value.size
    ]
    assert len(tables) == 1


def test_a_weight_that_something_reads_as_stored_keeps_its_dtype(traced: Make) -> None:
    model = traced()
    weight = model.graph.initializers["model.layers.1.attn.x_proj.weight"]
    model.graph.append(ir.node("Shape", [weight]))
    assert weight.dtype == ir.DataType.BFLOAT16
    folded = fold_weight_casts(model).graph.initializers
    assert folded[weight.name].dtype == ir.DataType.BFLOAT16
    assert folded["model.embed_tokens.weight"].dtype == ir.DataType.FLOAT


def test_the_head_is_refused_before_casts_are_folded(traced: Make) -> None:
    model = traced()
    for node in list(model.graph):
        if node.op_type == "Cast" and node.inputs[0].name == "model.embed_tokens.weight":
            # a second reader, so that the weight counts as shared
            model.graph.append(ir.node("Shape", [node.inputs[0]]))
    with pytest.raises(ValueError, match="fold_weight_casts before"):
        read_tied_head_in_place(model)


def dequantized(model: ir.Model, plan: Callable[[str], WeightFormat | None]) -> ir.Model:
    """The same model with every weight replaced by what is left of it after quantization."""
    model = run_passes(model, EXACT[:2])
    for name, value in model.graph.initializers.items():
        if (form := plan(name)) is not None and len(value.const_value.shape) == 2:
            kept = dequantize(quantize(value.const_value.numpy(), form))
            value.const_value = ir.Tensor(kept, name=name)
    return model


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("hidden", [64, 48, 80, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_compute_with_the_dequantized_weights(
    traced: Make, run_model: Run, bits: int, hidden: int
) -> None:
    model = cleanup(traced(hidden=hidden, tied=False))
    # accuracy_level 1: the runtime computes in float32, so that only the weights are compared
    result = quantize_matmul(model, bits=bits, block_size=32, accuracy_level=1)
    assert operators(result)["MatMul"] == 0
    form = WeightFormat(bits=bits)
    expected = dequantized(model, lambda name: None if "embed" in name else form)
    assert_close(run_model(result), run_model(expected))


@pytest.mark.parametrize("hidden", [64, 48, 80, 40])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embedding_and_head_compute_with_the_dequantized_tables(
    traced: Make, run_model: Run, dtype: ir.DataType, tied: bool, hidden: int, bits: int
) -> None:
    model = cleanup(traced(dtype, tied=tied, hidden=hidden))
    result = quantize_embedding(model, bits=bits, block_size=32, accuracy_level=1)
    form = WeightFormat(bits=bits)
    expected = dequantized(model, lambda name: form if "embed" in name or "head" in name else None)
    assert_close(run_model(result), run_model(expected))
    tables = [name for name in result.graph.initializers if name.endswith(".packed")]
    assert len(tables) == (1 if tied else 2)
    assert "model.embed_tokens.weight" not in result.graph.initializers


def test_float16_scales_go_into_the_product_and_are_cast_in_its_body(
    traced: Make, run_model: Run
) -> None:
    model = cleanup(traced(hidden=64))
    tables = quantize_embedding(model, bits=8, block_size=64, scale_type="float16")
    quantized = quantize_matmul(
        tables, bits=4, block_size=32, scale_type="float16", exact=["*.fc1.*"]
    )
    native = use_native_matmul(quantized)
    products = [node for node in native.graph if node.op_type == "MatMulNBits"]
    assert {node.domain for node in products} == {"ai.sambay"}
    assert {node.inputs[2].const_value.dtype for node in products} == {ir.DataType.FLOAT16}
    for node in products:
        exact = "fc1" in str(node.inputs[1].name)
        assert node.attributes.get_int("accuracy_level") == (1 if exact else 4)
    assert_close(run_model(native), run_model(quantized))
    wide = fold_weight_casts(quantized)  # for every other provider
    assert ir.DataType.FLOAT16 not in {
        value.dtype for name, value in wide.graph.initializers.items() if name.endswith(".scales")
    }
    assert_close(run_model(wide), run_model(quantized))


def chosen_bits(model: ir.Model) -> dict[str, int]:
    return {
        node.inputs[1].name.removesuffix(".packed"): node.attributes.get_int("bits")
        for node in model.graph
        if node.op_type == "MatMulNBits"
    }


def test_the_first_rule_that_matches_decides(traced: Make) -> None:
    rules = (
        ("*.layers.{memory_layer}.*", 8),
        ("*.layers.{shared_layer}.*.rows_0_*", None),
        ("*.attn.Wqkv.*", 8),
        ("*.attn.*", None),
    )
    result = quantize_matmul(traced(tied=False), bits=4, block_size=32, rules=rules)
    assert chosen_bits(result) == {
        "model.layers.0.mlp.fc1.weight": 4,
        "model.layers.2.attn.out_proj.weight": 8,  # four layers: the memory layer is 2
        "model.layers.3.attn.Wqkv.weight.rows_32_96": 8,
        "lm_head.weight": 4,
    }


def test_a_weight_already_stored_transposed_is_quantized_along_its_inputs(
    traced: Make, run_model: Run
) -> None:
    model = traced(tied=False)
    late = run_passes(model, [*EXACT, partial(quantize_matmul, bits=8, block_size=16)])
    early = quantize_matmul(model, bits=8, block_size=16)
    assert_close(run_model(late), run_model(early))


def test_a_rule_that_matches_nothing_is_refused(traced: Make) -> None:
    with pytest.raises(ValueError, match=r"\*\.xproj\.\*"):
        quantize_matmul(traced(), bits=4, block_size=32, rules=(("*.xproj.*", None),))


def test_a_rule_by_role_needs_the_model_s_sizes(traced: Make) -> None:
    model = traced()
    del model.metadata_props["sambay.config"]
    with pytest.raises(ValueError, match=r"sambay\.config"):
        quantize_matmul(model, bits=4, block_size=32, rules=(("*.{memory_layer}.*", 8),))


@pytest.mark.parametrize("apply", [quantize_matmul, quantize_embedding])
def test_settings_that_no_runtime_reads_are_refused(traced: Make, apply: Callable) -> None:
    with pytest.raises(ValueError, match="bits is 5"):
        apply(traced(), bits=5, block_size=32)
    with pytest.raises(ValueError, match="block_size is 20"):
        apply(traced(), bits=8, block_size=20)


def test_an_embedding_is_not_calibrated(traced: Make) -> None:
    with pytest.raises(ValueError, match="take 'search'"):
        quantize_embedding(traced(), bits=4, block_size=32, quantizer="gptq")


def test_a_rule_may_give_any_format(traced: Make, run_model: Run) -> None:
    form = WeightFormat(bits=4, block_size=16, zero_points=True, quantizer="rtn")
    model = cleanup(traced())
    rules = (("*.mlp.*", form), ("*", None))
    result = quantize_matmul(model, bits=8, block_size=32, accuracy_level=1, rules=rules)
    assert chosen_bits(result) == {"model.layers.0.mlp.fc1.weight": 4}
    expected = dequantized(model, lambda name: form if ".mlp." in name else None)
    assert_close(run_model(result), run_model(expected))


def test_a_model_without_an_embedding_is_refused(traced: Make) -> None:
    once = quantize_embedding(traced(), bits=8, block_size=32)
    with pytest.raises(ValueError, match="not a SambaY model"):
        quantize_embedding(once, bits=8, block_size=32)


def test_passes_are_announced_as_one_would_write_them(traced: Make) -> None:
    told: list[str] = []
    run_passes(traced(), [cleanup, LOSSY[1]], on_pass=told.append)
    assert told == ["cleanup", "quantize_matmul(bits=4, block_size=32)"]


@pytest.mark.parametrize("quantizer", ["rtn", "search"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channels_compute_with_weights_half_a_step_away(
    traced: Make, run_model: Run, dtype: ir.DataType, quantizer: str
) -> None:
    model = cleanup(traced(dtype, tied=False))
    result = quantize_matmul_channels(model, quantizer=quantizer)
    assert operators(result)["DequantizeLinear"] == operators(model)["MatMul"]
    stored = {name: value.const_value for name, value in result.graph.initializers.items()}
    expected = run_passes(model, EXACT[:2])
    for name, value in expected.graph.initializers.items():
        if f"{name}.int8" not in stored:
            continue
        values = stored[f"{name}.int8"].numpy().T
        scales = stored[f"{name}.channel_scales"].numpy()[:, None]
        error = np.abs(values * scales - value.const_value.numpy())
        assert (error <= scales / 2 * 1.001)[np.abs(values) < 127].all()
        value.const_value = ir.Tensor(values * scales, name=name)
    assert_close(run_model(result, as_written=True), run_model(expected))


def test_a_channel_has_8_bits_or_its_floats(traced: Make) -> None:
    result = quantize_matmul_channels(traced(), rules=(("*.x_proj.*", None),))
    assert "model.layers.1.attn.x_proj.weight" in result.graph.initializers
    with pytest.raises(ValueError, match=r"expected 8 bits or None"):
        quantize_matmul_channels(traced(), rules=(("*.x_proj.*", 4),))
    with pytest.raises(ValueError, match="expected rtn or search"):
        quantize_matmul_channels(traced(), quantizer="gptq")
