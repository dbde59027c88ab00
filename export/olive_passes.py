"""Passes for Olive: the exporter, a target's recipe, and the quantizer for any ONNX model.

Olive finds passes by a package config, and one that is given replaces its own. So this prints
Olive's with ours added, which a run then takes; examples/olive holds runs:

    python -m export.olive_passes > olive_package.json
    olive run --config examples/olive/cpu_int4.json --package-config olive_package.json
"""

from __future__ import annotations

import dataclasses
import glob
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from olive.model import ONNXModelHandler, PyTorchModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from export.checkpoint import CheckpointError, find_non_finite, open_checkpoint
from export.model import SambaY
from export.tokenizer import write_tokenizer
from export.trace import trace
from export.weights import load_weights
from graph_passes.infer_types import infer_types
from graph_passes.pipeline import graph_pass, run_passes
from graph_passes.quantize_matmul import find_linear_layers, quantize_matmul
from graph_passes.recipe import Recipe, Rule, recipe_from_json
from graph_passes.streamed_tensor import StreamedTensor
from runtime_py.native import library_path
from targets import find_target
from targets.package import DATA, MODEL, write_package
from targets.recipes import recipe_of, with_recipe

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def load_sambay(folder: str) -> SambaY:
    """The torch model of a checkpoint: what a run's ``model_loader`` is, for Olive's own passes."""
    return load_weights(open_checkpoint(folder)).eval()


class SambaYExport(Pass):
    """A checkpoint folder to the traced ONNX model, weights as stored, tokenizer files beside it.

    The input is a ``PyTorchModel`` whose ``model_path`` is the folder; torch never loads it.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            "all_logits": PassConfigParam(
                type_=bool,
                default_value=False,
                description="logits of every token and the output of every layer, to evaluate with",
            )
        }

    def _run_for_config(
        self, model: PyTorchModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, PyTorchModelHandler):
            raise ValueError(
                f"SambaYExport was given a {type(model).__name__}, expected a PyTorchModel whose "
                "model_path is a checkpoint folder; to go on from ONNX take SambaYTarget"
            )
        checkpoint = open_checkpoint(model.model_path)
        if (damaged := find_non_finite(checkpoint)) is not None:
            raise CheckpointError(
                f"tensor {damaged!r} of {checkpoint.folder} holds NaN or infinity, expected finite "
                "weights: the checkpoint is damaged, fetch it again"
            )
        folder = _folder(output_model_path)
        write_tokenizer(checkpoint.folder, folder)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        _save(trace(checkpoint, all_logits=config.all_logits), folder)
        return _handler(folder, files)


class SambaYTarget(Pass):
    """What SambaYExport made, to the package of a target: the same that ``phi4export`` writes."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            "target": PassConfigParam(
                type_=str, required=True, description="a name of phi4export --list-targets"
            ),
            "recipe": PassConfigParam(
                type_=dict,
                default_value=None,
                description="which weights are stored how, in place of the target's own choice",
            ),
            "portable": PassConfigParam(
                type_=bool, default_value=False, description="leave out the native operators"
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        target = find_target(config.target)
        if config.recipe is not None:
            own = recipe_of(target)  # its scales are the target's, as with phi4export --recipe
            scale_type = "float32" if own is None else own.default.scale_type
            recipe = _uncalibrated(recipe_from_json(config.recipe, scale_type))
            target = with_recipe(target, recipe)
        traced = ir.load(model.model_path)
        if "sambay.config" not in traced.metadata_props or "sambay.target" in traced.metadata_props:
            raise ValueError(
                f"{model.model_path} is not as SambaYExport leaves a model, expected metadata "
                "'sambay.config' and no 'sambay.target': put a SambaYExport before SambaYTarget"
            )
        tokenizer = [
            Path(file) for file in (model.model_attributes or {}).get("additional_files", ())
        ]

        def add_tokenizer(folder: Path) -> None:
            for file in tokenizer:
                (folder / file.name).write_bytes(file.read_bytes())

        package = write_package(
            run_passes(traced, target.passes),
            Path(output_model_path),
            target=target,
            facts={"tool": "olive"},
            library=None if config.portable else library_path(target.provider),
            extra_files=add_tokenizer,
            force=True,  # Olive has made an empty folder there
        )
        files = [path for path in sorted(package.iterdir()) if path.name not in (MODEL, DATA)]
        return _handler(package, files)


class BlockQuantization(Pass):
    """MatMul by a weight to MatMulNBits, in any ONNX model: 4 or 8 bits in blocks.

    Float32 and float16 products are quantized, others stay. Weights are read a few rows at a time.
    Scales are [outputs, blocks], the form that every provider's kernels take.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            "recipe": PassConfigParam(
                type_=dict,
                default_value=None,
                description="default and rules, as in a file that phi4export --recipe reads",
            ),
            "accuracy_level": PassConfigParam(
                type_=int,
                default_value=4,
                description="what the runtime computes in: 0 as the input, 4 int8, fast on a CPU",
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        described = dict(config.recipe or {})
        if described.setdefault("embedding", None) is not None:
            raise ValueError(
                "the recipe has a format for 'embedding', but BlockQuantization stores products "
                "only: remove it, or take SambaYTarget"
            )
        recipe = _uncalibrated(recipe_from_json(described))
        if recipe.default.scale_type != "float32":
            raise ValueError(
                f"the recipe's scale_type is {recipe.default.scale_type!r}, but BlockQuantization "
                "stores scales in the type of the inputs: leave it out"
            )
        typed = infer_types(ir.load(model.model_path))
        quantized = quantize_matmul(
            typed,
            **dataclasses.asdict(recipe.default),
            rules=(*_unreadable(typed), *recipe.rules),
            accuracy_level=config.accuracy_level,
        )
        folder = _folder(output_model_path)
        _save(_match_scales(quantized), folder)
        return _handler(folder, ())


def _uncalibrated(recipe: Recipe) -> Recipe:
    """The recipe, if it needs no text: Olive gives passes a model alone."""
    if recipe.calibrated:
        raise ValueError(
            "the recipe's 'gptq' or 'equalize' needs calibration text, which these passes do not "
            "take: choose 'search' and no 'equalize', or export with phi4export --recipe"
        )
    return recipe


PASSES: dict[type[Pass], tuple[str, ...]] = {  # and the precisions they make
    SambaYExport: ("*",),
    SambaYTarget: ("*",),
    BlockQuantization: ("int4", "int8"),
}


def package_config() -> dict[str, Any]:
    """Olive's own package config with these passes added."""
    contents = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    for each, precisions in PASSES.items():
        contents["passes"][each.__name__] = {
            "module_path": f"export.olive_passes.{each.__name__}",
            "supported_providers": ["*"],
            "supported_accelerators": ["*"],
            "supported_precisions": list(precisions),
            "supported_algorithms": [],
            "supported_quantization_encodings": [],
        }
    return contents


def _unreadable(model: ir.Model) -> Iterator[Rule]:
    """Rules that leave what MatMulNBits does not compute: other types, a vector by a matrix."""
    for node, path in find_linear_layers(model):
        rows = node.inputs[0]
        assert rows is not None
        if rows.dtype not in _FLOATS or (rows.shape is not None and rows.shape.rank() < 2):
            yield glob.escape(path.weight.name or ""), None


@graph_pass
def _match_scales(model: ir.Model) -> None:
    """Store scales in the type of the input that they are multiplied with."""
    for node in model.graph:
        if node.op_type != "MatMulNBits":
            continue
        rows, _, scales, *_ = node.inputs
        assert rows is not None
        assert scales is not None
        tensor = scales.const_value
        if rows.dtype == ir.DataType.FLOAT16 and isinstance(tensor, StreamedTensor):
            scales.const_value = _half(tensor)
            scales.type = ir.TensorType(ir.DataType.FLOAT16)


def _half(source: StreamedTensor) -> StreamedTensor:
    def chunks() -> Iterable[np.ndarray]:
        return (part.astype(np.float16) for part in source.chunks())

    return StreamedTensor(
        chunks, dtype=ir.DataType.FLOAT16, shape=source.shape.numpy(), name=source.name or ""
    )


def _folder(output_model_path: str) -> Path:
    folder = Path(output_model_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(model: ir.Model, folder: Path) -> None:
    ir.save(model, folder / MODEL, external_data=DATA)


def _handler(folder: Path, files: Iterable[Path]) -> ONNXModelHandler:
    attributes = {"additional_files": [str(file) for file in files]}
    return ONNXModelHandler(str(folder), onnx_file_name=MODEL, model_attributes=attributes)


if __name__ == "__main__":
    json.dump(package_config(), sys.stdout, indent=2)
    print()
