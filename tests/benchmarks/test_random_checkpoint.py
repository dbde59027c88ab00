from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import (
    CONFIG,
    GENERATION,
    SMALL,
    SMALL_GENERATION,
    main,
    write_checkpoint,
)
from export.checkpoint import INDEX_FILE, find_non_finite, open_checkpoint
from export.quantize.options import TEXT
from runtime_py.tokenizer import Tokenizer


def write_small(folder: Path, seed: int = 0) -> int:
    return write_checkpoint(folder, CONFIG | SMALL, SMALL_GENERATION, seed=seed)


def test_a_small_checkpoint_opens_and_is_finite(tmp_path: Path) -> None:
    total = write_small(tmp_path / "new")
    checkpoint = open_checkpoint(tmp_path / "new")
    assert checkpoint.total_bytes == total
    assert len({tensor.path for tensor in checkpoint.tensors.values()}) == 2
    assert (tmp_path / "new" / INDEX_FILE).exists()
    assert find_non_finite(checkpoint) is None
    assert checkpoint.config.eos_token_ids == (510, 511)


def test_only_decay_rates_and_lambdas_are_float32(tmp_path: Path) -> None:
    write_small(tmp_path)
    for name, tensor in open_checkpoint(tmp_path).tensors.items():
        wide = name.endswith("A_log") or "lambda_" in name
        assert tensor.dtype == ("F32" if wide else "BF16")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_small(tmp_path / name, seed)
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        first, same, other = ((tmp_path / name / shard).read_bytes() for name in "abc")
        assert first == same != other


def test_bytes_do_not_depend_on_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path / "whole")
    monkeypatch.setattr(random_checkpoint, "_CHUNK", 1024)
    write_small(tmp_path / "pieces")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes()


def test_weights_have_a_plausible_scale(tmp_path: Path) -> None:
    write_small(tmp_path)
    tensors = open_checkpoint(tmp_path).tensors

    def values(name: str) -> np.ndarray:
        return tensors[name].to_ir().numpy().astype(np.float32)

    mamba = "model.layers.0.attn."
    step = np.log1p(np.exp(values(mamba + "dt_proj.bias")))
    assert step.min() > 0.00098
    assert step.max() < 0.102
    np.testing.assert_allclose(np.exp(values(mamba + "A_log")[5]), np.arange(1, 17), rtol=1e-6)
    assert values("model.embed_tokens.weight").std() == pytest.approx(0.02, rel=0.05)
    out = values(mamba + "out_proj.weight").std()
    assert out < values(mamba + "in_proj.weight").std() / 2
    assert (values("model.final_layernorm.weight") == 1).all()


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = write_checkpoint(
        tmp_path, CONFIG | SMALL, SMALL_GENERATION, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("existed", [True, False])
def test_an_interruption_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    folder = tmp_path / "checkpoint"
    if existed:
        folder.mkdir()

    def interrupt(written: int, total: int) -> None:
        if written > total * 0.9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, CONFIG | SMALL, SMALL_GENERATION, progress=interrupt)
    assert folder.exists() == existed
    assert not existed or not list(folder.iterdir())


def test_a_folder_that_holds_something_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    assert main([str(tmp_path), "--size", "small"]) == 2
    assert "is no empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_writes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "new"), "--size", "small", "--seed", "5"]) == 0
    total = open_checkpoint(tmp_path / "new").total_bytes
    assert f"{total} bytes" in capsys.readouterr().out


def test_with_a_tokenizer_it_reads_the_text_beside_it(tmp_path: Path) -> None:
    config = CONFIG | SMALL | {"vocab_size": 800}
    write_checkpoint(tmp_path, config, SMALL_GENERATION, tokenizer=True)
    ids = Tokenizer(tmp_path).encode((tmp_path / TEXT).read_text(encoding="utf-8"))
    assert len(ids) > 10_000
    assert max(ids) < 800


def test_a_small_vocabulary_is_no_match_for_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "new"), "--size", "small", "--tokenizer"])
    assert caught.value.code == 2
    assert "take the published size" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seed", ["-1", "x", "1.5"])
def test_a_seed_that_is_no_count_is_refused(tmp_path: Path, seed: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "new"), f"--seed={seed}"])
    assert caught.value.code == 2
    assert not (tmp_path / "new").exists()


def test_the_default_is_the_published_end_tokens() -> None:
    assert GENERATION == {"eos_token_id": [200_020, 199_999]}
    assert CONFIG["vocab_size"] == 200_064
