import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.config import ConfigError, SambaYConfig, read_config

GOLDEN = Path(__file__).parents[1] / "golden" / "A8" / "config.json"
SETTINGS: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


def read(folder: Path, **changes: Any) -> SambaYConfig:
    """Read the golden config with some keys changed, or removed where the change is ``...``."""
    settings = {key: value for key, value in (SETTINGS | changes).items() if value is not ...}
    write(folder, "config", settings)
    return read_config(folder)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_absent_mamba_keys_take_the_published_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.d_state, config.d_conv, config.expand) == (16, 4, 2)


def test_every_size_is_read_from_the_config(tmp_path: Path) -> None:
    config = read(tmp_path, mamba_d_state=5, mamba_d_conv=3, mamba_expand=3, layer_norm_eps=1e-3)
    assert (config.d_state, config.d_conv, config.expand) == (5, 3, 3)
    assert config.layer_norm_eps == 1e-3
    assert config.hidden_size == SETTINGS["hidden_size"]


def test_keys_the_published_code_ignores_are_ignored(tmp_path: Path) -> None:
    ignored = {"mamba_dt_rank": 99, "mamba_conv_bias": False, "mlp_bias": True, "rope_theta": None}
    assert read(tmp_path, **ignored) == read(tmp_path)


@given(st.lists(st.sampled_from([None, 24]), min_size=1, max_size=8).filter(any))
def test_a_window_list_means_the_one_integer_in_it(
    tmp_path_factory: pytest.TempPathFactory, windows: list[int | None]
) -> None:
    assert read(tmp_path_factory.mktemp("config"), sliding_window=windows).sliding_window == 24


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ({"eos_token_id": [7, 9, 7]}, 3, (7, 9)),
        ({"eos_token_id": 7}, 3, (7,)),
        ({}, 3, (3,)),
        (None, [3, 4], (3, 4)),
        (None, None, ()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, generation: Any, own: Any, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        write(tmp_path, "generation_config", generation)
    assert read(tmp_path, eos_token_id=own).eos_token_ids == expected


@pytest.mark.parametrize(
    ("model_max_length", "longest", "expected"),
    [
        (65_536, 262_144, 65_536),
        (8000, 4096, 4096),
        (1e30, 262_144, 65_536),
        (int(1e30), 4096, 4096),
        (None, 262_144, 65_536),
    ],
)
def test_context_length_is_the_tokenizers_but_never_longer_than_allowed(
    tmp_path: Path, model_max_length: float | None, longest: int, expected: int
) -> None:
    write(tmp_path, "tokenizer_config", {"model_max_length": model_max_length})
    assert read(tmp_path, max_position_embeddings=longest).context_length == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi4flash'"),
        ({"model_type": ...}, "lacks model_type"),
        ({"mb_per_layer": 3}, "mb_per_layer is 3, expected 2"),
        ({"hidden_size": ..., "vocab_size": ...}, "lacks vocab_size, hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True, expected a positive integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected a positive integer"),
        ({"hidden_size": 68}, "hidden_size is 68, expected a multiple of num_attention_heads 8"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6, expected a multiple of 4"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7, expected an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected an even number"),
        ({"num_key_value_heads": 6}, "expected a multiple of num_key_value_heads 6"),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1, expected at least 2"),
        ({"sliding_window": [8, 16]}, "sliding_window is [8, 16]"),
        ({"sliding_window": [None, None]}, "sliding_window is [None, None]"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"sliding_window": [[8]]}, "sliding_window is [[8]]"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny'"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        (
            {"eos_token_id": [3, 10**6]},
            "eos_token_id is [3, 1000000], expected ids below vocab_size",
        ),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
    ],
    ids=str,
)
def test_a_config_of_no_sambay_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    read(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_config(tmp_path)
