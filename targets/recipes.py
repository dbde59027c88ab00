"""A target's recipe as data: read from its passes, and put into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from graph_passes.equalize import EqualizedCalibration, Scalings, equalize
from graph_passes.error_compensation import Calibration
from graph_passes.pipeline import Pass
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.recipe import Recipe, WeightFormat
from targets.target import Target


def recipe_of(target: Target) -> Recipe | None:
    """How a target stores weights; None where it quantizes none."""
    layers = _settings(target, quantize_matmul)
    if layers is None:
        return None
    table = _settings(target, quantize_embedding)
    default = _format(layers)
    return Recipe(
        default=default,
        embedding=None if table is None else _format(table),
        rules=tuple(layers.get("rules", ())),
    )


def with_recipe(
    target: Target,
    recipe: Recipe,
    calibration: Mapping[str, Calibration] | None = None,
    scalings: Scalings | None = None,
) -> Target:
    """The same target with its weights stored as a recipe says.

    Args:
        calibration: inputs of linear layers, for the quantizers that use them.
        scalings: of weights, before anything else is done to them.

    Raises:
        ValueError: the target quantizes no weights, or no embedding and the recipe does.
    """
    if _settings(target, quantize_matmul) is None:
        raise ValueError(
            f"target {target.name!r} stores weights in full: a recipe needs a target that "
            "quantizes, such as cpu-int4"
        )
    layers: dict[str, Any] = {**dataclasses.asdict(recipe.default), "rules": recipe.rules}
    if calibration is not None:
        known = EqualizedCalibration(calibration, scalings) if scalings else calibration
        layers["calibration"] = known
    tables: dict[str, Any] = {}
    if _settings(target, quantize_embedding) is not None and recipe.embedding is not None:
        if recipe.embedding.zero_points:
            raise ValueError("the embedding has no zero points: its two readers pack them apart")
        tables = dataclasses.asdict(recipe.embedding)
        del tables["zero_points"]
    changed = {quantize_matmul: layers, quantize_embedding: tables}
    first = (partial(equalize, scalings=scalings),) if scalings else ()
    passes = (_with_settings(each, changed) for each in target.passes)
    return dataclasses.replace(target, passes=(*first, *passes))


def _settings(target: Target, function: Callable[..., Any]) -> dict[str, Any] | None:
    for each in target.passes:
        if isinstance(each, partial) and each.func is function:
            return each.keywords
    return None


def _with_settings(apply: Pass, changed: Mapping[Callable[..., Any], Mapping[str, Any]]) -> Pass:
    if not isinstance(apply, partial) or apply.func not in changed:
        return apply
    return partial(apply.func, **{**apply.keywords, **changed[apply.func]})


def _format(settings: Mapping[str, Any]) -> WeightFormat:
    names = [field.name for field in dataclasses.fields(WeightFormat)]
    return WeightFormat(**{name: settings[name] for name in names if name in settings})
