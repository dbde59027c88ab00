"""What activations are computed in: the choice of ``--activations``."""

from __future__ import annotations

import dataclasses
from functools import partial

import onnx_ir as ir

from graph_passes.inline_operators import inline_operators
from graph_passes.pipeline import Pass, is_pass
from graph_passes.quantize_activations import Ranges, find_quantized, quantize_activations
from targets.target import Integers, Target

INTEGER = {"uint16": ir.DataType.UINT16}
ACTIVATIONS = ("float16", *INTEGER)


def integers_of(target: Target, activations: str) -> Integers:
    """What of a target becomes integers.

    Raises:
        ValueError: nothing of it can.
    """
    if target.integers is None:
        raise ValueError(
            f"--activations {activations} is a choice of NPU targets, and {target.name} is for "
            f"{target.provider}: choose qnn-npu-w4a16 or qnn-npu-w8a16"
        )
    return target.integers


def values_to_measure(model: ir.Model, target: Target, activations: str) -> list[str]:
    """Names of the values whose ranges ``with_activations`` needs.

    Args:
        model: after ``target.passes``.

    Raises:
        ValueError: nothing of the target can be integers.
    """
    found = integers_of(target, activations)
    return find_quantized(model, operators=found.operators, wide=found.wide, part=found.part)


def with_activations(target: Target, activations: str, ranges: Ranges) -> Target:
    """The target with what can be computed in integers computed so.

    Args:
        activations: one of INTEGER.
        ranges: of every value that ``values_to_measure`` names.

    Raises:
        ValueError: nothing of the target can be integers.
    """
    found = integers_of(target, activations)
    added = partial(
        quantize_activations,
        ranges=ranges,
        dtype=INTEGER[activations],
        operators=found.operators,
        islands=found.islands,
        wide=found.wide,
        part=found.part,
    )

    def insert(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """Before operators are inlined, so that their insides stay floats."""
        (at,) = (i for i, each in enumerate(passes) if is_pass(each, inline_operators))
        return (*passes[:at], added, *passes[at:])

    graphs = (dataclasses.replace(each, passes=insert(each.passes)) for each in target.graphs)
    return dataclasses.replace(target, graphs=tuple(graphs))
