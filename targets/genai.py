"""genai_config.json: what ONNX Runtime GenAI must know to run a package.

It refuses keys it does not know, so this file holds nothing of our own. The names of recurrent
states (``past_key_values.%d.conv_state`` and ``.recurrent_state``) are fixed in the library.

Source: behaviour of onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from targets.graphs import file_of
from targets.target import Target

# Its buffers have this length from the start: 168 MB of float16 at the published shape.
_MAX_LENGTH = 32_768

# Other states, such as the scales of caches of 8 bits, are inputs that it would not feed.
_STATE = re.compile(r"past_key_values\.\d+\.(key|value|conv_state|recurrent_state)")

# Sampling of the published model card.
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def genai_config(
    graphs: Mapping[str, ir.Model], *, target: Target, session_options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Describe a model; None where it has states that ONNX Runtime GenAI does not know.

    Args:
        graphs: of the package, by the names of their files, with metadata ``sambay.config``.
        target: that the package is for.
        session_options: of the target, with the name of the native library where there is one.
    """
    model = next(iter(graphs.values()))
    pasts = [value.name or "" for each in graphs.values() for value in each.graph.inputs]
    if any(name.startswith("past_") and not _STATE.fullmatch(name) for name in pasts):
        return None
    config = json.loads(model.metadata_props["sambay.config"])
    most = model.metadata_props.get("sambay.max_tokens")  # of one call; longer prompts are cut
    tokens = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_ids"],
        "pad_token_id": config["pad_token_id"],
    }
    if target.graphs:
        run, most = _pipeline(graphs, target, session_options), None
    else:
        run = _one(graphs, config, session_options)
    return {
        "model": {
            "type": "decoder-pipeline" if target.graphs else "decoder",
            **{name: value for name, value in tokens.items() if value not in (None, [])},
            "vocab_size": config["vocab_size"],
            "context_length": config["context_length"],
            "decoder": {
                "hidden_size": config["hidden_size"],
                "num_attention_heads": config["num_attention_heads"],
                "num_key_value_heads": config["num_key_value_heads"],
                "head_size": config["hidden_size"] // config["num_attention_heads"],
                "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                **run,
            },
        },
        "search": {
            "max_length": min(
                config["context_length"], target.max_context or _MAX_LENGTH, _MAX_LENGTH
            ),
            "past_present_share_buffer": True,
            **({"chunk_size": int(most)} if most else {}),
            **_SAMPLING,
        },
    }


def _one(
    graphs: Mapping[str, ir.Model], config: Mapping[str, Any], session_options: Mapping[str, Any]
) -> dict[str, Any]:
    """How one graph is run."""
    (filename,) = graphs
    return {
        "filename": filename,
        "session_options": dict(session_options),
        "sliding_window": {
            "window_size": config["sliding_window"],
            "slide_key_value_cache": False,  # the graph writes them as rings
            "slide_inputs": False,
            "layers": list(range(1, config["num_hidden_layers"] // 2, 2)),
        },
    }


def _pipeline(
    graphs: Mapping[str, ir.Model], target: Target, session_options: Mapping[str, Any]
) -> dict[str, Any]:
    """How several graphs are run: some on prompts, which are cut to their size, some on tokens."""
    stages = []
    for graph in target.graphs:
        model = graphs[file_of(graph)].graph
        stage = {
            "filename": file_of(graph),
            "inputs": [value.name for value in model.inputs],
            "outputs": [value.name for value in model.outputs],
            "run_on_prompt": graph.tokens != 1,
            "run_on_token_gen": graph.tokens in (None, 1),
            "session_options": {"provider_options": []},
        }
        if graph.provider == target.provider:
            stage["session_options"] = dict(session_options)
        stages.append({graph.name: stage})
    return {
        "session_options": {"provider_options": []},
        "sliding_window": {
            "window_size": max(graph.tokens or 1 for graph in target.graphs),
            "pad_value": 0,
            "alignment": "right",
            "slide_key_value_cache": False,
            "slide_inputs": True,
        },
        "pipeline": stages,
    }
