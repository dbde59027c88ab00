"""Optimum exports phi4flash, states included, through its own commands and functions:

    python -m export.optimum_hook export onnx --model CHECKPOINT OUTPUT \\
        --task text-generation-with-past --library transformers

``register()`` is enough for programs that call ``optimum.exporters.onnx.main_export``. Optimum
loads the model, describes inputs and outputs and compares the result with torch; the graph itself
is our exporter's, with the passes of cpu-fp32, as Optimum's tracer knows none of our operators.
Its ``ORTModelForCausalLM`` carries no recurrent states: run the result by ``runtime_py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from optimum.exporters.onnx.base import OnnxConfigWithPast
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from export.checkpoint import CheckpointError, find_non_finite, open_checkpoint
from export.states import State, all_states
from export.tokenizer import write_tokenizer
from export.trace import trace
from export.weights import load_weights
from graph_passes.pipeline import run_passes
from targets import find_target

MODEL_TYPE = "phi4flash"
# Of the sample inputs, all different; a window is at least the model's, here 3 more.
_BATCH, _TOKENS, _TOTAL, _WINDOW, _CAPACITY = 2, 5, 11, 3, 17


class Phi4FlashConfig(PretrainedConfig):
    """A checkpoint's config.json, as transformers hands it on."""

    model_type = MODEL_TYPE


class Phi4FlashModel(nn.Module):
    """The torch model with the names that Optimum wants: flat results, by name."""

    # Optimum tells a model's library by its module: that of code which comes with a checkpoint.
    __module__ = "transformers_modules.phi4flash"
    config_class = Phi4FlashConfig

    def __init__(self, folder: str, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.checkpoint, self.config = open_checkpoint(folder), config
        self.states = all_states(self.checkpoint.config)
        self.sambay = load_weights(self.checkpoint).eval()

    @classmethod
    def from_pretrained(cls, folder: str, *, config: Phi4FlashConfig, **_: Any) -> Phi4FlashModel:
        """Read a folder in Hugging Face layout; weights become float32, whatever is asked for."""
        return cls(folder, config)

    def can_generate(self) -> bool:
        """Nothing of transformers' generation applies: it carries keys and values only."""
        return False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[Tensor]
    ) -> dict[str, Tensor]:
        """Logits of the last token, [batch, 1, vocab], and the states, by name."""
        names = ["logits", *(state.present for state in self.states)]
        if torch.jit.is_tracing():  # a stand-in with the right inputs and outputs, soon replaced
            some = (input_ids[:, -1:, None] + attention_mask[:, -1:, None]).float()
            return dict(zip(names, [some, *(state + 0 for state in past_key_values)], strict=True))
        pairs = list(zip(past_key_values[0::2], past_key_values[1::2], strict=True))
        logits, present, _ = self.sambay(input_ids, attention_mask, pairs)
        flat = [tensor for pair in present for tensor in pair]
        return dict(zip(names, [logits, *flat], strict=True))


class Phi4FlashOnnxConfig(OnnxConfigWithPast):
    """Inputs and outputs of the graph in docs/architecture.md."""

    DEFAULT_ONNX_OPSET = 20
    NORMALIZED_CONFIG_CLASS = staticmethod(lambda config, **_: config)
    ATOL_FOR_VALIDATION = 1e-4

    @property
    def states(self) -> tuple[State, ...]:
        """Of the checkpoint that is exported."""
        return all_states(open_checkpoint(self._config._name_or_path).config)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Symbolic dimensions by input."""
        plain = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "total"}}
        return plain | {state.past: _symbolic(state) for state in self.states}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Symbolic dimensions by output."""
        return {"logits": {0: "batch"}, **{s.present: _symbolic(s) for s in self.states}}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, Any]:
        """Sample inputs; Optimum's sizes are not taken, as its caches have no window."""
        window = open_checkpoint(self._config._name_or_path).config.sliding_window + _WINDOW
        sizes = {"batch": _BATCH, "window": window, "capacity": _CAPACITY}
        shapes = [[sizes.get(str(axis), axis) for axis in state.shape] for state in self.states]
        sample: dict[str, Any] = {
            "input_ids": np.arange(10, 10 + _BATCH * _TOKENS).reshape(_BATCH, _TOKENS),
            "attention_mask": np.ones((_BATCH, _TOTAL), np.int64),
            "past_key_values": [np.zeros(shape, np.float32) for shape in shapes],
        }
        if framework == "np":
            return sample
        return {
            name: [torch.from_numpy(each) for each in value]
            if isinstance(value, list)
            else torch.from_numpy(value)
            for name, value in sample.items()
        }

    def flatten_output_collection_property(self, name: str, field: Any) -> dict[str, Any]:
        """States by the names of the inputs."""
        del name
        return dict(zip((state.past for state in self.states), field, strict=True))

    def fix_dynamic_axes(self, model_path: Path, *_: Any, **__: Any) -> None:
        """Write our graph in the place of Optimum's, and the tokenizer's files beside it."""
        checkpoint = open_checkpoint(self._config._name_or_path)
        if (damaged := find_non_finite(checkpoint)) is not None:
            raise CheckpointError(
                f"tensor {damaged!r} of {checkpoint.folder} holds NaN or infinity, expected finite "
                "weights: the checkpoint is damaged, fetch it again"
            )
        model = run_passes(trace(checkpoint), find_target("cpu-fp32").passes)
        ir.save(model, model_path, external_data=f"{model_path.name}_data")
        write_tokenizer(checkpoint.folder, model_path.parent)


def _symbolic(state: State) -> dict[int, str]:
    return {i: axis for i, axis in enumerate(state.shape) if isinstance(axis, str)}


def register() -> None:
    """Tell transformers and Optimum of phi4flash; once a process."""
    AutoConfig.register(MODEL_TYPE, Phi4FlashConfig, exist_ok=True)
    AutoModelForCausalLM.register(Phi4FlashConfig, Phi4FlashModel, exist_ok=True)
    add = TasksManager.create_register("onnx", overwrite_existing=True)
    add(MODEL_TYPE, "text-generation-with-past")(Phi4FlashOnnxConfig)


def main() -> None:
    """``optimum-cli`` that knows phi4flash."""
    from optimum.commands.optimum_cli import main as optimum_cli

    register()
    optimum_cli()


if __name__ == "__main__":
    main()
