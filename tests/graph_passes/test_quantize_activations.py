"""Integer activations: pairs stand where integer operators read and write, and cost little."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE
from export.quantize.activation_ranges import (
    CLIPS,
    Histogram,
    choose_ranges,
    collect_ranges,
    measure_ranges,
)
from export.quantize.calibration import CalibrationError
from export.trace import trace
from export.verify.compare import divergence
from graph_passes.cleanup import cleanup
from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.keep_part import find_parts
from graph_passes.quantize_activations import OPERATORS, find_quantized, quantize_activations
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.quantize_matmul_channels import quantize_matmul_channels
from runtime_py.native import library_path
from runtime_py.tokenizer import Tokenizer

TOKENS = 48
UINT16, INT8 = ir.DataType.UINT16, ir.DataType.INT8


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return cleanup(trace(open_checkpoint(REFERENCE)))


@pytest.fixture(scope="module")
def histograms(traced) -> dict[str, Histogram]:
    names = find_quantized(traced, part="fixed")
    found = collect_ranges(traced, ids("quantization.txt")[:1500], names, library=library_path())
    assert set(found) == set(names)
    return found


def ids(file: str) -> list[int]:
    return Tokenizer(REFERENCE).encode((REFERENCE / file).read_text(encoding="utf-8"))


def logits(model: ir.Model, tmp_path) -> np.ndarray:
    """Of a text's tokens, one call after the other."""
    model = fold_weight_casts(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    sizes, names = (
        {"batch": 1, "window": 32, "capacity": TOKENS},
        [o.name for o in session.get_outputs()],
    )
    states = {
        value.name: np.zeros([sizes.get(size, size) for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    rows = []
    for count, token in enumerate(ids("calibration.txt")[:TOKENS], 1):
        fed = {"input_ids": [[token]], "attention_mask": [[1] * count]}
        fed = {name: np.array(each, np.int64) for name, each in fed.items()}
        found = dict(zip(names, session.run(None, fed | states), strict=True))
        rows.append(found["logits"][0, 0])
        states = {name: found[name.replace("past_key_values", "present")] for name in states}
    return np.stack(rows)


@pytest.mark.parametrize(("weights", "dtype", "most"), [
    ("w8", UINT16, 0.005), ("w4", UINT16, 0.05), ("w8", INT8, 0.5)
], ids=["w8a16", "w4a16", "w8a8"])  # fmt: skip
def test_integer_activations_cost_little(
    traced, histograms, tmp_path, weights: str, dtype: ir.DataType, most: float
) -> None:
    stored = (
        quantize_matmul_channels(traced)
        if weights == "w8"
        else quantize_matmul(traced, bits=4, block_size=32, accuracy_level=1)
    )
    ranges = choose_ranges(histograms, bits=dtype.bitwidth)
    found = quantize_activations(stored, ranges=ranges, dtype=dtype, part="fixed")
    cost = divergence(logits(traced, tmp_path), logits(found, tmp_path)).mean()
    assert 0 < cost < most


def test_integer_operators_read_and_write_pairs_and_islands_are_left_alone(
    traced, histograms
) -> None:
    stored, ranges = quantize_matmul_channels(traced), choose_ranges(histograms)
    found = quantize_activations(stored, ranges=ranges, part="fixed")
    assert not any(node.op_type == "QuantizeLinear" for node in stored.graph)  # the pass is pure
    written = set(ranges) - {"_to_copy"}  # that one is the embedding's
    integer = 0
    for node in found.graph:
        name = (node.outputs[0].name or "").removesuffix(".exact")
        if node.op_type in OPERATORS and name in written:
            integer += 1
            for index in OPERATORS[node.op_type]:
                assert node.inputs[index].producer().op_type == "DequantizeLinear", name
            assert {use.node.op_type for use in node.outputs[0].uses()} == {"QuantizeLinear"}, name
        if node.op_type == "SelectiveScan":  # from island to island
            assert node.inputs[0].producer().op_type == "CausalConvWithState"
    assert integer == sum(
        node.op_type in OPERATORS and node.outputs[0].name in written for node in traced.graph
    )
    assert integer > 40
    before, after = ([value.name for value in each.graph.outputs] for each in (traced, found))
    assert before == after
    places = find_parts(found)  # a pair of the embedding, too, is where it is read
    pairs = [node for node in found.graph if node.op_type == "QuantizeLinear"]
    assert {places.get(node) for node in pairs} == {"fixed", None}


def test_what_reads_a_wide_result_or_is_left_out_stays_float(traced, histograms) -> None:
    operators = [name for name in OPERATORS if name not in ("residual", "MatMulNBits")]
    settings = {"operators": operators, "wide": ["GatedMemoryUnit"], "part": "fixed"}
    names = find_quantized(traced, **settings)
    stored, ranges = quantize_matmul_channels(traced), choose_ranges(histograms)
    found = quantize_activations(stored, ranges={name: ranges[name] for name in names}, **settings)
    assert not any(name.startswith("gated_memory_unit") for name in names)
    readers = {
        use.node.op_type: use.node
        for node in found.graph
        if node.op_type == "GatedMemoryUnit"
        for use in node.outputs[0].uses()
    }
    assert set(readers) == {"MatMul"}
    sums = [n for n in found.graph if n.op_type == "Add" and n.inputs[1].producer() is not None]
    assert any(each.inputs[0].producer().op_type == "Add" for each in sums)  # unbroken
    islands = ["LayerNormalization", "CausalConvWithState"]
    with pytest.raises(ValueError, match=r"\(SelectiveScan\) would be computed in floats"):
        quantize_activations(stored, ranges=ranges, islands=islands, part="fixed")


def test_limits_of_16_bits_have_room_for_other_texts(traced, histograms) -> None:
    text = ids("quantization.txt")
    found = measure_ranges(traced, text[:1500], list(histograms), library=library_path())
    for name, (low, high) in choose_ranges(histograms).items():
        assert found[name] == (2 * low, 2 * high)
    assert repr(found).startswith(f"ActivationRanges(values={len(histograms)}, clip='mse', tokens=")
    with pytest.raises(CalibrationError, match="has 100 tokens, expected 128 or more"):
        measure_ranges(traced, text[:100], list(histograms))


def test_a_missing_or_impossible_range_is_named(traced, histograms) -> None:
    stored, ranges = quantize_matmul_channels(traced), choose_ranges(histograms)
    with pytest.raises(ValueError, match="range of 'linear' is nan to 1"):
        quantize_activations(stored, ranges=ranges | {"linear": (float("nan"), 1)}, part="fixed")
    del ranges["linear"]
    with pytest.raises(ValueError, match="range of 'linear' is not known"):
        quantize_activations(stored, ranges=ranges, part="fixed")


@pytest.mark.parametrize(("settings", "told"), [
    ({"dtype": ir.DataType.FLOAT}, "dtype is FLOAT"),
    ({"operators": ["Softmax"]}, r"operators are \['Softmax'\]"),
    ({"part": "middle"}, "part is 'middle'"),
])  # fmt: skip
def test_other_settings_are_refused(traced, settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        quantize_activations(traced, ranges={}, **settings)


@pytest.mark.parametrize("clip", CLIPS)
def test_limits_hold_the_numbers(clip: str) -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    parts = [rng.standard_normal((50, 40)).astype(np.float32) for _ in range(10)]
    for part in parts:
        histogram.add(part)
    low, high = histogram.limits(clip, 16)
    least, largest = min(map(np.min, parts)), max(map(np.max, parts))
    assert least <= low < -2.5
    assert 2.5 < high <= largest
    if clip == "minmax":
        assert (low, high) == (least, largest)


def test_a_few_extreme_numbers_are_clipped_in_8_bits_and_kept_in_16() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    numbers = rng.standard_normal(1_000_000).astype(np.float32)
    numbers[:2] = 30
    histogram.add(numbers)
    assert histogram.limits("percentile", 8)[1] < 6
    assert histogram.limits("mse", 8)[1] < 20
    assert histogram.limits("mse", 16)[1] == 30


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        Histogram().add(np.array([1, np.nan], np.float32))
    with pytest.raises(CalibrationError, match="without numbers"):
        Histogram().limits("mse", 16)
    with pytest.raises(CalibrationError, match="clip is 'most'"):
        Histogram().limits("most", 16)
