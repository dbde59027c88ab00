"""Write the model as a checkpoint folder in the published layout."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer

from export.config import SambaYConfig
from export.model import SambaY
from export.tensors import expected_tensors
from reference_model.vocabulary import MODEL_MAX_LENGTH, write_tokenizer

CONFIG = SambaYConfig(
    vocab_size=800,  # the vocabulary has a few tokens less
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    sliding_window=32,
    context_length=MODEL_MAX_LENGTH,
    max_position_embeddings=MODEL_MAX_LENGTH,
)


def write_checkpoint(model: SambaY, tokenizer: Tokenizer, folder: Path) -> None:
    """Write configuration, tokenizer and weights; the weights are rounded to bfloat16.

    A_log and the lambda vectors stay float32, as in the published checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, start = (tokenizer.token_to_id(text) for text in ("<|end|>", "<|endoftext|>"))
    config = {
        "architectures": ["Phi4FlashForCausalLM"],
        "bos_token_id": start,
        "eos_token_id": start,
        "hidden_act": "silu",
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "layer_norm_eps": CONFIG.layer_norm_eps,
        "mamba_d_conv": CONFIG.d_conv,
        "mamba_d_state": CONFIG.d_state,
        "mamba_expand": CONFIG.expand,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "mb_per_layer": 2,
        "model_type": "phi4flash",
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "pad_token_id": start,
        "sliding_window": CONFIG.sliding_window,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": CONFIG.vocab_size,
    }
    generation = {
        "bos_token_id": start,
        "do_sample": True,
        "eos_token_id": [end, start],
        "pad_token_id": start,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    for name, settings in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps(settings, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    write_tokenizer(tokenizer, folder)
    write_safetensors(model.state_dict(), folder / "model.safetensors")


def write_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights in the order and with the dtypes of the published checkpoint."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name in expected_tensors(CONFIG):
        wide = name.endswith("A_log") or ".lambda_" in name
        tensor = weights[name].detach().to(torch.float32 if wide else torch.bfloat16).contiguous()
        begin = len(data)
        data += tensor.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "F32" if wide else "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
