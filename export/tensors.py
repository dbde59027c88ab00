"""The tensors a SambaY checkpoint must hold: official names, shapes from the config."""

from __future__ import annotations

from export.config import SambaYConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # only where the head is not tied to the embedding

Shape = tuple[int, ...]


def expected_tensors(config: SambaYConfig) -> dict[str, Shape]:
    """Name and shape of every tensor, in the order the model reads them; a tied head.

    Matrices are [out, in]. The published shape has 434 of them.

    Source: the index of the published checkpoint.
    """
    hidden = config.hidden_size
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= _norm(prefix + "input_layernorm.", hidden)
        mixer = _mixer(config, layer)
        tensors |= {f"{prefix}attn.{name}": shape for name, shape in mixer.items()}
        tensors |= _norm(prefix + "post_attention_layernorm.", hidden)
        tensors[prefix + "mlp.fc1.weight"] = (2 * config.intermediate_size, hidden)
        tensors[prefix + "mlp.fc2.weight"] = (hidden, config.intermediate_size)
    return tensors | _norm("model.final_layernorm.", hidden)


def layer_of(name: str) -> int | None:
    """Layer a tensor belongs to; None for embedding, final norm and head."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _norm(prefix: str, width: int) -> dict[str, Shape]:
    return {prefix + "weight": (width,), prefix + "bias": (width,)}


def _mixer(config: SambaYConfig, layer: int) -> dict[str, Shape]:
    kind = config.layer_kind(layer)
    if kind == "mamba":
        return _mamba(config)
    if kind == "gmu":
        return {
            "in_proj.weight": (config.d_inner, config.hidden_size),
            "out_proj.weight": (config.hidden_size, config.d_inner),
        }
    return _attention(config, cross=kind == "cross_attention")


def _mamba(config: SambaYConfig) -> dict[str, Shape]:
    hidden, inner, states, rank = (
        config.hidden_size,
        config.d_inner,
        config.d_state,
        config.dt_rank,
    )
    return {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, hidden),
        "conv1d.weight": (inner, 1, config.d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def _attention(config: SambaYConfig, *, cross: bool) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_size
    heads = config.num_attention_heads
    # Cross layers project queries only, yet keep the name.
    rows = (heads if cross else heads + 2 * config.num_key_value_heads) * head
    lambdas = {f"inner_cross_attn.lambda_{part}": (head,) for part in ("q1", "k1", "q2", "k2")}
    return {
        "Wqkv.weight": (rows, hidden),
        "Wqkv.bias": (rows,),
        **lambdas,
        "inner_cross_attn.subln.weight": (2 * head,),
        "out_proj.weight": (hidden, heads * head),
        "out_proj.bias": (hidden,),
    }
