import json
import math
import struct
from pathlib import Path

import pytest
from rich.console import Console

from export.checkpoint import INDEX_FILE, open_checkpoint
from export.cli import main as phi4export
from export.config import read_config
from export.inspect import DEPTHS, describe, state_bytes
from export.tensors import expected_tensors

GOLDENS = Path(__file__).parents[1] / "golden"
PUBLISHED = {
    "model_type": "phi4flash",
    "vocab_size": 200_064,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "max_position_embeddings": 262_144,
}


def shown(folder: Path, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(describe(open_checkpoint(folder)))
    return capture.get()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Headers of the published shape; the 7.7 GB behind them are a hole in a sparse file."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    header, position = {}, 0
    for name, shape in expected_tensors(read_config(tmp_path)).items():
        wide = name.endswith("A_log") or "lambda_" in name
        end = position + math.prod(shape) * (4 if wide else 2)
        header[name] = {
            "dtype": "F32" if wide else "BF16",
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    with (tmp_path / "part.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    index = {
        "metadata": {"total_size": 7_706_608_640},
        "weight_map": dict.fromkeys(header, "part.safetensors"),
    }
    (tmp_path / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


def test_the_published_shape_has_434_tensors_and_7706608640_bytes(published: Path) -> None:
    text = shown(published)
    assert "434 tensors" in text
    assert "7706608640 bytes" in text
    assert "3852562944 parameters" in text


def test_the_command_describes_it_from_its_headers(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phi4export(["--checkpoint", str(published), "--inspect"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("434 tensors, 7706608640 bytes (BF16, F32)\n3852562944 parameters in 32 ")
    assert err == ""
    with (published / "part.safetensors").open("ab") as file:
        file.write(b"more")
    assert phi4export(["--checkpoint", str(published), "--inspect"]) == 2
    assert "longer than its header says" in capsys.readouterr().err


def test_every_layer_is_shown_with_its_kind() -> None:
    text = shown(GOLDENS / "A8")
    for kind in ("mamba", "window attention", "full attention", "gmu", "cross attention"):
        assert kind in text
    assert text.count("mamba") == 3


def test_only_the_shared_cache_grows_with_depth() -> None:
    config = open_checkpoint(GOLDENS / "A8").config
    depths = [state_bytes(config, tokens) for tokens in DEPTHS]
    for kind in depths[0].keys() - {"shared keys, values"}:
        assert len({sizes[kind] for sizes in depths}) == 1
    per_token = 2 * config.num_key_value_heads * config.head_size * 4
    assert [sizes["shared keys, values"] for sizes in depths] == [n * per_token for n in DEPTHS]


@pytest.mark.parametrize(
    ("cache", "most"), [("float32", 381e6), ("float16", 200e6), ("int8", 110e6)]
)
def test_states_at_32k_tokens_fit_the_memory_of_a_tablet(
    published: Path, cache: str, most: float
) -> None:
    config = open_checkpoint(published).config
    assert 0.9 * most < sum(state_bytes(config, 32_768, cache).values()) <= most


def test_states_of_the_published_shape_have_the_specified_sizes(published: Path) -> None:
    sizes = state_bytes(open_checkpoint(published).config, 1000)
    assert sizes == {
        "convolution": 4 * 9 * 5120 * 3,
        "scan": 4 * 9 * 5120 * 16,
        "window rings": 4 * 8 * 2 * 512 * 20 * 64,
        "shared keys, values": 4 * 2 * 1000 * 20 * 64,
    }


def test_a_narrow_terminal_loses_no_digit(published: Path) -> None:
    assert "…" not in shown(published, width=40)
