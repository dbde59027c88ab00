"""How weights and activations are quantized, as told on the command line.

Joins the packages for ``phi4export``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from export.checkpoint import Checkpoint
from export.quantize.activation_ranges import measure_ranges
from export.quantize.calibration import Calibration, CalibrationError, collect, read_text
from export.quantize.equalization import find_scalings
from export.tokenizer import tokenizer_files
from graph_passes.equalize import Scalings, equalize
from graph_passes.pipeline import is_pass, run_passes
from graph_passes.quantize_matmul import find_linear_layers
from graph_passes.recipe import Recipe, choose_formats, recipe_from_json
from runtime_py.native import library_path
from runtime_py.tokenizer import Tokenizer
from targets.activations import INTEGER, integers_of, values_to_measure, with_activations
from targets.recipes import recipe_of, with_recipe
from targets.target import Target

TEXT = "quantization.txt"  # beside a checkpoint's weights: what to calibrate on, if nothing is told

# Who needs a text, to be told where there is none.
_CALIBRATED, _INTEGERS = "the quantizer gptq or --equalize needs", "integer activations need"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the command line says.

    Attributes:
        recipe: JSON file, see ``graph_passes.recipe``; None keeps the target's.
        quantizer: for all weights; None keeps the recipe's.
        calibration: text to calibrate on; None takes the checkpoint's own.
        folder: where calibration is kept; None forgets it at the end.
        equalize: even out the inputs of linear layers first; "gptq" does so untold.
        activations: one of ``targets.activations.ACTIVATIONS``; None keeps the target's.
        ranges: of integer activations, one of ``activation_ranges.CLIPS``; None is "mse".
    """

    recipe: Path | None
    quantizer: str | None
    calibration: Path | None
    folder: Path | None
    equalize: bool = False
    activations: str | None = None
    ranges: str | None = None

    @property
    def integer(self) -> str | None:
        """Of activations, where they are to be integers."""
        return self.activations if self.activations in INTEGER else None


def check(target: Target, told: Quantization) -> None:
    """Refuse what cannot be used, before a checkpoint is fetched.

    Raises:
        ValueError: as ``quantized_as_told``.
    """
    recipe = _recipe(target, told)
    if recipe is not None:
        with_recipe(target, recipe)
    if told.activations is not None:
        integers_of(target, told.activations)
    if told.calibration is not None:
        read_text(told.calibration)


def check_text(target: Target, told: Quantization, checkpoint: Checkpoint) -> None:
    """Refuse to begin without the text that will be needed.

    Raises:
        ValueError: none was told, and none lies beside the weights; or it cannot be read.
    """
    if told.integer is not None:
        _read_text(checkpoint, told.calibration, _INTEGERS)
    recipe = _recipe(target, told)
    if recipe is not None and recipe.calibrated:
        _read_text(checkpoint, told.calibration, _CALIBRATED)


@contextlib.contextmanager
def quantized_as_told(
    target: Target,
    told: Quantization,
    checkpoint: Checkpoint,
    traced: ir.Model,
    progress: Callable[[str], object],
) -> Iterator[Target]:
    """The target with its weights quantized as the command line says.

    The calibration that it reads is there until the context ends.

    Args:
        traced: the float graph, whose weights the recipe's patterns are to match.
        progress: told what is being done.

    Raises:
        ValueError: a recipe, a quantizer or a calibration text that cannot be used; or a target
            that stores its weights in full.
    """
    recipe = _recipe(target, told)
    if recipe is None or not recipe.calibrated:
        yield target if recipe is None else with_recipe(target, recipe)
        return
    names = [path.weight.name or "" for _, path in find_linear_layers(traced)]
    choose_formats(traced, names, recipe.default, recipe.rules)  # a wrong pattern: before the work
    with contextlib.ExitStack() as stack:
        folder = told.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        calibration = _calibrate(checkpoint, told.calibration, folder, progress)
        scalings = _find_scalings(checkpoint, recipe, calibration, progress)
        yield with_recipe(target, recipe, calibration, scalings)


def with_activations_as_told(
    target: Target,
    told: Quantization,
    checkpoint: Checkpoint,
    traced: ir.Model,
    shaped: ir.Model,
    progress: Callable[[str], object],
) -> Target:
    """The target with integer activations if the command line says so.

    Args:
        traced: the float graph, which is run over the text.
        shaped: the same after ``target.passes``.
        progress: told what is being done.

    Raises:
        ValueError: a calibration text that cannot be used, or a target without the choice.
    """
    if told.integer is None:
        return target
    names = values_to_measure(shaped, target, told.integer)
    ids = _read_ids(checkpoint, told.calibration, _INTEGERS)
    layers = checkpoint.config.num_hidden_layers // 2 + 2
    advance = _count_layers("measuring activations", layers, progress, begun=-1)  # the embedding
    first = [each for each in target.passes if is_pass(each, equalize)]
    ranges = measure_ranges(
        run_passes(traced, first),  # the numbers that the target's graph computes
        ids,
        names,
        clip=told.ranges or "mse",
        library=library_path(),
        progress=advance,
    )
    return with_activations(target, told.integer, ranges)


def _recipe(target: Target, told: Quantization) -> Recipe | None:
    recipe = recipe_of(target)
    if told.recipe is not None:
        try:
            contents = json.loads(told.recipe.read_text(encoding="utf-8"))
            scale_type = "float32" if recipe is None else recipe.default.scale_type
            recipe = recipe_from_json(contents, scale_type)
        except OSError as error:
            raise ValueError(f"recipe {told.recipe} cannot be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"recipe {told.recipe} is no JSON ({error}): correct it") from error
        except ValueError as error:
            raise ValueError(f"recipe {told.recipe}: {error}") from error
    if told.quantizer is not None:
        recipe = (recipe or Recipe()).with_quantizer(told.quantizer)
    if told.equalize:
        recipe = replace(recipe or Recipe(), equalize=True)
    _refuse_idle(told, calibrated=recipe is not None and recipe.calibrated)
    return recipe


def _refuse_idle(told: Quantization, *, calibrated: bool) -> None:
    if told.ranges is not None and told.integer is None:
        raise ValueError(
            f"--ranges {told.ranges} would not be used: only integer activations have ranges, so "
            f"add --activations {next(iter(INTEGER))}"
        )
    if told.calibration is not None and not calibrated and told.integer is None:
        raise CalibrationError(
            f"--calibration {told.calibration} would not be used: only the quantizer gptq, "
            "--equalize and integer activations calibrate, so add --quantizer gptq, or for an NPU "
            f"--activations {next(iter(INTEGER))}"
        )
    if told.folder is not None and not calibrated:
        raise CalibrationError(
            f"--calibration-cache {told.folder} would not be used: only the quantizer gptq and "
            "--equalize keep what they calibrate, so add --quantizer gptq"
        )


def _calibrate(
    checkpoint: Checkpoint, text: Path | None, folder: Path, progress: Callable[[str], object]
) -> Calibration:
    ids = _read_ids(checkpoint, text, _CALIBRATED)
    layers = checkpoint.config.num_hidden_layers
    advance = _count_layers("calibrating", layers, progress)
    return collect(checkpoint, ids, folder, progress=advance)


def _find_scalings(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    progress: Callable[[str], object],
) -> Scalings | None:
    if not recipe.equalized:
        return None
    layers = checkpoint.config.num_hidden_layers
    advance = _count_layers("evening out inputs", layers, progress)
    advance(0)
    return find_scalings(
        checkpoint, lambda name: recipe.format_of(name, layers), calibration, advance
    )


def _count_layers(
    work: str, layers: int, progress: Callable[[str], object], begun: int = 0
) -> Callable[[int], None]:
    """Tells how many layers are done, each time it is told of more."""
    done = begun

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"{work}: {done} of {layers} layers")

    return advance


def _read_ids(checkpoint: Checkpoint, text: Path | None, who_needs: str) -> list[int]:
    """Tokens of the text that is told, or of the one beside the weights."""
    contents = _read_text(checkpoint, text, who_needs)
    with tokenizer_files(checkpoint.folder, "calibration") as folder:
        return Tokenizer(folder).encode(contents)


def _read_text(checkpoint: Checkpoint, told: Path | None, who_needs: str) -> str:
    text = told or checkpoint.folder / TEXT
    if told is None and not text.is_file():
        raise CalibrationError(
            f"{who_needs} text of the kind the model is for: give a UTF-8 file of "
            f"some 50 KB as --calibration FILE, or put one at {text}"
        )
    return read_text(text)
