"""The search for scales is worth its time in 4 bits, and near the best there is."""

import json

import numpy as np
import pytest

from benchmarks.scale_search import WEIGHTS, best_ratio, main, measure, ratio
from graph_passes.recipe import WeightFormat

ROWS = 32


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_four_bits_gain_a_decibel(weight: str, block_size: int) -> None:
    gain = measure(weight, WeightFormat(bits=4, block_size=block_size), ROWS)
    assert gain.gain_db >= 1
    assert gain.gain_db > gain.limit_db - 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
def test_no_quantizer_exceeds_the_limit(bits: int, zero_points: bool) -> None:
    form = WeightFormat(bits=bits, zero_points=zero_points)
    blocks = np.random.default_rng(3).standard_normal((512, form.block_size), np.float32)
    limit = best_ratio(blocks, form)
    rtn, search = (ratio(blocks, form, quantizer) for quantizer in ("rtn", "search"))
    assert rtn < search <= limit < search + 0.6


def test_the_command_writes_every_format(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.scale_search.BLOCK_SIZES", (32,))
    monkeypatch.setattr("benchmarks.scale_search._LIMIT_WEIGHTS", 1 << 12)
    assert main(["--rows", "32", "--json", str(tmp_path / "gains.json")]) == 0
    rows = json.loads((tmp_path / "gains.json").read_text())["formats"]
    assert len(rows) == 2 * 2 * 2
    shown = capsys.readouterr().out
    for row in rows:
        assert f"{row['search_db']:.2f}" in shown
