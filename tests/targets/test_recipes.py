import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from graph_passes.pipeline import describe_pass, run_passes
from graph_passes.recipe import Recipe, WeightFormat, recipe_from_json
from targets import DEFAULT, TARGETS, find_target
from targets.recipes import recipe_of, with_recipe
from targets.target import Target

QUANTIZED = [target for target in TARGETS if recipe_of(target) is not None]


@pytest.mark.parametrize("target", QUANTIZED, ids=lambda target: target.name)
def test_a_recipe_put_back_changes_no_weight(
    traced: Callable[[], ir.Model], target: Target
) -> None:
    again = with_recipe(target, recipe_of(target))
    assert recipe_of(again) == recipe_of(target)
    shapes = [
        {
            name: str(value)
            for name, value in run_passes(traced(), each.passes).graph.initializers.items()
        }
        for each in (target, again)
    ]
    assert shapes[0] == shapes[1]


def test_another_recipe_is_what_is_written_and_printed(traced: Callable[[], ir.Model]) -> None:
    recipe = Recipe(
        default=WeightFormat(bits=8, block_size=64),
        embedding=WeightFormat(bits=4),
        rules=(("*.mlp.*", WeightFormat(zero_points=True)),),
    )
    target = with_recipe(DEFAULT, recipe)
    assert recipe_of(target) == recipe
    nodes = [
        node for node in run_passes(traced(), target.passes).graph if node.op_type == "MatMulNBits"
    ]
    assert {node.inputs[1].name.split(".")[-3]: len(node.inputs) for node in nodes}["fc1"] == 4
    assert any("block_size=64" in describe_pass(apply) for apply in target.passes)


def test_the_recipe_with_float32_scales_in_the_docs_is_that_of_the_default_target() -> None:
    def wide(form: WeightFormat) -> WeightFormat:
        return dataclasses.replace(form, scale_type="float32")

    page = Path(__file__).parents[2] / "docs" / "quantization.md"
    blocks = re.findall("```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (told,) = (json.loads(block) for block in blocks if '"scale_type": "float32"' in block)
    usual = recipe_of(DEFAULT)
    assert recipe_from_json(told) == Recipe(
        default=wide(usual.default),
        embedding=wide(usual.embedding),
        rules=tuple((pattern, wide(form)) for pattern, form in usual.rules),
    )


def test_a_target_that_stores_weights_in_full_takes_no_recipe() -> None:
    full = find_target("cpu-fp32")
    assert recipe_of(full) is None
    with pytest.raises(ValueError, match="'cpu-fp32' stores weights in full"):
        with_recipe(full, Recipe())


def test_an_embedding_with_zero_points_is_refused() -> None:
    recipe = recipe_of(DEFAULT)
    table = WeightFormat(bits=8, zero_points=True)
    with pytest.raises(ValueError, match="no zero points"):
        with_recipe(DEFAULT, dataclasses.replace(recipe, embedding=table))
