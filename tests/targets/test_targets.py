from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest

from graph_passes.pipeline import run_passes
from targets import DEFAULT, TARGETS, find_target
from targets.caches import CACHES, with_cache
from targets.choose import choose_target
from targets.describe import page
from targets.target import CPU, CUDA, Target


def chosen_bits(model: ir.Model) -> dict[str, int]:
    return {
        node.inputs[1].name.removesuffix(".weight.packed").split(".", 1)[1]: (
            node.attributes.get_int("bits")
        )
        for node in model.graph
        if node.op_type == "MatMulNBits"
    }


def test_names_are_unique_and_found() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    assert all(find_target(target.name) is target for target in TARGETS)
    assert DEFAULT.name == "cpu-int4"


@pytest.mark.parametrize(
    ("providers", "name"),
    [
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda-int4"),
        (["DmlExecutionProvider", "CPUExecutionProvider"], "directml-int4"),
        (["DmlExecutionProvider", "CUDAExecutionProvider"], "cuda-int4"),
        (["QNNExecutionProvider", "DmlExecutionProvider"], "qnn-npu-w4a16"),
        (["OpenVINOExecutionProvider", "CPUExecutionProvider"], "cpu-int4"),
        (["AzureExecutionProvider"], "cpu-int4"),
    ],
)
def test_auto_takes_the_fastest_provider_there_is(providers: list[str], name: str) -> None:
    assert choose_target(providers).name == name


def test_auto_is_a_target_by_name() -> None:
    assert find_target("auto") is choose_target()


def test_the_page_of_targets_is_made_from_the_code() -> None:
    written = Path(__file__).parents[2] / "docs" / "targets.md"
    assert written.read_text(encoding="utf-8") == page(), (
        "python -m targets.describe > docs/targets.md"
    )


def test_an_unknown_target_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'cpu-int5': did you mean .*cpu-int4"):
        find_target("cpu-int5")


def test_a_target_like_no_other_offers_all() -> None:
    every_name = " or ".join(target.name for target in TARGETS)
    with pytest.raises(ValueError, match=every_name):
        find_target("zzz")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_recipe_leaves_no_work_on_weights(traced: Callable[[], ir.Model], target: Target) -> None:
    result = run_passes(traced(), target.passes)
    weights = result.graph.initializers.values()
    plain = {ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT64}
    halves = [value for value in weights if value.dtype == ir.DataType.FLOAT16]
    assert {value.dtype for value in weights} <= plain | {ir.DataType.FLOAT16}
    if target.provider == CPU:  # computes in float32: only scales are of float16
        assert all(value.name.endswith((".scale", ".scales")) for value in halves)
        # the embedding's, one a row, are cast when a session is made
        weights = [value for value in weights if value not in halves]
    readers = {node.op_type for value in weights for node, _ in value.uses()}
    assert not readers & {"Cast", "Transpose"}


def test_the_default_keeps_what_steers_the_scan_and_doubles_what_is_shared(
    traced: Callable[[], ir.Model],
) -> None:
    assert chosen_bits(run_passes(traced(), DEFAULT.passes)) == {
        "layers.0.attn.x_proj": 8,
        "layers.1.attn.dt_proj": 8,
        "layers.1.mlp.fc1": 4,
        "layers.2.attn.in_proj": 8,
        "layers.3.attn.Wqkv": 8,
        "embed_tokens": 8,
    }


def test_recipes_differ_by_settings_that_can_be_printed() -> None:
    for target in TARGETS:
        every = [target.passes, *(graph.passes for graph in target.graphs)]
        for apply in (apply for passes in every for apply in passes):
            function = apply.func if isinstance(apply, partial) else apply
            assert function.__module__ == f"graph_passes.{function.__name__}"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_type_replaces_the_target_s_own(target: Target, cache: str) -> None:
    if cache == "int8" and target.provider not in (CPU, CUDA):
        with pytest.raises(ValueError, match=f"int8.*{target.name}.*{target.cache}"):
            with_cache(target, cache)
        return
    other = "float32" if target.cache == "float16" else "float16"
    chosen = with_cache(with_cache(target, other), cache)
    rest = [apply for apply in target.passes if (apply,) not in CACHES.values()]
    assert chosen.cache == cache
    assert list(chosen.passes) == [*CACHES[cache], *rest]
    assert with_cache(chosen, target.cache) == target


def test_an_unknown_cache_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4': expected one of float32, float16, int8"):
        with_cache(DEFAULT, "int4")
