"""Sizes of a SambaY model and the kind of each layer, read from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LayerKind = Literal["mamba", "window_attention", "full_attention", "gmu", "cross_attention"]


class ConfigError(ValueError):
    """A config.json that does not describe a SambaY model this project can export."""


@dataclass(frozen=True, kw_only=True)
class SambaYConfig:
    """Every size the graph depends on. Defaults are the published code's.

    Attributes:
        d_state, d_conv, expand: mamba_d_state (N), mamba_d_conv (K), mamba_expand.
        eos_token_ids: any of them ends an answer.
        context_length: tokens the model was made for (the tokenizer's model_max_length).
        max_position_embeddings: tokens no session may exceed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    context_length: int = 65_536
    max_position_embeddings: int = 262_144

    @property
    def head_size(self) -> int:
        """D: width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """E: channels of a Mamba layer."""
        return self.expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """R: always ceil(hidden_size / 16); the published code ignores mamba_dt_rank."""
        return math.ceil(self.hidden_size / 16)

    @property
    def memory_layer(self) -> int:
        """M: the Mamba layer whose scan the gated memory units read."""
        return self.num_hidden_layers // 2

    @property
    def shared_layer(self) -> int:
        """M + 1: the full attention layer whose keys and values the cross layers read."""
        return self.memory_layer + 1

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of a layer by its 0-based index."""
        if layer % 2 == 0:
            return "mamba" if layer <= self.memory_layer else "gmu"
        if layer < self.memory_layer:
            return "window_attention"
        return "full_attention" if layer == self.shared_layer else "cross_attention"

    def lambda_init(self, layer: int) -> float:
        """Constant part of a layer's lambda, from the Differential Transformer."""
        return 0.8 - 0.6 * math.exp(-0.3 * layer)

    def to_json(self) -> str:
        """The text of the model's ``sambay.config`` metadata."""
        return json.dumps(dataclasses.asdict(self))


def read_config(folder: Path) -> SambaYConfig:
    """Read the sizes and token ids of a checkpoint folder in Hugging Face layout.

    Reads ``config.json`` and, where they exist, ``generation_config.json`` (end tokens) and
    ``tokenizer_config.json`` (context length). Keys the published code ignores are ignored.

    Raises:
        ConfigError: a file is missing or no JSON, or describes no model this project can export.
    """
    path = folder / "config.json"
    settings = read_json_object(path)
    _require_sambay(settings, path)
    missing = [name for name in _REQUIRED if name not in settings]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}: take the config.json of the published checkpoint"
        )
    sizes = {name: _size(settings, name, path) for name in _SIZES}
    optional = {
        field: _size(settings, name, path)
        for name, field in _OPTIONAL_SIZES.items()
        if settings.get(name) is not None
    }
    config = SambaYConfig(
        **sizes,
        **optional,
        sliding_window=_window(settings["sliding_window"], path),
        layer_norm_eps=_epsilon(settings, path),
        bos_token_id=_token_id(settings, "bos_token_id", path),
        pad_token_id=_token_id(settings, "pad_token_id", path),
        eos_token_ids=_end_tokens(settings, path, sizes["vocab_size"]),
    )
    _check_shape(config, path)
    return dataclasses.replace(
        config, context_length=_context_length(folder, config.max_position_embeddings)
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        ConfigError: the file is missing, cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: give a checkpoint folder in Hugging Face layout"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a JSON {type(value).__name__}, expected an object: download it again"
        )
    return value


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_REQUIRED = ("model_type", *_SIZES, "sliding_window")
_OPTIONAL_SIZES = {  # absent from the published config.json but for the last
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_expand": "expand",
    "max_position_embeddings": "max_position_embeddings",
}

# A tokenizer without a limit says so by a number such as 1e30.
_UNLIMITED = 10**12


def _require_sambay(settings: dict[str, Any], path: Path) -> None:
    found = settings.get("model_type", "phi4flash")
    if found != "phi4flash":
        raise ConfigError(
            f"{path}: model_type is {_short(found)}, expected 'phi4flash': "
            "only SambaY checkpoints can be exported"
        )
    found = settings.get("mb_per_layer", 2)
    if found != 2 or isinstance(found, bool):
        raise ConfigError(
            f"{path}: mb_per_layer is {_short(found)}, expected 2: "
            "only layers that alternate Mamba and attention can be exported"
        )


def _size(settings: dict[str, Any], name: str, path: Path) -> int:
    value = settings[name]
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{path}: {name} is {_short(value)}, expected a positive integer: correct it"
        )
    return value


def _window(value: Any, path: Path) -> int:
    # The published code turns the one int into a list per layer, None where there is no window.
    entries = value if isinstance(value, list) else [value]
    windows = [entry for entry in entries if entry is not None]
    if not windows or any(type(entry) is not int for entry in windows) or len(set(windows)) > 1:
        raise ConfigError(
            f"{path}: sliding_window is {_short(value)}, expected one integer, "
            "or a list that holds one integer and nulls: correct it"
        )
    if windows[0] < 1:
        raise ConfigError(
            f"{path}: sliding_window is {windows[0]}, expected at least 1: correct it"
        )
    return windows[0]


def _epsilon(settings: dict[str, Any], path: Path) -> float:
    value = settings.get("layer_norm_eps", 1e-5)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(
            f"{path}: layer_norm_eps is {_short(value)}, "
            "expected a number between 0 and 1: correct it"
        )
    return float(value)


def _token_id(settings: dict[str, Any], name: str, path: Path) -> int | None:
    value = settings.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"{path}: {name} is {_short(value)}, expected a token id or null: correct it"
        )
    return value


def _end_tokens(settings: dict[str, Any], path: Path, vocabulary: int) -> tuple[int, ...]:
    """End tokens of generation_config.json, else of config.json: one id or a list, order kept."""
    generation = path.with_name("generation_config.json")
    if generation.exists():
        chosen = read_json_object(generation)
        if chosen.get("eos_token_id") is not None:
            settings, path = chosen, generation
    value = settings.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ConfigError(
            f"{path}: eos_token_id is {_short(value)}, "
            "expected a token id or a list of them: correct it"
        )
    if any(token >= vocabulary for token in ids):
        raise ConfigError(
            f"{path}: eos_token_id is {_short(value)}, expected ids below vocab_size {vocabulary}, "
            "or no answer would end: correct it"
        )
    return tuple(dict.fromkeys(ids))


def _context_length(folder: Path, longest: int) -> int:
    """Tokens the model was made for, at most ``longest``."""
    usual = min(SambaYConfig.context_length, longest)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return usual
    value = read_json_object(path).get("model_max_length")
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ConfigError(
            f"{path}: model_max_length is {_short(value)}, expected a number of tokens: correct it"
        )
    return usual if value > _UNLIMITED else min(int(value), longest)


def _check_shape(config: SambaYConfig, path: Path) -> None:
    """Refuse sizes that cannot be put together to a SambaY model."""
    layers, width = config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    faults = {
        f"num_hidden_layers is {layers}, expected a multiple of 4": layers % 4,
        f"num_attention_heads is {heads}, expected an even number": heads % 2,
        f"num_key_value_heads is {kv_heads}, expected an even number": kv_heads % 2,
        f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads {kv_heads}": (
            heads % kv_heads
        ),
        f"hidden_size is {width}, expected a multiple of num_attention_heads {heads}": (
            width % heads
        ),
        f"mamba_d_conv is {config.d_conv}, expected at least 2": config.d_conv < 2,
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(f"{path}: {fault}: correct it, or export another checkpoint")


def _short(value: Any) -> str:
    """A found value on one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
