"""What ``phi4export --inspect`` prints of a checkpoint; only headers are read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from export.checkpoint import Checkpoint, StoredTensor
from export.config import SambaYConfig
from export.console import whole
from export.tensors import layer_of

DEPTHS = (0, 2048, 8192, 32_768, 65_536)  # tokens a session holds
_FLOAT = 4  # bytes; states but for the caches are float32
_CELL = {"float32": 4, "float16": 2, "int8": 1}  # bytes of a cache's element, by --cache
_SCALE = {"float32": 0, "float16": 0, "int8": 2}  # and of each of its heads and tokens


def describe(checkpoint: Checkpoint) -> RenderableType:
    """Sizes, layers, and memory of the states by depth, for a rich console."""
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    head = "tied to the embedding" if checkpoint.tied_head else "lm_head.weight"
    facts = (
        f"{len(tensors)} tensors, {checkpoint.total_bytes} bytes ({dtypes})",
        f"{_parameters(tensors)} parameters in {config.num_hidden_layers} layers",
        f"hidden {config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}",
        f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads "
        f"of {config.head_size}, window {config.sliding_window}",
        f"Mamba: {config.d_inner} channels, {config.d_state} states, {config.d_conv} taps, "
        f"step rank {config.dt_rank}",
        f"context {config.context_length} tokens, at most {config.max_position_embeddings}",
        f"output head: {head}",
    )
    return Group(*facts, "", _layers(checkpoint), "", _states(config))


def state_bytes(config: SambaYConfig, tokens: int, cache: str = "float32") -> dict[str, int]:
    """Bytes one sequence carries after ``tokens`` tokens, by kind of state.

    Only "shared keys, values" grows; window rings have their full length from the start.
    """
    kinds = [config.layer_kind(layer) for layer in range(config.num_hidden_layers)]
    mamba, windows = kinds.count("mamba"), kinds.count("window_attention")
    head = config.head_size * _CELL[cache] + _SCALE[cache]
    key_value = 2 * config.num_key_value_heads * head  # bytes a token
    return {
        "convolution": mamba * config.d_inner * (config.d_conv - 1) * _FLOAT,
        "scan": mamba * config.d_inner * config.d_state * _FLOAT,
        "window rings": windows * config.sliding_window * key_value,
        "shared keys, values": tokens * key_value,
    }


def _layers(checkpoint: Checkpoint) -> Table:
    groups: dict[int | None, list[StoredTensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        groups[layer_of(tensor.name)].append(tensor)
    table = Table("layer", "kind", title="Layers", title_justify="left")
    for column in ("parameters", "bytes"):
        table.add_column(column, justify="right")
    for layer in range(checkpoint.config.num_hidden_layers):
        kind = checkpoint.config.layer_kind(layer).replace("_", " ")
        _add_row(table, str(layer), kind, groups[layer])
    _add_row(table, "", "embedding, final norm, head", groups[None])
    return whole(table)


def _add_row(table: Table, layer: str, kind: str, tensors: list[StoredTensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors)
    table.add_row(layer, kind, str(_parameters(tensors)), str(size))


def _states(config: SambaYConfig) -> Table:
    table = Table("state", title="Memory of the states, by --cache", title_justify="left")
    for tokens in DEPTHS:
        table.add_column(f"{tokens // 1024}K" if tokens else "0 tokens", justify="right")
    for cache in _CELL:
        by_depth = [state_bytes(config, tokens, cache) for tokens in DEPTHS]
        for kind in by_depth[0]:
            kept = kind in ("convolution", "scan")  # the same with every cache
            if not kept or cache == next(iter(_CELL)):
                label = kind if kept else f"{kind}, {cache}"
                table.add_row(label, *(decimal(sizes[kind]) for sizes in by_depth))
    table.add_section()
    for cache in _CELL:
        sums = [sum(state_bytes(config, tokens, cache).values()) for tokens in DEPTHS]
        table.add_row(f"all, {cache}", *map(decimal, sums))
    return whole(table)


def _parameters(tensors: Iterable[StoredTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
