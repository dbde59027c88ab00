"""Choose how every weight is stored so that a package has a given size and loses least.

A weight costs bytes and error. The mix is the cheapest in error among those within the budget,
exactly but for the rounding of sizes to ten-thousandths of it: a multiple-choice knapsack.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.block_quantization import dequantize, quantize
from graph_passes.pipeline import describe_pass, run_passes
from graph_passes.quantize_matmul import find_linear_layers
from graph_passes.recipe import Recipe, Storage, WeightFormat
from graph_passes.streamed_tensor import sample_rows
from targets.package import OUTSIDE, alignment
from targets.recipes import recipe_of, with_recipe
from targets.target import Target

TOLERANCE = 0.01  # of the budget that may be left
_AIM = 0.005  # that is left where it can be: sizes are known to some hundred bytes

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_STEPS = 10_000  # parts of the budget that sizes are counted in, for each hundred weights
# Bits and block size, smallest first: a larger block shares its scale among more weights.
_FORMATS = ((4, 128), (4, 64), (4, 32), (8, 128), (8, 32))
_TRIES = 6
_MANIFEST = 4096  # bytes of genai_config.json and of the manifest, about, without its passes
_SAMPLE = 64  # rows of a weight that its error is estimated from
_STEERS_THE_SCAN = re.compile(r"\.(x_proj|dt_proj)\.")  # an error in a step size lasts
EMBEDDING = "embedding"  # stands for it and the head tied to it

Form = WeightFormat | None  # None: float32


class BudgetError(ValueError):
    """A size that is none, or that no mix reaches."""


@dataclass(frozen=True)
class Choice:
    """A weight and the ways to store it.

    Attributes:
        name: of the initializer; ``embedding`` for the embedding and the head tied to it.
        options: (format, bytes, cost), smallest first.
    """

    name: str
    options: tuple[tuple[Form, int, float], ...]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``2.2GB``, ``900 MB`` or ``2GiB``; GB are 10^9 bytes.

    Raises:
        BudgetError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) == 0:
        raise BudgetError(
            f"{text!r} is no size: give a number and one of B, KB, MB, GB, KiB, MiB, GiB, "
            "such as 2.2GB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def fit_target(
    model: ir.Model,
    target: Target,
    budget: int,
    *,
    others: int,
    costs: Mapping[str, tuple[float, float]] | None = None,
) -> Target:
    """The target with the mix of bits that fills a budget.

    Args:
        model: as traced.
        budget: bytes of the whole package.
        others: bytes of the files beside graph and weights, such as the tokenizer's.
        costs: measured, by name of the weight: mean KL divergence of the model with this weight
            alone quantized, and the weight's signal-to-noise ratio (dB) then. None takes the
            errors of the weights themselves.

    Raises:
        BudgetError: the target quantizes nothing, or no mix is within the budget; the message
            says which sizes are possible.
    """
    recipe = recipe_of(target)
    if recipe is None:
        raise BudgetError(
            f"target {target.name} quantizes no weights, so its size is what it is: "
            "choose one such as cpu-int4"
        )
    choices = find_choices(model, recipe, costs or {})
    smallest, largest = (
        with_mix(target, {choice.name: choice.options[end][0] for choice in choices})
        for end in (0, -1)
    )
    lowest = package_bytes(model, smallest) + others
    rest = lowest - sum(choice.options[0][1] for choice in choices)
    sizes = {(choice.name, form): size for choice in choices for form, size, _ in choice.options}
    for _ in range(_TRIES):  # graph and alignment take some bytes more or less, known afterwards
        for left in (_AIM, TOLERANCE):
            mix = solve(choices, budget - rest, least=math.ceil(budget * (1 - left)) - rest)
            if mix is not None:
                break
        if mix is None:
            break
        fitted = with_mix(target, mix)
        made = package_bytes(model, fitted) + others
        if budget * (1 - TOLERANCE) <= made <= budget:
            return fitted
        rest = made - sum(sizes[chosen] for chosen in mix.items())
    highest = package_bytes(model, largest) + others
    possible = f"the smallest has {_shown(lowest)}, the largest {_shown(highest)}"
    if lowest <= budget <= highest:
        possible += f", and none lies within {TOLERANCE:.0%} below {_shown(budget)}"
    raise BudgetError(f"no package of {_shown(budget)} can be made: {possible}")


def package_bytes(model: ir.Model, target: Target) -> int:
    """Bytes of the graph, the weights and the manifest that a target makes of a traced model."""
    shaped = run_passes(model, target.passes).clone()
    position = 0
    for value in shaped.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < OUTSIDE:
            continue
        position += -position % alignment(tensor.nbytes)
        value.const_value = ir.ExternalTensor(
            "model.onnx.data",
            position,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=value.name or "",
        )
        position += tensor.nbytes
    told = sum(len(describe_pass(apply)) for apply in target.passes)
    return position + ir.to_proto(shaped).ByteSize() + told + _MANIFEST


def find_choices(
    model: ir.Model, recipe: Recipe, costs: Mapping[str, tuple[float, float]]
) -> list[Choice]:
    """The weights of a traced model and what storing them in fewer bits costs."""
    choices: dict[str, Choice] = {}
    readers = _readers(model)
    for _, path in find_linear_layers(model):
        name = path.weight.name or ""
        tied = any(node.op_type == "Gather" for node, _ in path.weight.uses())
        key = EMBEDDING if tied else name
        if key in choices or (tied and recipe.embedding is None):
            continue
        rows, columns = path.tensor.shape.numpy()
        basis = recipe.embedding if tied else recipe.default
        assert basis is not None
        measured = _measured(name, costs)
        options: list[tuple[Form, int, float]] = []
        for bits, block_size in _FORMATS:
            if bits == 4 and _STEERS_THE_SCAN.search(name):
                continue
            form = dataclasses.replace(basis, bits=bits, block_size=block_size)
            noise = _relative_noise(path.tensor, dataclasses.replace(form, quantizer="rtn"))
            cost = noise * readers(name) if measured is None else measured * noise
            options.append((form, form.bytes_of(rows, columns), cost))
        if not tied:  # the embedding as float would be read by another operator
            options.append((None, 4 * rows * columns, 0.0))
        choices[key] = Choice(key, tuple(options))
    return list(choices.values())


def solve(choices: Sequence[Choice], budget: int, *, least: int = 0) -> dict[str, Form] | None:
    """The mix of least cost whose bytes lie between two bounds; None where there is none."""
    if budget <= 0:
        return None
    # Sizes are rounded up, so the sum can only be less than it was counted.
    step = max(1, budget // (_STEPS * max(1, len(choices) // 100 + 1) * 10))
    room = budget // step
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    taken = []
    for choice in choices:
        found, chosen = np.full(room + 1, np.inf), np.full(room + 1, -1, np.int8)
        for index, (_, size, cost) in enumerate(choice.options):
            units = -(-size // step)
            if units > room:
                continue
            reached = best[: room + 1 - units] + cost
            better = reached < found[units:]
            found[units:][better] = reached[better]
            chosen[units:][better] = index
        best = found
        taken.append(chosen)
    first = min(room + 1, max(0, least // step))
    if not np.isfinite(best[first:]).any():
        return None
    at = first + int(best[first:].argmin())
    mix: dict[str, Form] = {}
    for choice, chosen in zip(reversed(choices), reversed(taken), strict=True):
        form, size, _ = choice.options[int(chosen[at])]
        mix[choice.name] = form
        at -= -(-size // step)
    return mix


def with_mix(target: Target, mix: Mapping[str, Form]) -> Target:
    """The target with every weight's format as a rule of its own; rules it had are replaced."""
    recipe = recipe_of(target)
    assert recipe is not None
    default = recipe.default

    def told(form: Form) -> Storage:
        """The number of bits says all where nothing else differs from the default."""
        same = form is not None and form == dataclasses.replace(default, bits=form.bits)
        return form.bits if form is not None and same else form

    rules = tuple(
        (name, told(form)) for name, form in mix.items() if name != EMBEDDING and form != default
    )
    embedding = mix.get(EMBEDDING, recipe.embedding)
    return with_recipe(target, dataclasses.replace(recipe, embedding=embedding, rules=rules))


def _measured(name: str, costs: Mapping[str, tuple[float, float]]) -> float | None:
    """Divergence for each part of relative noise; a weight's rows have its whole's."""
    if not costs:
        return None
    stem = name.partition(".rows_")[0]
    if stem not in costs:
        raise BudgetError(f"the costs are of another model, they lack {stem!r}: measure this one's")
    divergence, ratio = costs[stem]
    # A weight that is exact in 4 bits, such as one of zeros, has no noise to lose by.
    return 0.0 if math.isinf(ratio) else float(divergence * 10 ** (ratio / 10))


def _relative_noise(tensor: ir.TensorProtocol, form: WeightFormat) -> float:
    """Error energy over energy, from rows spread over the weight."""
    rows = sample_rows(tensor, _SAMPLE)
    noise = float(np.square(dequantize(quantize(rows, form)) - rows).sum())
    energy = float(np.square(rows).sum())
    return noise / energy if energy > 0 else 0.0


def _readers(model: ir.Model) -> Callable[[str], float]:
    """How many layers read what a weight makes: the memory and the shared cache have many."""
    layers = json.loads(model.metadata_props["sambay.config"])["num_hidden_layers"]
    shared = tuple(f"model.layers.{layer}.attn." for layer in (layers // 2, layers // 2 + 1))
    return lambda name: layers / 4 if name.startswith(shared) else 1.0


def _shown(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 10**9 else f"{count / 1e6:.3f} MB"
