"""Sizes that SambaY may have, besides the goldens': dtype of the weights, and config.json."""

from typing import Any

# What the sizes have in common; the published values stand where a size does not say otherwise.
COMMON = {"model_type": "phi4flash", "vocab_size": 97, "max_position_embeddings": 4096}

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # Widths that fill no block of 32, a dt_rank that is rounded up, two taps.
    "4/4 heads": (
        "F32",
        {
            "hidden_size": 60,
            "intermediate_size": 90,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "sliding_window": 5,
            "mamba_d_conv": 2,
            "layer_norm_eps": 1e-3,
        },
    ),
    # Twelve layers, three taps, expand 3, a head of its own, the window as a list.
    "12/4 heads": (
        "BF16",
        {
            "hidden_size": 72,
            "intermediate_size": 100,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "sliding_window": [None, 7] * 3 + [None] * 6,
            "mamba_d_conv": 3,
            "mamba_expand": 3,
            "mamba_d_state": 5,
            "tie_word_embeddings": False,
        },
    ),
    # Groups of five, an odd head size, five taps; one scan state, a window of the token itself.
    "10/2 heads": (
        "F16",
        {
            "hidden_size": 70,
            "intermediate_size": 33,
            "num_hidden_layers": 4,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "sliding_window": 1,
            "mamba_d_conv": 5,
            "mamba_d_state": 1,
            "mamba_expand": 1,
            "layer_norm_eps": 1e-6,
        },
    ),
}

REAL_WIDTHS = {  # but for the MLP's, halved to need less memory
    "hidden_size": 2560,
    "intermediate_size": 5120,
    "num_hidden_layers": 8,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "vocab_size": 4096,
}
