"""Passes that choose the element type of caches, on a graph of the operators that have any."""

import onnx_ir as ir
import pytest

from graph_passes.cleanup import cleanup
from graph_passes.quantize_caches import quantize_caches
from graph_passes.store_caches_in_float16 import store_caches_in_float16

RING, SHARED = "batch,4,window,8", "batch,4,capacity,8"
GRAPH = f"""
<ir_version: 10, opset_import: ["" : 20, "ai.sambay" : 1]>
caches (float[batch,tokens,64] q, float[batch,tokens,32] k, float[1] lambda, float[16] norm,
        int64[batch] past_lengths, int64[batch] lengths, int64[batch,tokens] positions,
        float[batch,8,3] "past_key_values.0.conv_state",
        float[{RING}] "past_key_values.1.key", float[{RING}] "past_key_values.1.value",
        float[{SHARED}] "past_key_values.3.key", float[{SHARED}] "past_key_values.3.value")
    => (float[batch,tokens,64] logits, float[batch,8,3] "present.0.conv_state",
        float[{RING}] "present.1.key", float[{RING}] "present.1.value",
        float[{SHARED}] "present.3.key", float[{SHARED}] "present.3.value")
{{
    "present.0.conv_state" = Identity ("past_key_values.0.conv_state")
    mixed, "present.1.key", "present.1.value" = ai.sambay.DifferentialAttention <num_heads = 8> (
        q, k, k, "past_key_values.1.key", "past_key_values.1.value", lambda, norm, past_lengths,
        lengths)
    "present.3.key", "present.3.value" = ai.sambay.AppendKeyValue (
        "past_key_values.3.key", "past_key_values.3.value", k, k, past_lengths)
    full = ai.sambay.DifferentialCrossAttention <num_heads = 8> (
        mixed, "present.3.key", "present.3.value", lambda, norm, positions)
    logits = ai.sambay.DifferentialCrossAttention <num_heads = 8> (
        full, "present.3.key", "present.3.value", lambda, norm, positions)
}}
"""
PLAIN = ("AppendKeyValue", "DifferentialAttention", "DifferentialCrossAttention")
QUANTIZED = (
    "AppendQuantizedKeyValue",
    "QuantizedDifferentialAttention",
    "QuantizedDifferentialCrossAttention",
)


def traced() -> ir.Model:
    """The graph with bodies of all operators; what they compute does not matter here."""
    model = ir.from_onnx_text(GRAPH)
    for name in PLAIN + QUANTIZED:
        body = ir.Graph([], [], nodes=[], opset_imports={"": 20})
        function = ir.Function("ai.sambay", name, graph=body, attributes=[])
        model.functions[function.identifier()] = function
    return model


def declared(model: ir.Model) -> dict[str, tuple[ir.DataType | None, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return {value.name: (value.dtype, str(value.shape)) for value in values}


def test_float16_changes_the_type_of_keys_and_values_alone() -> None:
    model = traced()
    before, after = declared(model), declared(store_caches_in_float16(model))
    assert before.keys() == after.keys()
    for name, (dtype, shape) in after.items():
        cache = name.endswith((".key", ".value"))
        assert (dtype, shape) == (
            ir.DataType.FLOAT16 if cache else before[name][0],
            before[name][1],
        )
    assert declared(model) == before, "the argument stays as it is"


def test_int8_gives_every_cache_a_scale_beside_it() -> None:
    model = traced()
    before, after = declared(model), declared(quantize_caches(model))
    assert [value.name for value in quantize_caches(model).graph.inputs][-8:] == [
        f"past_key_values.{layer}.{name}"
        for layer in (1, 3)
        for name in ("key", "value", "key_scale", "value_scale")
    ]
    for name, (dtype, shape) in before.items():
        cache = name.endswith((".key", ".value"))
        assert after.pop(name) == (ir.DataType.INT8 if cache else dtype, shape)
        if cache:
            axes = shape.replace(",8]", "]")
            assert after.pop(f"{name}_scale") == (ir.DataType.FLOAT16, axes)
    assert not after
    assert declared(model) == before, "the argument stays as it is"


def test_int8_exchanges_every_operator_over_caches() -> None:
    model = traced()
    result = quantize_caches(model)
    for old, new in zip(model.graph, result.graph, strict=True):
        if old.op_type == "Identity":
            continue
        assert new.op_type == dict(zip(PLAIN, QUANTIZED, strict=True))[old.op_type]
        assert new.attributes == old.attributes
        for before, after in ((old.inputs, new.inputs), (old.outputs, new.outputs)):
            names = [value.name for value in after]
            caches = [name for name in names if name.endswith((".key", ".value"))]
            scales = [name for name in names if name.endswith("_scale")]
            assert scales == [f"{cache}_scale" for cache in caches]
            assert [name for name in names if name not in scales] == [v.name for v in before]


def test_cleanup_keeps_the_bodies_in_use_alone() -> None:
    for apply, used in ((store_caches_in_float16, PLAIN), (quantize_caches, QUANTIZED)):
        assert {name for _, name, _ in cleanup(apply(traced())).functions} == set(used)


def test_a_model_that_was_cleaned_up_before_is_refused() -> None:
    with pytest.raises(ValueError, match="no body of QuantizedDifferentialAttention: run"):
        quantize_caches(cleanup(traced()))


@pytest.mark.parametrize("apply", [store_caches_in_float16, quantize_caches])
def test_a_cache_that_something_else_reads_is_refused(apply: object) -> None:
    model = traced()
    append = next(node for node in model.graph if node.op_type == "AppendKeyValue")
    between = ir.node("Identity", [append.inputs[0]])
    model.graph.insert_before(append, between)
    between.outputs[0].name = "between"
    append.replace_input_with(0, between.outputs[0])
    with pytest.raises(ValueError, match="give the model as traced"):
        apply(model)
