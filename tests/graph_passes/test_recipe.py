import itertools
import json

import onnx_ir as ir
import pytest

from graph_passes.block_quantization import quantized_tensors
from graph_passes.recipe import (
    BITS,
    BLOCK_SIZES,
    QUANTIZERS,
    Recipe,
    WeightFormat,
    choose_formats,
    recipe_from_json,
)

NAMES = [
    "model.layers.0.attn.x_proj.weight",
    "model.layers.2.attn.in_proj.weight",
    "model.layers.2.mlp.fc1.weight",
    "model.layers.3.attn.Wqkv.weight.rows_0_64",
]
MODEL = ir.Model(
    ir.Graph([], [], nodes=[]),
    ir_version=10,
    metadata_props={"sambay.config": json.dumps({"num_hidden_layers": 4})},
)
RECIPE = Recipe(
    default=WeightFormat(bits=4, block_size=64),
    embedding=None,
    rules=(
        ("*.x_proj.*", None),
        ("*.layers.{memory_layer}.attn.*", 8),
        ("*.layers.{shared_layer}.*.rows_0_*", WeightFormat(zero_points=True, quantizer="gptq")),
    ),
)


def test_the_first_rule_that_matches_decides_and_bits_alone_keep_the_rest() -> None:
    assert choose_formats(MODEL, NAMES, RECIPE.default, RECIPE.rules) == {
        NAMES[0]: None,
        NAMES[1]: WeightFormat(bits=8, block_size=64),
        NAMES[2]: RECIPE.default,
        NAMES[3]: WeightFormat(zero_points=True, quantizer="gptq"),
    }


def test_inputs_are_evened_out_where_they_are_known_or_where_that_is_told() -> None:
    calibrated = recipe_from_json({"default": {"quantizer": "gptq"}})
    assert calibrated.embedding.quantizer == "search"
    assert calibrated.calibrated
    assert calibrated.equalized
    assert not recipe_from_json({"equalize": False, "default": {"quantizer": "gptq"}}).equalized
    assert not Recipe().equalized
    told = recipe_from_json({"equalize": True})
    assert told.calibrated
    assert told.equalized
    assert recipe_from_json(told.to_json()) == told


def test_an_unknown_pattern_is_refused_by_name_and_near_ones_offered() -> None:
    with pytest.raises(ValueError, match=r"matches '\*\.xproj\.\*'.*layers\.0\.attn\.x_proj"):
        choose_formats(MODEL, NAMES, WeightFormat(), [("*.xproj.*", None)])


@pytest.mark.parametrize("recipe", [Recipe(), RECIPE], ids=["default", "with rules"])
def test_a_recipe_written_and_read_chooses_the_same(recipe: Recipe) -> None:
    read = recipe_from_json(json.loads(json.dumps(recipe.to_json())))
    assert (read.default, read.embedding) == (recipe.default, recipe.embedding)
    for each in (read, recipe):
        each_chosen = choose_formats(MODEL, NAMES, each.default, each.rules)
        assert each_chosen == choose_formats(MODEL, NAMES, recipe.default, recipe.rules)
    assert recipe_from_json(read.to_json()) == read


def test_what_a_format_leaves_out_is_the_default_s() -> None:
    read = recipe_from_json({"default": {"block_size": 128}, "rules": {"*.fc1.*": {"bits": 8}}})
    assert read.rules == (("*.fc1.*", WeightFormat(bits=8, block_size=128)),)
    assert read.embedding == WeightFormat(bits=8, block_size=128)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_another_quantizer_keeps_bits_and_blocks(quantizer: str) -> None:
    changed = Recipe(rules=RECIPE.rules).with_quantizer(quantizer)
    assert changed.default == WeightFormat(quantizer=quantizer)
    assert changed.rules[:2] == RECIPE.rules[:2]
    assert changed.rules[2][1] == WeightFormat(zero_points=True, quantizer=quantizer)
    assert changed.embedding.quantizer == ("search" if quantizer == "gptq" else quantizer)
    assert changed.calibrated == (quantizer == "gptq")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "a recipe is list"),
        ({"defaults": {}}, r"unknown keys \['defaults'\]"),
        ({"rules": []}, "'rules' is list"),
        ({"default": 4}, "'default' is 4"),
        ({"default": {"bits": 3}}, "'default': bits is 3, expected one of"),
        ({"default": {"block": 3}}, r"'default' has unknown keys \['block'\]"),
        ({"rules": {"*.fc1.*": {"block_size": 24}}}, r"'\*\.fc1\.\*': block_size is 24"),
        ({"embedding": {"quantizer": "best"}}, "'embedding': quantizer is 'best'"),
        ({"default": {"bits": [4]}}, r"bits is \[4\]"),
        ({"equalize": 1}, "'equalize' is 1, expected true or false"),
        ({"embedding": {"quantizer": "gptq"}}, "'embedding' is 'gptq'.*take 'search'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(contents: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_json(contents)


@pytest.mark.parametrize(
    ("bits", "block_size", "zero_points"), list(itertools.product(BITS, BLOCK_SIZES, [False, True]))
)
@pytest.mark.parametrize("columns", [512, 200, 1])
def test_the_bytes_of_a_format_are_those_that_are_written(
    bits: int, block_size: int, zero_points: bool, columns: int
) -> None:
    form = WeightFormat(bits=bits, block_size=block_size, zero_points=zero_points)
    shape = ir.Shape([6, columns])
    weight = ir.LazyTensor(lambda: None, dtype=ir.DataType.FLOAT, shape=shape, name="w")
    tensors = quantized_tensors(weight, form)
    written = [tensors.packed, tensors.scales, tensors.zero_points]
    assert form.bytes_of(6, columns) == sum(each.nbytes for each in written if each is not None)
